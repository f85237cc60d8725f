"""GGUF headers (versions 2 and 3), read strictly and with bounded memory and time.

A GGUF file is the magic "GGUF", a version, the numbers of tensors and of metadata entries, the entries (key, type,
value), the tensor infos (name, dimensions, type, offset) and, from the next multiple of general.alignment, the data;
offsets count from there. Dimensions are stored fastest first; shapes here are torch's, slowest first. Everything is
little-endian. Whatever the header claims is compared with the file's size before it is read, allocated or looped over.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import os
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from moejet.weights.checkpoint import TensorInfo
from moejet.weights.gguf_types import GGML_TYPES, TypeLayout, gguf_dtype

MAGIC = b"GGUF"
# Real headers are below 20 MB, almost all of it the vocabulary.
MAX_HEADER_BYTES = 128 << 20
MAX_ENTRIES = 1 << 16
MAX_TENSORS = 1 << 17
MAX_STRINGS = 1 << 21
MAX_NESTED_ARRAYS = 1 << 14
MAX_NESTING = 4
MAX_NAME_BYTES = 1 << 10
MAX_DIMENSIONS = 4
MAX_ALIGNMENT = 1 << 20
DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY, _BOOL = 8, 9, 7
# Value type -> numpy spelling of what lies in the file.
_SCALARS = {
    **{0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "<u1"},
    **{10: "<u8", 11: "<i8", 12: "<f8"},
}
_UINT32, _UINT64 = struct.Struct("<I"), struct.Struct("<Q")
_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.gguf")
_CHUNK_BYTES = 1 << 20
_LISTED = 10


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """One file: metadata (arrays of numbers as numpy arrays, of strings as lists) and tensors in file order."""

    file: Path
    version: int
    metadata: dict[str, Any]
    tensors: list[TensorInfo]


@dataclass(frozen=True, slots=True)
class GgufFiles:
    """A model of one file or of all its shards: the first one's metadata, everyone's tensors by GGUF name."""

    files: list[Path]
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]

    @classmethod
    def open(cls, file: str | Path) -> GgufFiles:
        """Reads all headers of a model, given its file or any of its shards.

        Raises ValueError with every problem found: missing or mixed-up shards, broken headers, names held twice.
        """
        files = list_shards(Path(file))
        headers: list[GgufHeader] = []
        problems: list[str] = []
        for shard in files:
            try:
                headers.append(read_gguf_header(shard))
            except ValueError as error:
                problems.append(str(error))
        tensors: dict[str, TensorInfo] = {}
        for header in headers:
            for info in header.tensors:
                other = tensors.setdefault(info.name, info)
                if other is not info:
                    problems.append(
                        f"tensor {info.name} is in both {other.file.name} and {info.file.name}"
                    )
        if not problems:
            problems = _split_problems(headers, len(tensors))
        if problems:
            more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
            raise ValueError(
                f"{file} cannot be loaded: {'; '.join(problems[:_LISTED])}{more}; download it again"
            )
        return cls(files, headers[0].metadata, tensors)


def list_shards(file: Path) -> list[Path]:
    """All files of the model that `file` belongs to, in order; ValueError if one is missing."""
    match = _SHARD_NAME.fullmatch(file.name)
    if match is None:
        return [file]
    number, total = int(match["number"]), int(match["total"])
    if not 1 <= number <= total:
        raise ValueError(f"{file} is named as shard {number} of {total}: rename or download it")
    present = {
        f.name
        for f in file.parent.glob(f"*-of-{match['total']}.gguf")
        if _SHARD_NAME.fullmatch(f.name)
    }
    names = [f"{match['stem']}-{n:05d}-of-{total:05d}.gguf" for n in range(1, total + 1)]
    missing = [name for name in names if name not in present]
    if missing:
        more = f", and {len(missing) - _LISTED} more" if len(missing) > _LISTED else ""
        raise ValueError(
            f"{file} lacks {len(missing)} of its {total} shards: {', '.join(missing[:_LISTED])}{more}; "
            "download them into the same directory"
        )
    return [file.parent / name for name in names]


def _split_problems(headers: list[GgufHeader], num_tensors: int) -> list[str]:
    """What split.no, split.count and split.tensors.count contradict."""
    problems = []
    for number, header in enumerate(headers):
        meta, name = header.metadata, header.file.name
        count = meta.get("split.count", 1)
        if count in (0, 1) and len(headers) == 1:
            continue
        if count != len(headers):
            problems.append(
                f"{name} says split.count={count!r}, but there are {len(headers)} files (shards must "
                "be named <name>-00001-of-0000N.gguf)"
            )
        elif meta.get("split.no") != number:
            problems.append(f"{name} says split.no={meta.get('split.no')!r}, not {number}")
    expected = headers[0].metadata.get("split.tensors.count", num_tensors)
    if not problems and expected != num_tensors:
        problems.append(f"the files hold {num_tensors} tensors, split.tensors.count={expected!r}")
    return problems


def read_gguf_header(file: Path, size: int | None = None) -> GgufHeader:
    """Parses and checks the header of one file.

    size: of the whole file, where only its beginning is here.
    Raises ValueError (one line, naming the file) if anything in it does not fit the file; HeaderBeyond if the beginning
    ends too early.
    """
    with file.open("rb") as stream:
        present = os.fstat(stream.fileno()).st_size
        cursor = _Cursor(stream.fileno(), present if size is None else size)
        try:
            return _read_header(file, cursor)
        except HeaderBeyond:
            raise
        except _Truncated as error:
            raise ValueError(f"{file.name} is truncated: {error}") from error
        except ValueError as error:
            raise ValueError(f"{file.name} has a corrupt GGUF header: {error}") from error


class HeaderBeyond(ValueError):
    """The header is longer than what is here of the file."""


class _Truncated(ValueError):
    """The file ends before what its header claims."""


class _Cursor:
    """Reads forward through the first bytes of a file; `need` is what keeps every read inside it."""

    def __init__(self, fd: int, size: int):
        self.fd = fd
        self.size = size
        self.blob = bytearray()
        self.position = 0
        self.num_strings = 0
        self.num_nested = 0

    def need(self, num_bytes: int, what: str) -> None:
        """Makes the next `num_bytes` available in `blob`."""
        end = self.position + num_bytes
        if end > self.size:
            raise _Truncated(
                f"{what} needs {num_bytes} bytes, {self.size - self.position} are left"
            )
        if end > MAX_HEADER_BYTES:
            raise ValueError(f"{what} ends beyond {MAX_HEADER_BYTES >> 20} MiB")
        while len(self.blob) < end:
            wanted = max(end - len(self.blob), _CHUNK_BYTES)
            chunk = os.pread(self.fd, min(wanted, MAX_HEADER_BYTES), len(self.blob))
            if not chunk:
                raise HeaderBeyond(f"it ends inside {what}")
            self.blob += chunk

    def uint32(self, what: str) -> int:
        self.need(4, what)
        (value,) = _UINT32.unpack_from(self.blob, self.position)
        self.position += 4
        return int(value)

    def uint64(self, what: str) -> int:
        self.need(8, what)
        (value,) = _UINT64.unpack_from(self.blob, self.position)
        self.position += 8
        return int(value)

    def count(self, what: str, item_bytes: int, limit: int) -> int:
        """A uint64 count of items that take at least `item_bytes` each."""
        value = self.uint64(f"the number of {what}")
        left = (self.size - self.position) // item_bytes
        if value > limit or value > left:
            raise ValueError(f"it claims {value} {what}; possible: {min(limit, left)}")
        return value

    def name(self, what: str) -> str:
        """A key or tensor name: short, and fit to be shown in a message."""
        name = self.text(what, MAX_NAME_BYTES)
        if not name or not name.isprintable():
            raise ValueError(f"{what} is empty or not printable: {name!r}")
        return name

    def text(self, what: str, limit: int = MAX_HEADER_BYTES) -> str:
        length = self.uint64(f"the length of {what}")
        if length > limit:
            raise ValueError(f"{what} claims {length} bytes, more than {limit}")
        self.need(length, what)
        raw = self.blob[self.position : self.position + length]
        self.position += length
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} is not UTF-8") from error

    def numbers(self, dtype: str, count: int, what: str) -> np.ndarray[Any, np.dtype[Any]]:
        num_bytes = np.dtype(dtype).itemsize * count
        self.need(num_bytes, what)
        raw = self.blob[self.position : self.position + num_bytes]
        self.position += num_bytes
        return np.frombuffer(bytes(raw), dtype)

    def texts(self, count: int, what: str) -> list[str]:
        """`count` strings; one loop without calls per item, because vocabularies are long."""
        self.num_strings += count
        if self.num_strings > MAX_STRINGS:
            raise ValueError(f"{what}: more than {MAX_STRINGS} strings in all")
        result: list[str] = []
        append, unpack, blob = result.append, _UINT64.unpack_from, self.blob
        position = self.position
        try:
            for _ in range(count):
                if position + 8 > len(blob):
                    self.position = position
                    self.need(8, what)
                start = position + 8
                position = start + unpack(blob, position)[0]
                if position > len(blob):
                    self.position = start
                    self.need(position - start, what)
                append(blob[start:position].decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"{what} holds a string that is not UTF-8") from error
        self.position = position
        return result


def _read_header(file: Path, cursor: _Cursor) -> GgufHeader:
    cursor.need(8, "the start")
    if cursor.blob[:4] != MAGIC:
        if cursor.blob.startswith(b"version "):
            raise ValueError("it is a git-lfs pointer, not the weights (git lfs pull)")
        raise ValueError(f"it starts with {bytes(cursor.blob[:4])!r}, not {MAGIC!r}")
    cursor.position = 4
    version = cursor.uint32("the version")
    if version and version & 0xFFFF == 0:
        raise ValueError("it is big-endian; supported: little-endian files")
    if version not in (2, 3):
        raise ValueError(f"version {version} is not supported; supported: 2 and 3")
    num_tensors = cursor.count("tensors", 8 + 4 + 8 + 4 + 8, MAX_TENSORS)
    num_entries = cursor.count("metadata entries", 8 + 4 + 1, MAX_ENTRIES)
    metadata: dict[str, Any] = {}
    for _ in range(num_entries):
        key = cursor.name("a metadata key")
        if key in metadata:
            raise ValueError(f"metadata key {key!r} is there twice")
        metadata[key] = _read_value(cursor, cursor.uint32(f"the type of {key}"), key, 0)
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if (
        type(alignment) is not int
        or not 8 <= alignment <= MAX_ALIGNMENT
        or alignment & (alignment - 1)
    ):
        raise ValueError(
            f"general.alignment={alignment!r} must be a power of two from 8 to {MAX_ALIGNMENT}"
        )
    entries = [_read_tensor_entry(cursor) for _ in range(num_tensors)]
    start = -(-cursor.position // alignment) * alignment
    return GgufHeader(
        file, version, metadata, _place_tensors(entries, file, start, alignment, cursor.size)
    )


def _read_value(cursor: _Cursor, kind: int, key: str, depth: int) -> Any:
    if kind in _SCALARS:
        (value,) = cursor.numbers(_SCALARS[kind], 1, key)
        return _as_bools(np.asarray([value]), key)[0].item() if kind == _BOOL else value.item()
    if kind == _STRING:
        return cursor.text(key)
    if kind != _ARRAY:
        raise ValueError(f"{key} has the unknown value type {kind}")
    item_kind = cursor.uint32(f"the item type of {key}")
    if item_kind in _SCALARS:
        dtype = _SCALARS[item_kind]
        count = cursor.count(f"items of {key}", np.dtype(dtype).itemsize, MAX_HEADER_BYTES)
        values = cursor.numbers(dtype, count, key)
        return _as_bools(values, key) if item_kind == _BOOL else values
    if item_kind == _STRING:
        return cursor.texts(cursor.count(f"strings of {key}", 8, MAX_STRINGS), key)
    if item_kind != _ARRAY:
        raise ValueError(f"{key} has the unknown item type {item_kind}")
    if depth + 1 >= MAX_NESTING:
        raise ValueError(f"{key} is nested more than {MAX_NESTING} deep")
    count = cursor.count(f"arrays of {key}", 12, MAX_NESTED_ARRAYS)
    cursor.num_nested += count
    if cursor.num_nested > MAX_NESTED_ARRAYS:
        raise ValueError(f"{key}: more than {MAX_NESTED_ARRAYS} nested arrays in all")
    return [_read_value(cursor, _ARRAY, key, depth + 1) for _ in range(count)]


def _as_bools(values: np.ndarray[Any, np.dtype[Any]], key: str) -> np.ndarray[Any, np.dtype[Any]]:
    if np.any(values > 1):
        raise ValueError(f"{key} holds a truth value that is neither 0 nor 1")
    return values.astype(bool)


@dataclass(frozen=True, slots=True)
class _TensorEntry:
    name: str
    shape: tuple[int, ...]
    type: TypeLayout
    offset: int


def _read_tensor_entry(cursor: _Cursor) -> _TensorEntry:
    name = cursor.name("a tensor name")
    num_dimensions = cursor.uint32(f"the dimensions of {name}")
    if not 1 <= num_dimensions <= MAX_DIMENSIONS:
        raise ValueError(
            f"tensor {name} has {num_dimensions} dimensions, not 1 to {MAX_DIMENSIONS}"
        )
    shape = tuple(cursor.uint64(f"the shape of {name}") for _ in range(num_dimensions))[::-1]
    number = cursor.uint32(f"the type of {name}")
    offset = cursor.uint64(f"the offset of {name}")
    kind = GGML_TYPES.get(number)
    if kind is None:
        raise ValueError(f"tensor {name} has the unknown ggml type {number}")
    # Python integers do not overflow; the bound keeps later sums within 64 bits.
    if min(shape) < 1 or math.prod(shape) >= 2**56:
        raise ValueError(f"tensor {name} has the impossible shape {list(shape)}")
    if shape[-1] % kind.block_size:
        raise ValueError(
            f"tensor {name}: rows of {shape[-1]} are no multiple of the {kind.block_size} weights of a "
            f"{kind.name} block"
        )
    return _TensorEntry(name, shape, kind, offset)


def _place_tensors(
    entries: list[_TensorEntry], file: Path, start: int, alignment: int, size: int
) -> list[TensorInfo]:
    """Tensors by position, once it is sure that they are aligned, apart and inside the file."""
    infos: list[TensorInfo] = []
    names: set[str] = set()
    end = start
    for entry in sorted(entries, key=lambda e: e.offset):
        if entry.name in names:
            raise ValueError(f"tensor {entry.name} is there twice")
        names.add(entry.name)
        if entry.offset % alignment:
            raise ValueError(
                f"tensor {entry.name} lies at {entry.offset}, not aligned to {alignment}"
            )
        num_bytes = entry.type.num_bytes(entry.shape)
        offset = start + entry.offset
        if offset < end:
            raise ValueError(f"tensor {entry.name} overlaps its neighbour")
        end = offset + num_bytes
        if end > size:
            raise _Truncated(f"tensor {entry.name} ends at byte {end}, the file at {size}")
        dtype = gguf_dtype(entry.type.name)
        infos.append(TensorInfo(entry.name, dtype, entry.shape, file, offset, num_bytes))
    return infos
