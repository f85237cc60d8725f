"""What `moejet bench gpu` measures: one module per kernel, each with its cases."""
