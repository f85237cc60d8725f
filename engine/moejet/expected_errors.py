"""An error in one line, with the exit code of the process that it ends."""

from __future__ import annotations

import errno

from moejet.validation import short

# What to do about errors of the operating system.
_REMEDIES = {
    errno.ENOENT: "check the path",
    errno.ENOTDIR: "check the path",
    errno.EISDIR: "give a file",
    errno.EEXIST: "choose another name, or remove it",
    errno.EACCES: "check its permissions",
    errno.EPERM: "check its permissions",
    errno.EROFS: "choose a place that can be written to",
    errno.ENOSPC: "free some space, or choose another place",
    errno.EDQUOT: "free some space, or choose another place",
    errno.EMFILE: "raise the limit (ulimit -n)",
    errno.ENAMETOOLONG: "give a shorter one",
    errno.EIO: "check the disk",
}


def describe_error(error: Exception) -> tuple[str, int]:
    """One line and an exit code."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if isinstance(error, UnicodeError):
        return f"{lines[0]}: text must be UTF-8", 2
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return str(error), 2
    if isinstance(error, ImportError):
        return f"{error}; 'moejet doctor' checks the installation", 1
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        text = lines[0] if str(error) else "out of memory"
        return f"{text}: free some memory, or use a smaller --expert-format or --max-context", 1
    if isinstance(error, OSError) and error.strerror:
        remedy = _REMEDIES.get(error.errno or 0)
        where = f"{short(error.filename)}: " if error.filename else ""
        return f"{where}{error.strerror}{f': {remedy}' if remedy else ''}", 1
    if isinstance(error, OSError | FloatingPointError):
        return str(error), 1
    name = type(error).__name__
    return f"{name}: {lines[0]} (unexpected: run it again with --debug, and report what it says)", 1
