"""moejet.weights.gguf: genuine files are read whole; what a header claims wrongly is named and not believed."""

from __future__ import annotations

import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType

from moejet.weights.gguf import (
    MAX_HEADER_BYTES,
    MAX_STRINGS,
    GgufFiles,
    list_shards,
    read_gguf_header,
)

VALUES: dict[str, tuple[Any, GGUFValueType]] = {
    "a.u8": (255, GGUFValueType.UINT8),
    "a.i8": (-128, GGUFValueType.INT8),
    "a.u16": (65535, GGUFValueType.UINT16),
    "a.i16": (-32768, GGUFValueType.INT16),
    "a.u32": (2**32 - 1, GGUFValueType.UINT32),
    "a.i32": (-(2**31), GGUFValueType.INT32),
    "a.u64": (2**64 - 1, GGUFValueType.UINT64),
    "a.i64": (-(2**63), GGUFValueType.INT64),
    "a.f32": (0.5, GGUFValueType.FLOAT32),
    "a.f64": (1e300, GGUFValueType.FLOAT64),
    "a.bool": (True, GGUFValueType.BOOL),
    "a.text": ("Grüße 你好 🙂", GGUFValueType.STRING),
    "a.empty": ("", GGUFValueType.STRING),
}


def write(path: Path, tensors: dict[str, np.ndarray[Any, Any]], **options: Any) -> Path:
    writer = gguf.GGUFWriter(path, "deepseek2", **options)
    for key, (value, kind) in VALUES.items():
        writer.add_key_value(key, value, kind)
    writer.add_array("b.numbers", [1, -2, 3])
    writer.add_array("b.floats", [0.25, -1.0])
    writer.add_array("b.flags", [True, False])
    writer.add_array("b.words", ["", "one", "zwölf"])
    writer.add_array("b.nested", [[1, 2], [3]])
    for name, data in tensors.items():
        if data.dtype == np.uint8:
            writer.add_tensor(name, data, raw_dtype=GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def some_tensors() -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {
        "one": rng.standard_normal(5, np.float32),
        "two": rng.standard_normal((3, 7), np.float32),
        "half": rng.standard_normal((2, 3, 4), np.float32).astype(np.float16),
        "eight": gguf.quants.quantize(
            rng.standard_normal((4, 6, 64), np.float32), GGMLQuantizationType.Q8_0
        ),
    }


def test_a_genuine_file(tmp_path: Path) -> None:
    tensors = some_tensors()
    file = write(tmp_path / "a.gguf", tensors)
    header = read_gguf_header(file)
    assert header.version == 3
    assert header.metadata["general.architecture"] == "deepseek2"
    for key, (value, _) in VALUES.items():
        assert header.metadata[key] == value
        assert type(header.metadata[key]) is type(value)
    assert header.metadata["b.numbers"].tolist() == [1, -2, 3]
    assert header.metadata["b.floats"].tolist() == [0.25, -1.0]
    assert header.metadata["b.flags"].tolist() == [True, False]
    assert header.metadata["b.words"] == ["", "one", "zwölf"]
    assert [a.tolist() for a in header.metadata["b.nested"]] == [[1, 2], [3]]
    found = {info.name: info for info in header.tensors}
    assert {n: (i.dtype, i.shape) for n, i in found.items()} == {
        "one": ("F32", (5,)),
        "two": ("F32", (3, 7)),
        "half": ("F16", (2, 3, 4)),
        "eight": ("GGUF:Q8_0", (4, 6, 64)),
    }
    blob = file.read_bytes()
    for name, info in found.items():
        assert info.file == file
        assert blob[info.offset : info.offset + info.num_bytes] == tensors[name].tobytes()


def test_alignment_of_the_file(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "deepseek2")
    writer.add_custom_alignment(4096)
    writer.add_tensor("x", np.arange(5, dtype=np.float32))
    writer.add_tensor("y", np.arange(3, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    header = read_gguf_header(tmp_path / "a.gguf")
    assert [info.offset for info in header.tensors] == [4096, 8192]


def test_shards(tmp_path: Path) -> None:
    tensors = some_tensors()
    write(tmp_path / "m.gguf", tensors, split_max_tensors=2)
    names = [f"m-0000{n}-of-00002.gguf" for n in (1, 2)]
    assert sorted(f.name for f in tmp_path.iterdir()) == names
    for name in names:
        files = GgufFiles.open(tmp_path / name)
        assert [f.name for f in files.files] == names
        assert set(files.tensors) == set(tensors)
        assert files.metadata["b.words"] == ["", "one", "zwölf"]
    shutil.copy(tmp_path / names[1], tmp_path / "alone.gguf")
    with pytest.raises(ValueError, match=r"split\.count=2, but there are 1 files"):
        GgufFiles.open(tmp_path / "alone.gguf")
    shutil.copy(tmp_path / names[0], tmp_path / names[1])
    with pytest.raises(ValueError, match="tensor one is in both"):
        GgufFiles.open(tmp_path / names[0])
    (tmp_path / names[1]).unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of its 2 shards: m-00002-of-00002\.gguf"):
        GgufFiles.open(tmp_path / names[0])
    with pytest.raises(ValueError, match="shard 3 of 2"):
        list_shards(tmp_path / "m-00003-of-00002.gguf")


def test_swapped_and_incomplete_shards(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", some_tensors(), split_max_tensors=2)
    one, two = (tmp_path / f"m-0000{n}-of-00002.gguf" for n in (1, 2))
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    with pytest.raises(ValueError, match=r"m-00001-of-00002\.gguf says split\.no=1, not 0"):
        GgufFiles.open(one)
    one.write_bytes(first)
    key = b"split.tensors.count" + struct.pack("<I", 5)
    two.write_bytes(second)
    one.write_bytes(first.replace(key + struct.pack("<i", 4), key + struct.pack("<i", 5)))
    with pytest.raises(ValueError, match=r"hold 4 tensors, split\.tensors\.count=5"):
        GgufFiles.open(one)


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str | bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
    return text(name) + dims + struct.pack("<IQ", kind, offset)


def build(
    entries: list[bytes] = [],  # noqa: B006
    tensors: list[bytes] = [],  # noqa: B006
    *,
    version: int = 3,
    counts: tuple[int, int] | None = None,
    data: int = 0,
) -> bytes:
    num_tensors, num_entries = counts or (len(tensors), len(entries))
    head = b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_entries)
    blob = head + b"".join(entries) + b"".join(tensors)
    return blob + bytes(-len(blob) % 32) + bytes(data)


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


NESTED = b"".join(array(9, 1) for _ in range(2000)) + array(0, 0)
BAD: list[tuple[str, bytes, str]] = [
    ("empty", b"", "truncated"),
    ("short", b"GGUF\3", "truncated"),
    ("magic", b"GGML" + bytes(60), "starts with b'GGML'"),
    ("lfs", b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    ("version 1", build(version=1), "version 1 is not supported; supported: 2 and 3"),
    ("version 4", build(version=4), "version 4 is not supported"),
    ("big-endian", b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    ("tensors", build(counts=(2**63, 0)), "9223372036854775808 tensors; possible: 0"),
    ("entries", build(counts=(0, 2**32)), "4294967296 metadata entries; possible: 0"),
    ("tensors missing", build(counts=(1, 0), data=64), "a tensor name is empty"),
    ("key length", build([struct.pack("<Q", 2**60)], data=64), "1152921504606846976 bytes"),
    ("key newline", build([entry("a\nb", 4, bytes(4))]), "key is empty or not printable: 'a.nb'"),
    ("key UTF-8", build([entry(b"\xff\xfe", 4, bytes(4))]), "a metadata key is not UTF-8"),
    ("value UTF-8", build([entry("k", 8, text(b"\x80"))]), "k is not UTF-8"),
    ("item UTF-8", build([entry("k", 9, array(8, 1, text(b"\xc3")))]), "k holds a string that is not"),
    ("twice", build([entry("k", 4, bytes(4))] * 2), "'k' is there twice"),
    ("value type", build([entry("k", 13, bytes(4))]), "unknown value type 13"),
    ("item type", build([entry("k", 9, array(99, 1, bytes(8)))]), "unknown item type 99"),
    ("bool", build([entry("k", 7, b"\2")]), "neither 0 nor 1"),
    ("bools", build([entry("k", 9, array(7, 2, b"\1\7"))]), "neither 0 nor 1"),
    ("text length", build([entry("k", 8, struct.pack("<Q", 2**63))]), "k claims"),
    ("text end", build([entry("k", 8, struct.pack("<Q", 9999))]), "truncated: k needs 9999"),
    ("array count", build([entry("k", 9, array(12, 2**61))]), "2305843009213693952 items of k"),
    ("array of texts", build([entry("k", 9, array(8, 10**9))]), "1000000000 strings of k"),
    ("text in array", build([entry("k", 9, array(8, 2, text("a") + b"\xff" * 8))]), "truncated: k needs"),
    ("nesting", build([entry("k", 9, NESTED)]), "nested more than 4 deep"),
    ("alignment 0", build([entry("general.alignment", 4, bytes(4))]), "general.alignment=0 must"),
    ("alignment 48", build([entry("general.alignment", 4, b"\x30\0\0\0")]), "general.alignment=48 must"),
    ("alignment type", build([entry("general.alignment", 8, text("32"))]), "general.alignment='32' must"),
    ("dimensions", build([], [tensor("t", (1,) * 5, 0, 0)]), "t has 5 dimensions"),
    ("no dimensions", build([], [tensor("t", (), 0, 0)], data=8), "t has 0 dimensions"),
    ("product", build([], [tensor("t", (2**32, 2**32), 0, 0)]), "impossible shape"),
    ("zero", build([], [tensor("t", (4, 0), 0, 0)]), "impossible shape"),
    ("ggml type", build([], [tensor("t", (4,), 31, 0)]), "tensor t has the unknown ggml type 31"),
    ("block", build([], [tensor("t", (4, 48), 8, 0)], data=999), "rows of 48 are no multiple of the 32"),
    ("offset", build([], [tensor("t", (4,), 0, 2**63)]), "truncated: tensor t ends at"),
    ("unaligned", build([], [tensor("t", (4,), 0, 4)], data=64), "t lies at 4, not aligned to 32"),
    ("overlap", build([], [tensor("a", (9,), 0, 0), tensor("b", (4,), 0, 32)], data=64), "b overlaps"),
    ("same name", build([], [tensor("a", (4,), 0, 0), tensor("a", (4,), 0, 32)], data=64), "a is there"),
    ("data", build([], [tensor("a", (9,), 0, 0)], data=35), "truncated: tensor a ends at"),
]  # fmt: skip


@pytest.mark.parametrize(("blob", "message"), [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_wrong_headers_are_named(tmp_path: Path, blob: bytes, message: str) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(blob)
    with pytest.raises(ValueError, match=rf"bad\.gguf .*({message})") as caught:
        read_gguf_header(file)
    assert "\n" not in str(caught.value)


def test_the_builder_builds_what_is_accepted(tmp_path: Path) -> None:
    file = tmp_path / "good.gguf"
    blob = build([entry("k", 4, b"\7\0\0\0")], [tensor("a", (2, 4), 0, 0)], version=2, data=32)
    file.write_bytes(blob)
    header = read_gguf_header(file)
    assert (header.version, header.metadata, header.tensors[0].shape) == (2, {"k": 7}, (2, 4))


@pytest.mark.parametrize(
    "make",
    [
        lambda: build([entry("k", 9, array(8, MAX_STRINGS + 1))]),
        lambda: build([entry("k", 9, array(8, 2**34))]),
        lambda: build([entry("k", 9, array(0, 2**36))]),
        lambda: build([entry("k", 8, struct.pack("<Q", 2**35))]),
        lambda: build([entry("k", 9, array(9, 2**33))]),
        lambda: build(counts=(2**33, 0)),
        lambda: build(counts=(0, 2**33)),
        lambda: build(counts=(2**17, 2**16)),
    ],
)
def test_claims_that_a_huge_sparse_file_could_hold(
    tmp_path: Path, make: Callable[[], bytes]
) -> None:
    """The file's size alone bounds nothing when it is 64 GiB of zeros."""
    file = tmp_path / "sparse.gguf"
    file.write_bytes(make())
    with file.open("r+b") as stream:
        stream.truncate(64 << 30)
    start = time.process_time()
    with pytest.raises(ValueError, match=r"sparse\.gguf"):
        read_gguf_header(file)
    assert (
        time.process_time() - start < 20.0
    )  # of the CPU, whatever else runs; a claim followed takes hours


def test_limits_are_above_real_headers() -> None:
    assert MAX_STRINGS > 8 * 256_000
    assert MAX_HEADER_BYTES > 4 * 20_000_000


def test_a_large_vocabulary_is_read_fast(tmp_path: Path) -> None:
    tokens = [f"tok{i}Ġ{i * 7919}" for i in range(160_000)]
    merges = [f"a{i} b{i}" for i in range(160_000)]
    items = b"".join(map(text, tokens))
    more = b"".join(map(text, merges))
    file = tmp_path / "large.gguf"
    file.write_bytes(
        build(
            [
                entry("tokenizer.ggml.tokens", 9, array(8, len(tokens), items)),
                entry(
                    "tokenizer.ggml.token_type", 9, array(5, len(tokens), bytes(4 * len(tokens)))
                ),
                entry("tokenizer.ggml.merges", 9, array(8, len(merges), more)),
            ]
        )
    )
    start = time.process_time()
    metadata = read_gguf_header(file).metadata
    assert time.process_time() - start < 2.0  # about 0.15 s; the rest is for slow machines
    assert metadata["tokenizer.ggml.tokens"] == tokens
    assert metadata["tokenizer.ggml.merges"] == merges
