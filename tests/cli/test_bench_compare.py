"""`moejet bench compare`: which lines belong together, what counts as noise, what is wrong with a file."""

import json
from pathlib import Path

import pytest

from moejet.cli.bench_compare import compare
from moejet.cli.bench_kinds import KINDS
from moejet.cli.results import read_results

RESULTS = Path(__file__).parents[2] / "bench/results"
MACHINE = {"cpu": "X", "allowed_cpus": 2, "kernel": "6", "versions": {"moejet": "1"}}


def moe(ms, *, tokens=1, spread=0.02, read=20.0, peak=0.8, **other):
    sizes = {"hidden_size": 8, "intermediate_size": 4, "num_experts": 4, "num_experts_per_tok": 2}
    row = {"bench": "moe", **MACHINE, "shape": "s", **sizes, "format": "int8", "isa": "avx2"}
    row |= {
        "arithmetic": "bf16",
        "tokens": tokens,
        "threads": 2,
        "dirty": False,
        "commit": "c" * 40,
    }
    row |= {"ms_p50": ms, "ms_p20": ms * (1 - spread), "ms_p80": ms * (1 + spread)}
    return row | {"read_gbps": read, "ceiling_tflops": peak, **other}


def model(rate, samples=(1.0, 1.01, 1.02), **other):
    row = {"bench": "model", **MACHINE, "model": "m", "test": "tg8", "threads": 2}
    return row | {"tokens_per_s": rate, "samples_s": list(samples), "read_gbps": 20.0, **other}


@pytest.mark.parametrize(
    ("before", "after", "ratio", "verdict"),
    [
        (moe(10), moe(10.2), 0.98, "same"),
        (moe(10), moe(12), 0.83, "worse"),
        (moe(10), moe(8), 1.25, "better"),
        (moe(10), moe(12, spread=0.2), 0.83, "same"),
        # Memory was as much slower as the layer; the other way round it explains nothing.
        (moe(10), moe(12, read=16.0), 0.83, "same"),
        (moe(10), moe(12, read=25.0), 0.83, "worse"),
        (moe(10), moe(12, peak=0.66), 0.83, "same"),
        (model(50), model(40), 0.8, "worse"),
        (model(50), model(50.5), 1.01, "same"),
        (model(50), model(40, [1.0]), 0.8, "?"),
    ],
)
def test_verdicts(before, after, ratio, verdict):
    [found], _ = compare([before], [after])
    assert found.ratio == pytest.approx(ratio, abs=0.005)
    assert found.verdict == verdict


def test_lines_of_one_case_are_repetitions():
    [found], _ = compare([moe(10), moe(12), moe(14)], [moe(12)])
    assert (found.a, found.b, found.verdict) == (12, 12, "same")
    assert found.noise == pytest.approx(2 / 12 + 0.02)


def test_what_is_in_one_file_only_is_said():
    found, warnings = compare(
        [moe(1), moe(2, tokens=4), model(3)], [moe(1, format="fp8"), moe(2, tokens=4)], "a", "b"
    )
    assert [c.case["tokens"] for c in found] == [4]
    text = "\n".join(warnings)
    assert "only in a: moe s num_experts=4 int8 avx2 bf16 tokens=1 threads=2" in text
    assert "only in b: moe s num_experts=4 fp8" in text
    assert "b has no figures of 'model'" in text


def test_other_machines_versions_commits_and_ceilings_are_said():
    other = {"cpu": "Y", "versions": {"moejet": "2"}, "dirty": True}
    [found], warnings = compare([moe(10)], [moe(10, read=30.0, peak=0.5, **other)])
    assert found.ratio == 1.0
    text = "\n".join(warnings)
    for words in (
        "machines differ: X 2 | Y 2",
        "versions differ",
        "B was measured with local changes to cccccccccc",
        "memory reads differ in 1 of 1 cases: at most 20 | 30 GB/s",
        "arithmetic ceilings differ in 1 of 1 cases: at most 0.8 | 0.5 T/s",
    ):
        assert words in text
    assert compare([moe(10)], [moe(10)])[1] == []


def test_several_machines_in_a_file_are_kept_apart():
    found, _ = compare([moe(10), moe(20, cpu="Y")], [moe(10, cpu="Y"), moe(10)])
    assert {c.case["cpu"]: c.ratio for c in found} == {"X": 1.0, "Y": 2.0}


def test_a_key_that_older_lines_do_not_have():
    old = moe(10)
    del old["arithmetic"]
    [found], warnings = compare([old], [moe(10)])
    assert "arithmetic" not in found.case
    assert "only B says 'arithmetic': taken for the same" in warnings


def test_lines_that_hold_several_figures_and_lines_without_one():
    entries = [
        {"name": "dram_read", "threads": 1, "value": 20.0, "low": 19.0, "high": 21.0},
        {"name": "amx_int8", "threads": 1, "value": None, "low": None, "high": None},
    ]
    line = {"bench": "ceilings", **MACHINE, "memory_read_gbps": 1.0, "ceilings": entries}
    faster = [{**entries[0], "value": 30.0, "low": 29.0, "high": 31.0}]
    [found], warnings = compare(
        [line, {"bench": "soak"}], [{**line, "memory_read_gbps": 9.0, "ceilings": faster}]
    )
    assert (found.case["name"], found.verdict) == ("dram_read", "better")
    assert "lines of 'soak' are left out" in " ".join(warnings)
    wrong = {**moe(1), "ms_p50": None}  # a wrong answer is not timed
    assert len(compare([wrong, moe(1, tokens=2)], [moe(1), moe(1, tokens=2)])[0]) == 1


@pytest.fixture
def file(tmp_path):
    def write(name, *rows):
        path = tmp_path / name
        path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
        return str(path)

    return write


def test_command(moejet, file):
    a, b = file("a", moe(10), moe(10, tokens=4)), file("b", moe(10), moe(20, tokens=4))
    result = moejet("bench", "compare", a, b)
    assert result.code == 0
    cells = [[c.strip() for c in line.split("|")[1:-1]] for line in result.out.splitlines()]
    assert [row[0] for row in cells[2:]] == ["moe tokens=1", "moe tokens=4"]
    assert cells[3][1:] == ["ms", "10", "20", "0.500", "4.0%", "20.0 → 20.0", "worse"]
    assert "all lines of moe s num_experts=4 int8 avx2 bf16 threads=2" in result.err

    result = moejet("bench", "compare", a, b, "--fail-below", "0.9", "-o", "json")
    assert result.code == 1
    found = json.loads(result.out)
    assert [c["verdict"] for c in found["comparisons"]] == ["same", "worse"]
    assert [c["tokens"] for c in found["failed"]] == [4]
    assert "below 0.9: moe s" in result.err
    assert moejet("bench", "compare", a, b, "--fail-below", "0.4").code == 0
    assert moejet("bench", "compare", b, a, "--fail-below", "0.9").code == 0


def test_what_is_wrong_with_a_file(moejet, file, tmp_path):
    good = file("good", moe(10))
    for rows, message in (
        ([], "is empty"),
        ([moe(1), '{"bench": "moe", "ms_'], "line 2 is not JSON"),
        (["[1, 2]"], 'result 1 is not a result: 1 has to be an object with the key "bench"'),
        ([json.dumps({"kind": "moe"})], "result 1 is not a result"),
        ([{"bench": "moe"}], "the line of 'moe' from None is not whole: no 'ms_p50'"),
        ([moe(1, ms_p20="x")], "ms_p20='x' must be a positive number"),
        ([moe(-1)], "ms_p20=-0.98 must be a positive number"),
        ([moe(float("nan"))], "=nan must be a positive number"),
        ([model(5, samples_s=3)], "is not whole"),
        ([{"bench": "ceilings", "ceilings": [3]}], "is not whole"),
        ([{"bench": "reasoning"}], "is not whole: no 'rows'"),
        ([model(5)], "have no case in common"),
    ):
        result = moejet("bench", "compare", good, file("bad", *rows))
        assert result.code == 2, rows
        assert message in result.err, result.err
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    assert (
        "is not a file of result lines"
        in moejet("bench", "compare", good, str(tmp_path / "binary")).err
    )
    assert moejet("bench", "compare", good, str(tmp_path / "absent")).code == 1
    assert "name two" in moejet("bench", "compare", good).err
    assert "--fail-below='0'" in moejet("bench", "compare", good, good, "--fail-below", "0").err


def test_results_as_a_list(file):
    assert read_results(file("list", json.dumps([moe(1), moe(2)], indent=1))) == [moe(1), moe(2)]


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.name)
def test_committed_results_can_be_read_and_are_the_same_as_themselves(path):
    rows = read_results(path)
    if any(row["bench"] in KINDS for row in rows):
        found, _ = compare(rows, rows)
        assert {(c.ratio, c.verdict) for c in found} <= {(1.0, "same"), (1.0, "?")}
