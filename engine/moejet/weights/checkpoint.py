"""Safetensors checkpoints: every header is read and checked before any tensor is.

A safetensors file is an 8-byte little-endian length N, N bytes of JSON `{name: {dtype, shape, data_offsets}}`, then the
data; offsets count from its start. The headers are parsed here and not by the safetensors library because all problems
of all shards are reported together, and because data is read with pread: pages of a memory map would count as resident
memory until the kernel takes them back, and the promise is a peak near the packed size.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moejet.progress import counted
from moejet.weights.spec import TensorSpec

MAX_HEADER_BYTES = 100_000_000
MAX_DIMENSIONS = 16
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_ITEM_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "C64": 8},
    **{"F32": 4, "I32": 4, "U32": 4},
    **{"F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1},
    **{"F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1},
}
_SUB_BYTE_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
TORCH_DTYPES: dict[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_LFS_MARK = b"version https://git-lfs"
_SHARD_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<total>\d{5})\.safetensors")
_LISTED = 10


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `num_bytes` at byte `offset` of `file`."""

    name: str
    dtype: str  # the format's spelling: F32, BF16, F8_E4M3, ..., or GGUF:Q4_K
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int


class Checkpoint:
    """The tensors of one checkpoint directory; holds file positions, not data."""

    described_in = "config.json"

    def __init__(self, root: Path, tensors: dict[str, TensorInfo]):
        self.root = root
        self.tensors = tensors

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Reads and checks all headers of model.safetensors, or of the shards that its index names.

        Raises ValueError with every problem found (missing or truncated shards, broken headers, names that are missing
        or held twice), or saying what the directory holds instead of safetensors.
        """
        root = Path(path)
        expected, files, problems = _list_files(root)
        tensors: dict[str, TensorInfo] = {}
        for file in files:
            try:
                found = read_header(file)
            except ValueError as error:
                problems.append(str(error))
                if expected is not None:
                    # Its tensors are unknown, not missing: do not report them a second time.
                    expected = {n: f for n, f in expected.items() if f != file.name}
                continue
            for info in found:
                other = tensors.setdefault(info.name, info)
                if other is not info:
                    problems.append(
                        f"tensor {info.name} is in both {other.file.name} and {file.name}"
                    )
        if expected is not None:
            problems += _index_problems(expected, tensors)
        if problems:
            raise ValueError(
                f"checkpoint {root} cannot be loaded: {_first(problems, '; ')}; download it again "
                "(hub downloads resume)"
            )
        return cls(root, tensors)

    @property
    def num_bytes(self) -> int:
        return sum(info.num_bytes for info in self.tensors.values())

    @property
    def files(self) -> list[Path]:
        return sorted({info.file for info in self.tensors.values()})

    def __len__(self) -> int:
        return len(self.tensors)

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def __iter__(self) -> Iterator[TensorInfo]:
        """In file order: by file name, then by position."""
        return iter(sorted(self.tensors.values(), key=lambda t: (t.file.name, t.offset)))

    def adapt(self, specs: dict[str, TensorSpec]) -> dict[str, TensorSpec]:
        """Specs in terms of the tensors that this checkpoint has, where it stores something in other parts."""
        return specs

    def read(self, name: str) -> Tensor:
        """Reads one whole F32, F16 or BF16 tensor."""
        info = self.tensors.get(name)
        if info is None:
            raise ValueError(f"tensor {name} is not in checkpoint {self.root}")
        if info.dtype not in TORCH_DTYPES:
            raise ValueError(f"tensor {name} has dtype {info.dtype}; supported: F32, F16, BF16")
        fd = os.open(info.file, os.O_RDONLY)
        try:
            return read_tensor(fd, info.offset, info.shape, TORCH_DTYPES[info.dtype])
        finally:
            os.close(fd)


def read_tensor(
    fd: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype, buffer: Tensor | None = None
) -> Tensor:
    """Reads a contiguous tensor of `shape` at byte `offset`, into the start of a uint8 `buffer` if one is given."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes == 0:
        return torch.empty(shape, dtype=dtype)
    raw = torch.empty(num_bytes, dtype=torch.uint8) if buffer is None else buffer[:num_bytes]
    array: Any = raw.numpy()
    view = memoryview(array)
    done = 0
    while done < len(view):
        # Linux moves at most 2 GiB per call.
        count = os.preadv(fd, [view[done:]], offset + done)
        if count == 0:
            raise ValueError(
                f"file ends {len(view) - done} bytes early: it was changed while it was being read"
            )
        done += count
    return raw.view(dtype).view(shape)


def read_header(file: Path) -> list[TensorInfo]:
    """Parses and checks the header of one safetensors file.

    Raises ValueError (one line, naming the file) if anything in it does not fit the file.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(len(_LFS_MARK))
        if head == _LFS_MARK:
            raise ValueError(f"{file.name} is a git-lfs pointer, not the weights (git lfs pull)")
        if size < 8:
            raise ValueError(f"{file.name} is truncated: {size} bytes, not even a header")
        (length,) = struct.unpack("<Q", head[:8])
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{file.name} has a corrupt header: it claims {length} bytes")
        if length > size - 8:
            raise ValueError(
                f"{file.name} is truncated: expected at least {length + 8} bytes, found {size}"
            )
        stream.seek(8)
        blob = stream.read(length)
    try:
        header = json.loads(blob, object_pairs_hook=_no_duplicates)
        if not isinstance(header, dict):
            raise ValueError("it is not a JSON object")
        header.pop("__metadata__", None)
        infos = [_parse_entry(name, entry, file, 8 + length) for name, entry in header.items()]
        infos.sort(key=lambda t: (t.offset, t.num_bytes))
        end = 8 + length
        for info in infos:
            if info.offset != end:
                kind = "overlaps its neighbour" if info.offset < end else "leaves a gap before it"
                raise ValueError(f"tensor {info.name} {kind}")
            end += info.num_bytes
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else error
        raise ValueError(f"{file.name} has a corrupt header: {reason}") from error
    if size < end:
        raise ValueError(f"{file.name} is truncated: expected {end} bytes, found {size}")
    if size > end:
        raise ValueError(f"{file.name} has {size - end} bytes after the last tensor")
    return infos


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ValueError(f"{key!r} is there twice")
        result[key] = value
    return result


def _parse_entry(name: str, entry: Any, file: Path, data_start: int) -> TensorInfo:
    dtype: Any
    shape: Any
    offsets: Any
    if not isinstance(entry, dict):
        raise ValueError(f"the entry of {name} is not an object")
    keys = ("dtype", "shape", "data_offsets")
    dtype, shape, offsets = (entry.get(key, ()) for key in keys)
    if not isinstance(dtype, str) or len(dtype) > 16:
        raise ValueError(f"tensor {name} has a dtype that is no name")
    if isinstance(shape, list) and len(shape) > MAX_DIMENSIONS:
        # Checked first: the product of a million dimensions would take hours.
        raise ValueError(f"tensor {name} has {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
    if not _is_size_list(shape) or not _is_size_list(offsets) or len(offsets) != 2:
        raise ValueError(
            f"tensor {name} has shape {shape!r:.100} and data_offsets {offsets!r:.100}"
        )
    count = math.prod(shape)
    if dtype in _ITEM_BYTES:
        expected = count * _ITEM_BYTES[dtype]
    elif dtype in _SUB_BYTE_BITS:
        expected = count * _SUB_BYTE_BITS[dtype] // 8
    else:
        raise ValueError(f"tensor {name} has the unknown dtype {dtype!r}")
    begin, end = offsets
    if end - begin != expected:
        raise ValueError(
            f"tensor {name} ({dtype} {list(shape)}) needs {expected} bytes but has {end - begin}"
        )
    return TensorInfo(name, dtype, tuple(shape), file, data_start + begin, expected)


def _is_size_list(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(v, int) and not isinstance(v, bool) and 0 <= v < 2**62 for v in value
    )


def _list_files(root: Path) -> tuple[dict[str, str] | None, list[Path], list[str]]:
    """(tensor -> file name if there is an index, existing files, problems such as missing shards)."""
    if not root.is_dir():
        raise ValueError(f"checkpoint {root} is not a directory")
    index = root / INDEX_NAME
    if index.is_file():
        expected = _read_index(index)
        names = sorted(set(expected.values()))
        missing = [name for name in names if not (root / name).is_file()]
        problems = []
        if missing:
            problems.append(f"missing {counted(len(missing), 'shard')}: {_first(missing)}")
        present = {name: file for name, file in expected.items() if file not in missing}
        return present, [root / name for name in names if name not in missing], problems
    if (root / SINGLE_NAME).is_file():
        return None, [root / SINGLE_NAME], []
    files = sorted(root.glob("*.safetensors"))
    if not files:
        raise ValueError(_nothing_to_load(root))
    return None, files, _incomplete_series(files)


def _read_index(index: Path) -> dict[str, str]:
    try:
        raw = json.loads(index.read_bytes())
        weight_map = raw["weight_map"]
        entries = dict(weight_map.items())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{index} is not a safetensors index ({error!r}): download it again"
        ) from error
    for name, file in entries.items():
        if not isinstance(file, str) or Path(file).name != file or file in ("", ".", ".."):
            raise ValueError(
                f"{index} places {name} in {file!r}: shards must lie in the checkpoint directory"
            )
    return entries


def _index_problems(expected: dict[str, str], tensors: dict[str, TensorInfo]) -> list[str]:
    absent: dict[str, list[str]] = {}
    for name, file in expected.items():
        info = tensors.get(name)
        if info is None or info.file.name != file:
            absent.setdefault(file, []).append(name)
    return [
        f"{file} lacks {counted(len(names), 'tensor')} that the index places there: {_first(names)}"
        for file, names in absent.items()
    ]


def _incomplete_series(files: list[Path]) -> list[str]:
    """Without an index, shard names tell how many there must be."""
    problems = []
    series: dict[tuple[str, int], set[int]] = {}
    for file in files:
        match = _SHARD_NAME.fullmatch(file.name)
        if match:
            key = (match["stem"], int(match["total"]))
            series.setdefault(key, set()).add(int(match["number"]))
    for (stem, total), numbers in series.items():
        missing = [
            f"{stem}-{n:05d}-of-{total:05d}.safetensors"
            for n in range(1, total + 1)
            if n not in numbers
        ]
        if missing:
            problems.append(f"missing {counted(len(missing), 'shard')}: {_first(missing)}")
    return problems


def _nothing_to_load(root: Path) -> str:
    supported = "supported: model.safetensors, or shards with model.safetensors.index.json"
    if any(root.glob("*.gguf")):
        return f"checkpoint {root} holds GGUF files: give the one to load; here {supported}"
    if any(f.suffix in (".bin", ".pt", ".pth") for f in root.iterdir()):
        return (
            f"checkpoint {root} holds pickled PyTorch weights only, which can run code and are never "
            "read: convert it to safetensors (transformers: from_pretrained, then save_pretrained)"
        )
    return f"checkpoint {root} holds no weights; {supported}"


def _first(items: list[str], separator: str = ", ") -> str:
    more = f"{separator}and {len(items) - _LISTED} more" if len(items) > _LISTED else ""
    return separator.join(items[:_LISTED]) + more
