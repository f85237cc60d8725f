"""The layers of DeepSeek-family models. Each names its checkpoint tensors through `tensor_specs(prefix)`.

Hidden states between layers are fp32; a norm's output and everything inside a layer is in the dense dtype.
"""
