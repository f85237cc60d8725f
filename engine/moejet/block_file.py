"""Blocks of the latent cache in a file, of the prefix store or of a saved session, framed as `framed_file` says:

    header  {"fingerprint", "block_bytes", "digests", "checksums", ...}, one hash and checksum per block
    data    the blocks one after another, from a multiple of 4096 on

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

from moejet import framed_file
from moejet.atomic_file import read_all, replace_atomically, reserve, write_all
from moejet.block_pool import DIGEST_BYTES
from moejet.extension import load_extension

Bytes = NDArray[np.uint8]
_MAGIC = b"moejet-blocks\n\0\0"
_ALIGNMENT = 4096


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
    text = _pack_header(fingerprint, block_bytes, digests, checksums, info)
    offset = framed_file.data_offset(text, _ALIGNMENT)
    with replace_atomically(path) as fd:
        reserve(fd, offset + len(digests) * block_bytes, keep_free=keep_free)
        for i, block in enumerate(blocks):
            assert block.nbytes == block_bytes, f"{block.nbytes=} {block_bytes=}"
            checksums[i] = checksum(block)
            write_all(fd, block.reshape(-1).data, offset + i * block_bytes)
        text = _pack_header(fingerprint, block_bytes, digests, checksums, info)
        framed_file.write_header(fd, _MAGIC, text)
    return BlockHeader(fingerprint, block_bytes, tuple(digests), tuple(checksums), offset, info)


def read_header(fd: int) -> BlockHeader:
    """Reads and checks a header; ValueError if anything in it does not fit the file."""
    size = os.fstat(fd).st_size
    text = framed_file.read_header(fd, _MAGIC, "cached blocks")
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
            data_offset=framed_file.data_offset(text, _ALIGNMENT),
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
