"""For tests of packed weights on disk: tokens of a start, whether they came from the cache, and damage."""

from __future__ import annotations

import logging
from pathlib import Path

from moejet import LLM, SamplingParams
from moejet.weights.packed_header import read_header

PROMPT = list(range(10, 30))
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def tokens(model: Path, **options: object) -> list[int]:
    with LLM(model, **{"packed_cache": "on", "max_context": 64, **options}) as llm:
        return list(llm.generate([PROMPT], GREEDY)[0].outputs[0].token_ids)


def files(directory: Path) -> list[str]:
    return sorted(f.name for f in directory.iterdir()) if directory.is_dir() else []


class Used(logging.Handler):
    """Whether the last load came from the cache, and what was warned about."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())

    def mapped(self) -> bool:
        found = any(line.startswith("mapped packed weights") for line in self.lines)
        self.lines.clear()
        return found


def flip_bit(file: Path, part: float) -> None:
    """In the middle of a blob that lies at this part of the file."""
    with file.open("rb+") as stream:
        blobs = read_header(stream.fileno()).blobs
        blob = blobs[int(part * len(blobs))]
        position = blob.offset + blob.nbytes // 2
        stream.seek(position)
        [byte] = stream.read(1)
        stream.seek(position)
        stream.write(bytes([byte ^ 1]))
