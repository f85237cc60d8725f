"""What a file of packed weights says about itself, and what became of the files that it was made from."""

from __future__ import annotations

import json
import mmap
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from moejet import framed_file
from moejet.extension import load_extension

MAGIC = b"moejet-packed\n\0\0"
ALIGNMENT = 1 << 16  # of the largest pages that a kernel maps files with


@dataclass(frozen=True, slots=True)
class Blob:
    """`nbytes` bytes at `offset`, a multiple of the page size."""

    name: str
    offset: int
    nbytes: int
    checksum: str


@dataclass(frozen=True, slots=True)
class Header:
    """What a cache file says about itself.

    root: the directory of the source files, mount: of the file system that held them; empty if not known.
    """

    key: dict[str, Any]
    blobs: tuple[Blob, ...]
    file_bytes: int
    model: str
    created: float
    root: str = ""
    mount: str = ""


def read_header(fd: int) -> Header:
    """Reads and checks a header; ValueError if anything in it does not fit the file."""
    size = os.fstat(fd).st_size
    text = framed_file.read_header(fd, MAGIC, "packed weights")
    try:
        raw = json.loads(text)
        blobs = tuple(
            Blob(b["name"], int(b["offset"]), int(b["nbytes"]), b["checksum"]) for b in raw["blobs"]
        )
        header = Header(
            raw["key"],
            blobs,
            int(raw["file_bytes"]),
            raw["model"],
            float(raw["created"]),
            str(raw.get("root", "")),
            str(raw.get("mount", "")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"its header cannot be read ({error})") from error
    if size != header.file_bytes:
        raise ValueError(f"it has {size} bytes instead of {header.file_bytes}")
    for blob in blobs:
        if blob.offset % ALIGNMENT or not 0 <= blob.offset <= size - blob.nbytes:
            raise ValueError(f"{blob.name} does not lie inside it")
    return header


def verify_blobs(fd: int, header: Header) -> None:
    """Compares all checksums; ValueError names the first part that is damaged."""
    checksum = load_extension().checksum
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as view, memoryview(view) as data:
        for blob in header.blobs:
            with data[blob.offset : blob.offset + blob.nbytes] as part:
                if f"{checksum(part):016x}" != blob.checksum:
                    raise ValueError(f"{blob.name} is damaged: its checksum differs")


def stale_reason(header: Header) -> str:
    """Why no version like this one can use the file, or nothing."""
    version = load_extension().PACK_LAYOUT_VERSION
    if header.key.get("layout") != version:
        return f"layout {header.key.get('layout')}, this version has {version}"
    return ""


SourceState = Literal["", "gone", "changed", "not mounted"]


def source_state(header: Header) -> SourceState:
    """What became of the files that it was made from; nothing if they are as they were, or not known.

    "not mounted": gone together with their disk, and perhaps not for ever.
    """
    if not header.root:
        return ""
    for name, size, mtime_ns, *_ in header.key.get("sources", ()):
        try:
            stat = os.stat(os.path.join(header.root, name))
        except (FileNotFoundError, NotADirectoryError):
            return "gone" if os.path.ismount(header.mount) else "not mounted"
        except OSError:  # it may be there
            return ""
        if (stat.st_size, stat.st_mtime_ns) != (size, mtime_ns):
            return "changed"
    return ""


def mount_of(path: Path) -> str:
    """Where the file system that holds a directory is mounted."""
    path = path.resolve()
    return str(next((p for p in (path, *path.parents) if os.path.ismount(p)), path.anchor))
