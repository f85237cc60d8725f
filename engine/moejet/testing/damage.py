"""Ways to spoil a checkpoint directory, one per fault that loading must name."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor


def truncate(file: Path, num_bytes: int) -> None:
    """Cuts the last `num_bytes` off a file, as an interrupted download does."""
    size = file.stat().st_size
    if not 0 < num_bytes <= size:
        raise ValueError(f"num_bytes={num_bytes} must be within the {size} bytes of {file}")
    with file.open("r+b") as stream:
        stream.truncate(size - num_bytes)


def drop_shard(root: Path, number: int) -> str:
    """Deletes the shard with this 1-based number; returns its file name."""
    (file,) = root.glob(f"model-{number:05d}-of-*.safetensors")
    file.unlink()
    return file.name


def corrupt_header(file: Path) -> None:
    """Overwrites the start of the JSON header with bytes that are not JSON."""
    with file.open("r+b") as stream:
        stream.seek(8)
        stream.write(b"\xff{{{")


def edit_header(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Rewrites a safetensors file with an edited JSON header and the same data."""
    blob = file.read_bytes()
    (length,) = struct.unpack("<Q", blob[:8])
    header = json.loads(blob[8 : 8 + length])
    edit(header)
    encoded = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(encoded)) + encoded + blob[8 + length :])


def edit_tensors(root: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Loads every tensor of model.safetensors, lets `edit` change the dict, and writes it back."""
    from safetensors.torch import load_file, save_file

    file = root / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_json(file: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Rewrites a JSON file through `edit`, which changes the parsed object in place."""
    value = json.loads(file.read_text(encoding="utf-8"))
    edit(value)
    file.write_text(json.dumps(value), encoding="utf-8")
