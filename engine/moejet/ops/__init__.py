"""One operation per file: the public function, its torch reference, and the choice of implementation.

CPU tensors go to C++ where it exists and to torch otherwise; MOEJET_REF=1 forces the reference.
"""
