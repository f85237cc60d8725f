"""The compiled kernels, imported on first use so that configuration and planning work without them."""

from types import ModuleType


def load_extension() -> ModuleType:
    """The module moejet._C. Raises ImportError with a remedy if it is not built."""
    try:
        from moejet import _C
    except ImportError as error:
        raise ImportError(
            f"the compiled kernels moejet._C cannot be loaded ({error}): install moejet again with "
            "`pip install .` (needs a C++17 compiler and CMake)"
        ) from error
    return _C
