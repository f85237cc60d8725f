"""Files that appear complete or not at all, whatever ends their writer: temporary name, lock, sync, rename.

A temporary file is locked while its writer lives, so that those of dead writers can be told apart and swept.
"""

from __future__ import annotations

import errno
import fcntl
import itertools
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TEMPORARY = ".tmp"
FREE_BYTES = 1 << 30  # of the user's disk, that caches leave free
_COUNTER = itertools.count()


class Abandoned(Exception):
    """Raised inside `replace_atomically` to leave without a file."""


@contextmanager
def replace_atomically(path: Path) -> Iterator[int]:
    """A descriptor to write to; at the end of the block the file is synced and takes its name.

    If the block raises, nothing is left. `Abandoned` does not get out.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{next(_COUNTER)}{TEMPORARY}")
    fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    done = False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield fd
        os.fsync(fd)
        os.rename(temporary, path)
        done = True
        sync_directory(path.parent)
    except Abandoned:
        pass
    finally:
        if not done:
            temporary.unlink(missing_ok=True)
        os.close(fd)


def is_being_written(path: Path) -> bool:
    """Whether a writer of this file lives."""
    for file in path.parent.glob(f"{path.name}.*{TEMPORARY}"):
        with suppress(OSError), file.open("rb") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def reserve(fd: int, num_bytes: int, *, keep_free: int = 0, holes: int = 0) -> None:
    """Takes the room at once, so that a full disk shows now and not in the middle.

    keep_free: bytes of the disk that must stay free · holes: bytes that will not be written; with any, the file only
    gets its length. Raises OSError(ENOSPC).
    """
    disk = os.fstatvfs(fd)
    if disk.f_bavail * disk.f_frsize < num_bytes - holes + keep_free:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if holes:
        os.ftruncate(fd, num_bytes)
    else:
        os.posix_fallocate(fd, 0, num_bytes)


def write_all(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)


def read_all(fd: int, target: memoryview, offset: int) -> None:
    """Fills `target`; ValueError if the file ends before."""
    done = 0
    while done < len(target):
        count = os.preadv(fd, [target[done:]], offset + done)
        if count == 0:
            raise ValueError(f"it ends {len(target) - done} bytes too early")
        done += count


def sync_directory(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def abandoned_files(directory: Path, suffix: str) -> list[Path]:
    """Temporary files for names with this suffix whose writer is dead."""
    found = []
    for file in directory.glob(f"*{suffix}.*{TEMPORARY}") if directory.is_dir() else ():
        try:
            fd = os.open(file, os.O_RDWR)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A writer takes the lock right after it has created the file.
            if time.time() - os.fstat(fd).st_mtime > 2:
                found.append(file)
        except OSError:
            pass  # its writer lives
        finally:
            os.close(fd)
    return found
