"""The frame of our own binary files: magic, length and checksum of a header, the header as JSON, data behind it.

0      magic                               16 bytes
16     length of the header, its checksum  2 x 8 bytes, little-endian
32     header: JSON
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from typing import Any

from moejet.atomic_file import write_all
from moejet.extension import load_extension

_PREFIX = struct.Struct("<16sQQ")
_MAX_HEADER_BYTES = 64 << 20
_FIRST_READ_BYTES = 16 << 10  # holds the header of most files


def data_offset(text: bytes, alignment: int) -> int:
    """Where data may begin behind the header `text`."""
    return aligned(_PREFIX.size + len(text), alignment)


def write_header(fd: int, magic: bytes, text: bytes) -> None:
    """Writes the header once the data is synced: without one the file is nothing, whatever a crash leaves."""
    os.fsync(fd)
    checksum = load_extension().checksum(text)
    write_all(fd, memoryview(_PREFIX.pack(magic, len(text), checksum) + text), 0)


def read_header(fd: int, magic: bytes, kind: str) -> bytes:
    """The header's text; ValueError if it is not complete and sound. kind: what such files hold, for the message."""
    size = os.fstat(fd).st_size
    start = os.pread(fd, _FIRST_READ_BYTES, 0)
    if len(start) < _PREFIX.size or not start.startswith(magic):
        raise ValueError(f"it is no complete file of {kind}")
    _, length, expected = _PREFIX.unpack_from(start)
    if length > min(_MAX_HEADER_BYTES, size - _PREFIX.size):
        raise ValueError(f"its header claims {length} bytes")
    text = start[_PREFIX.size : _PREFIX.size + length]
    if len(text) < length:
        text = os.pread(fd, length, _PREFIX.size)
    if load_extension().checksum(text) != expected:
        raise ValueError("its header is damaged")
    return text


def aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def canonical(value: Any) -> bytes:
    """JSON that is the same for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def fingerprint_of(key: dict[str, Any]) -> str:
    """20 hex digits that stand for a key of JSON values."""
    return hashlib.blake2b(canonical(key), digest_size=10).hexdigest()
