"""Errors that are not bugs of ours, and what to say of them in one line."""

# Of the input, the machine or the network; all others are bugs.
EXPECTED_ERRORS = (ValueError, ImportError, MemoryError, OSError, FloatingPointError)


def describe_error(error: Exception) -> tuple[str, int]:
    """One line and an exit code for an error that is not a bug of ours."""
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return str(error), 2
    if isinstance(error, ImportError):
        return f"{error}; 'moejet doctor' checks the installation", 1
    if isinstance(error, MemoryError):
        text = str(error) or "out of memory"
        return f"{text}: free some memory, or use a smaller --expert-format or --max-context", 1
    if isinstance(error, OSError) and error.strerror:
        return (f"{error.filename}: " if error.filename else "") + error.strerror, 1
    return str(error), 1
