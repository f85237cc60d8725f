"""`moejet bench ceilings`: the command around moejet.ceilings."""

import json

import pytest

ARGUMENTS = ("bench", "ceilings", "--seconds", "0.01", "--megabytes", "8", "-t", "1")


def test_json_is_one_line_with_everything(moejet):
    result = moejet(*ARGUMENTS, "--json", "-")
    assert result.code == 0, result.err
    assert result.out.count("\n") == 1
    facts = json.loads(result.out)
    assert facts["bench"] == "ceilings"
    assert facts["threads"] == 1
    assert facts["buffer_bytes"] == 8 << 20
    for key in ("commit", "dirty", "cpu", "versions", "time", "last_level_cache_bytes"):
        assert key in facts
    for ceiling in facts["ceilings"]:
        assert (ceiling["value"] is None) == bool(ceiling["reason"])


def test_table_and_reasons(moejet):
    result = moejet(*ARGUMENTS)
    assert result.code == 0, result.err
    assert "| dram_read" in result.out
    assert len({len(line) for line in result.out.splitlines()}) == 1
    assert "8 MiB read" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--seconds", "0"), "--seconds='0' must be a number above 0"),
        (("--megabytes", "0"), "--megabytes='0' must be a whole number of at least 1"),
        (("-t", "100000"), "--threads=100000"),
        (("--jsn",), "did you mean '--json'?"),
    ],
)
def test_bad_options(moejet, arguments, message):
    result = moejet("bench", "ceilings", *arguments)
    assert result.code == 2
    assert message in result.err


def test_second_words(moejet):
    result = moejet("bench", "cielings")
    assert result.code == 2
    assert "unexpected argument 'cielings'; did you mean 'ceilings'?" in result.err
    assert "moejet bench ceilings" in moejet("bench", "--help").out
    assert moejet("bench", "ceilings", "--help").code == 0
