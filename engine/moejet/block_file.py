"""Blocks of the latent cache in a file, of the prefix store or of a saved session:

    0      "moejet-blocks\\n\\0\\0"            16 bytes
    16     length of the header, its checksum  2 x 8 bytes, little-endian
    32     header: JSON {"fingerprint", "block_bytes", "digests", "checksums", ...}, one hash and checksum per block
    ...    the blocks one after another, from a multiple of 4096 on

A block is [layers, block_size, C + R] in the dtype of the cache; its digest is the hash of all tokens up to its end.
Files are written once, atomically, and never changed.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moejet.atomic_file import read_all, replace_atomically, reserve, write_all
from moejet.block_pool import DIGEST_BYTES
from moejet.extension import load_extension

Bytes = NDArray[np.uint8]
_MAGIC = b"moejet-blocks\n\0\0"
_PREFIX = struct.Struct("<16sQQ")
_ALIGNMENT = 4096
_MAX_HEADER_BYTES = 64 << 20
_FIRST_READ_BYTES = 16 << 10  # holds the header of most files


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """What a file says about itself; info: whatever its writer added."""

    fingerprint: str
    block_bytes: int
    digests: tuple[bytes, ...]
    checksums: tuple[int, ...]
    data_offset: int
    info: dict[str, Any]

    @property
    def file_bytes(self) -> int:
        return self.data_offset + len(self.digests) * self.block_bytes


def write_blocks(
    path: Path,
    blocks: Iterable[Bytes],
    digests: Sequence[bytes],
    *,
    fingerprint: str,
    block_bytes: int,
    info: dict[str, Any],
    keep_free: int = 0,
) -> BlockHeader:
    """Writes one block of `block_bytes` per digest. Raises OSError and leaves nothing if the disk refuses.

    Each array is written before the next one is asked for, so they may share memory.
    """
    checksum = load_extension().checksum
    checksums = [0] * len(digests)
    offset = _aligned(
        _PREFIX.size + len(_pack_header(fingerprint, block_bytes, digests, checksums, info))
    )
    with replace_atomically(path) as fd:
        reserve(fd, offset + len(digests) * block_bytes, keep_free=keep_free)
        for i, block in enumerate(blocks):
            assert block.nbytes == block_bytes, f"{block.nbytes=} {block_bytes=}"
            checksums[i] = checksum(block)
            write_all(fd, block.reshape(-1).data, offset + i * block_bytes)
        text = _pack_header(fingerprint, block_bytes, digests, checksums, info)
        # The header comes last: without it the file is nothing, whatever a crash leaves.
        os.fsync(fd)
        write_all(fd, memoryview(_PREFIX.pack(_MAGIC, len(text), checksum(text)) + text), 0)
    return BlockHeader(fingerprint, block_bytes, tuple(digests), tuple(checksums), offset, info)


def read_header(fd: int) -> BlockHeader:
    """Reads and checks a header; ValueError if anything in it does not fit the file."""
    size = os.fstat(fd).st_size
    start = os.pread(fd, _FIRST_READ_BYTES, 0)
    if len(start) < _PREFIX.size or not start.startswith(_MAGIC):
        raise ValueError("it is no complete file of cached blocks")
    _, length, expected = _PREFIX.unpack_from(start)
    if length > min(_MAX_HEADER_BYTES, size - _PREFIX.size):
        raise ValueError(f"its header claims {length} bytes")
    text = start[_PREFIX.size : _PREFIX.size + length]
    if len(text) < length:
        text = os.pread(fd, length, _PREFIX.size)
    if load_extension().checksum(text) != expected:
        raise ValueError("its header is damaged")
    try:
        raw = json.loads(text)
        digests, checksums = bytes.fromhex(raw["digests"]), bytes.fromhex(raw["checksums"])
        header = BlockHeader(
            fingerprint=str(raw["fingerprint"]),
            block_bytes=int(raw["block_bytes"]),
            digests=tuple(
                digests[i : i + DIGEST_BYTES] for i in range(0, len(digests), DIGEST_BYTES)
            ),
            checksums=struct.unpack(f"<{len(checksums) // 8}Q", checksums),
            data_offset=_aligned(_PREFIX.size + length),
            info=dict(raw["info"]),
        )
    except (KeyError, TypeError, ValueError, struct.error) as error:
        raise ValueError(f"its header cannot be read ({error})") from error
    if len(header.digests) != len(header.checksums) or header.block_bytes <= 0:
        raise ValueError("its header contradicts itself")
    if size != header.file_bytes:
        raise ValueError(f"it has {size} bytes instead of {header.file_bytes}")
    return header


def read_block(fd: int, header: BlockHeader, index: int, target: Bytes) -> None:
    """Fills `target` [block_bytes]; ValueError if the block is damaged, with `target` then undefined."""
    read_all(fd, target.data, header.data_offset + index * header.block_bytes)
    if load_extension().checksum(target) != header.checksums[index]:
        raise ValueError(f"block {index} is damaged: its checksum differs")


def verify(path: Path) -> None:
    """Compares all checksums; ValueError names the first block that is damaged."""
    fd = os.open(path, os.O_RDONLY)
    try:
        header = read_header(fd)
        target = np.empty(header.block_bytes, np.uint8)
        for index in range(len(header.digests)):
            read_block(fd, header, index, target)
    finally:
        os.close(fd)


def _pack_header(
    fingerprint: str,
    block_bytes: int,
    digests: Sequence[bytes],
    checksums: Sequence[int],
    info: dict[str, Any],
) -> bytes:
    """JSON whose length does not depend on the checksums."""
    fields = {
        "fingerprint": fingerprint,
        "block_bytes": block_bytes,
        "digests": b"".join(digests).hex(),
        "checksums": struct.pack(f"<{len(checksums)}Q", *checksums).hex(),
        "info": info,
    }
    return json.dumps(fields, separators=(",", ":")).encode()


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
