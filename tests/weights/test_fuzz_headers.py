"""Damaged and hostile headers of both formats: a ValueError or a sound result, in bounded time and memory.

Short and with the same examples every time; MOEJET_FUZZ_EXAMPLES=20000 pytest tests/weights/test_fuzz_headers.py looks
for new ones.
"""

from __future__ import annotations

import json
import os
import random
import struct
import time
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from moejet.config import ModelConfig
from moejet.testing.checkpoints import tiny_checkpoint
from moejet.testing.gguf_files import write_gguf
from moejet.weights.checkpoint import Checkpoint, TensorInfo, read_header
from moejet.weights.gguf import GgufHeader, read_gguf_header
from moejet.weights.gguf_model import GgufCheckpoint, hf_config
from moejet.weights.gguf_tokenizer import gguf_tokenizer

EXAMPLES = int(os.environ.get("MOEJET_FUZZ_EXAMPLES", "150"))
fuzz = settings(
    max_examples=EXAMPLES,
    derandomize="MOEJET_FUZZ_EXAMPLES" not in os.environ,
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
MAX_SECONDS = 5.0  # of CPU time, of which a sound reader takes a fraction of one
# A header's worth of Python objects; the first reads of a file come in pieces of 1 MiB.
MAX_BYTES = 8 << 20

INTEGERS = [0, 1, 2, 3, 8, 9, 31, 32, 255, 256, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**61]
INTEGERS += [2**62, 2**63 - 1, 2**63, 2**64 - 1]
Edit = Callable[[bytes], bytes]


def overwrite(at: int, data: bytes) -> Edit:
    def edit(blob: bytes) -> bytes:
        start = at % (len(blob) + 1)
        return blob[:start] + data + blob[start + len(data) :]

    return edit


def cut(at: int, length: int) -> Edit:
    def edit(blob: bytes) -> bytes:
        start = at % (len(blob) + 1)
        return blob[:start] + blob[start + length :]

    return edit


def flip(at: int, bit: int) -> Edit:
    def edit(blob: bytes) -> bytes:
        if not blob:
            return blob
        start = at % len(blob)
        return blob[:start] + bytes([blob[start] ^ (1 << bit)]) + blob[start + 1 :]

    return edit


def repeat(at: int, length: int, times: int) -> Edit:
    def edit(blob: bytes) -> bytes:
        start = at % (len(blob) + 1)
        return (
            blob[: start + length] + blob[start : start + length] * times + blob[start + length :]
        )

    return edit


POSITIONS = st.one_of(st.integers(0, 200), st.integers(0, 1 << 20))
EDITS = st.one_of(
    st.builds(flip, POSITIONS, st.integers(0, 7)),
    st.builds(
        lambda at, v: overwrite(at, struct.pack("<Q", v)), POSITIONS, st.sampled_from(INTEGERS)
    ),
    st.builds(
        lambda at, v: overwrite(at, struct.pack("<I", v & 0xFFFFFFFF)),
        POSITIONS,
        st.sampled_from(INTEGERS),
    ),
    st.builds(overwrite, POSITIONS, st.binary(min_size=1, max_size=12)),
    st.builds(cut, POSITIONS, st.one_of(st.integers(1, 64), st.just(1 << 30))),
    st.builds(repeat, POSITIONS, st.integers(1, 64), st.integers(1, 8)),
)


def apply(blob: bytes, edits: list[Edit]) -> bytes:
    for edit in edits:
        blob = edit(blob)
    return blob


def bounded(read: Callable[[], Any]) -> Any:
    """What `read` returns, or None if it refuses with ValueError; any other exception passes through."""
    tracemalloc.start()
    start = time.process_time()
    result, message = None, ""
    try:
        result = read()
    except ValueError as error:
        message = str(error)
    took = time.process_time() - start
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(message) < 100_000
    assert took < MAX_SECONDS
    assert peak < MAX_BYTES
    return result


def assert_sound(infos: list[TensorInfo], size: int) -> None:
    """Inside the file, apart, each name once."""
    assert len({info.name for info in infos}) == len(infos)
    placed = sorted(infos, key=lambda i: (i.offset, i.num_bytes))
    for info in placed:
        assert 0 < info.offset <= info.offset + info.num_bytes <= size
    for one, other in pairwise(placed):
        assert one.offset + one.num_bytes <= other.offset


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def gguf_blob(scratch: Path) -> bytes:
    """A whole tiny model, with as little data as possible behind its header."""
    sizes = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32}
    root = tiny_checkpoint(
        scratch / "hf", "deepseek_v3", num_hidden_layers=2, n_routed_experts=4, num_experts_per_tok=1, **sizes
    )  # fmt: skip
    return write_gguf(root, scratch / "model.gguf", "Q8_0").read_bytes()


@pytest.fixture(scope="module")
def model_header(gguf_blob: bytes, scratch: Path) -> GgufHeader:
    (scratch / "sound.gguf").write_bytes(gguf_blob)
    return read_gguf_header(scratch / "sound.gguf")


@pytest.fixture(scope="module")
def small_gguf_blob(scratch: Path) -> bytes:
    """Every value type within few bytes, so that edits hit structure."""
    writer = gguf.GGUFWriter(scratch / "small.gguf", "deepseek2")
    writer.add_uint32("deepseek2.block_count", 2)
    writer.add_array("words", ["one", "two", ""])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_array("nested", [[1], [2, 3]])
    writer.add_bool("flag", True)
    writer.add_float64("number", 0.5)
    writer.add_tensor("token_embd.weight", np.ones((2, 4), np.float32))
    writer.add_tensor("output_norm.weight", np.ones(3, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return (scratch / "small.gguf").read_bytes()


def check_gguf(file: Path, blob: bytes) -> None:
    file.write_bytes(blob)
    header = bounded(lambda: read_gguf_header(file))
    if header is not None:
        assert_sound(header.tensors, len(blob))
        checkpoint = bounded(lambda: GgufCheckpoint.open(file))
        if checkpoint is not None:
            assert all(i.offset + i.num_bytes <= len(blob) for i in checkpoint)
        bounded(lambda: gguf_tokenizer(header.metadata))


@fuzz
@given(edits=st.lists(EDITS, min_size=1, max_size=4))
def test_damaged_small_gguf(small_gguf_blob: bytes, scratch: Path, edits: list[Edit]) -> None:
    check_gguf(scratch / "damaged.gguf", apply(small_gguf_blob, edits))


@fuzz
@given(edits=st.lists(EDITS, min_size=1, max_size=3))
def test_damaged_gguf_models(gguf_blob: bytes, scratch: Path, edits: list[Edit]) -> None:
    check_gguf(scratch / "damaged.gguf", apply(gguf_blob, edits))


def test_every_truncation_of_a_gguf(small_gguf_blob: bytes, scratch: Path) -> None:
    """All lengths: nothing but the padding at the end is dispensable."""
    file = scratch / "short.gguf"
    end = max(i.offset + i.num_bytes for i in read_gguf_header(scratch / "small.gguf").tensors)
    for length in range(len(small_gguf_blob)):
        file.write_bytes(small_gguf_blob[:length])
        if length < end:
            with pytest.raises(ValueError, match=r"truncated|possible"):
                read_gguf_header(file)
        else:
            read_gguf_header(file)


VALUES: dict[str, Any] = {
    "general.architecture": ["deepseek2", "llama", "", 5],
    "tokenizer.ggml.model": ["gpt2", "llama", 1, ["gpt2"]],
    "tokenizer.ggml.pre": ["gpt-2", "kimi-k2", [], "x" * 5000],
}


@fuzz
@given(data=st.data())
def test_metadata_of_any_type(model_header: GgufHeader, data: st.DataObject) -> None:
    """A sound file whose values are not what their keys promise: no TypeError may come of it."""
    metadata = dict(model_header.metadata)
    keys = data.draw(st.lists(st.sampled_from(sorted(metadata)), min_size=1, max_size=3))
    anything = st.one_of(
        st.none(), st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(), st.text(max_size=5),
        st.lists(st.text(max_size=3), max_size=3), st.just(np.zeros(0)), st.just(np.arange(5)),
        st.just([np.arange(2), np.arange(3)]), st.just(np.array([True, False])),
    )  # fmt: skip
    for key in keys:
        metadata[key] = data.draw(st.one_of(anything, st.sampled_from(VALUES.get(key, [0]))))
    tensors = {info.name: info for info in model_header.tensors}
    bounded(lambda: ModelConfig.from_hf(hf_config(metadata, tensors)))
    bounded(lambda: gguf_tokenizer(metadata))


@pytest.fixture(scope="module")
def safetensors_blob() -> bytes:
    tensors = {
        "a": torch.arange(6, dtype=torch.float32).view(2, 3),
        "b": torch.ones(5, dtype=torch.bfloat16),
        "c.d": torch.zeros(1, dtype=torch.int8),
    }
    return bytes(save(tensors, metadata={"format": "pt"}))


def check_safetensors(file: Path, blob: bytes) -> None:
    file.write_bytes(blob)
    infos = bounded(lambda: read_header(file))
    if infos is not None:
        assert_sound([i for i in infos if i.num_bytes], len(blob))


@fuzz
@given(edits=st.lists(EDITS, min_size=1, max_size=4))
def test_damaged_safetensors(safetensors_blob: bytes, scratch: Path, edits: list[Edit]) -> None:
    check_safetensors(scratch / "damaged.safetensors", apply(safetensors_blob, edits))


JSON = st.recursive(
    st.one_of(
        st.none(), st.booleans(), st.sampled_from(INTEGERS), st.floats(), st.text(max_size=4),
        st.sampled_from(["F32", "BF16", "F4", "dtype"]),
    ),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)  # fmt: skip
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.one_of(st.sampled_from(["F32", "BF16", "I8", "F4", "F6_E2M3"]), JSON),
        "shape": st.one_of(st.lists(st.integers(-1, 5), max_size=3), JSON),
        "data_offsets": st.one_of(st.lists(st.integers(-8, 64), min_size=2, max_size=2), JSON),
    },
)


@fuzz
@given(header=st.dictionaries(st.text(max_size=4), st.one_of(ENTRY, JSON), max_size=4))
def test_headers_of_any_json(scratch: Path, header: dict[str, Any]) -> None:
    encoded = json.dumps(header).encode()
    blob = struct.pack("<Q", len(encoded)) + encoded + bytes(64)
    check_safetensors(scratch / "json.safetensors", blob)
    check_safetensors(
        scratch / "json.safetensors", blob[: random.Random(len(blob)).randrange(len(blob))]
    )


HUGE_SHAPE = json.dumps({"a": {"dtype": "F32", "shape": [2**61] * 50_000, "data_offsets": [0, 4]}})


@pytest.mark.parametrize(
    "header",
    [
        HUGE_SHAPE,
        '{"a": ' * 2000 + "1" + "}" * 2000,
        '{"a": {"dtype": "F32", "shape": [' + "9" * 5000 + '], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": ["F32"], "shape": [], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": {}, "shape": [], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": {}, "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [1e3], "data_offsets": [0, 4]}}',
        '{"a": {"dtype": "F32", "shape": [], "data_offsets": [-4, 0]}}',
        '{"a": {"dtype": "F32", "shape": [NaN], "data_offsets": [0, 4]}}',
        '{"__metadata__": [], "a": []}',
        "[]",
        "null",
    ],
)
def test_hostile_safetensors(header: str, tmp_path: Path) -> None:
    encoded = header.encode()
    (tmp_path / "model.safetensors").write_bytes(
        struct.pack("<Q", len(encoded)) + encoded + bytes(4)
    )
    start = time.process_time()
    with pytest.raises(ValueError, match=r"model\.safetensors has a corrupt header") as caught:
        Checkpoint.open(tmp_path)
    assert time.process_time() - start < MAX_SECONDS
    assert len(str(caught.value)) < 2000
