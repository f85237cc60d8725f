"""`moejet bench gpu`."""

import json

import pytest
import torch

from moejet.cli.main import main
from moejet.testing.gpu_bench.case import KERNELS, Case, difference


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_says_that_there_is_no_gpu(capsys):
    assert main(["bench", "gpu"]) == 2
    assert "needs a CUDA device" in capsys.readouterr().err


def test_unknown_kernel_is_named(capsys):
    assert main(["bench", "gpu", "--kernel", "rms_norm,nothing"]) == 2
    assert "holds 'nothing', which is not one of rms_norm" in capsys.readouterr().err


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_has_cases(kernel):
    """Counting bytes and operations needs no GPU."""
    pytest.importorskip("triton")
    from moejet.kernels.card import CARDS
    from moejet.testing.gpu_bench.case import cases_of

    for card in (CARDS[86], CARDS[90]):
        cases = cases_of(kernel, card)
        assert len({case.name for case in cases}) == len(cases) > 0
        assert all(isinstance(case, Case) and case.bytes > 0 for case in cases)


def test_difference_is_relative_and_never_passes_nan():
    ones = torch.ones(4)
    assert difference(ones * 1.01, ones) == pytest.approx(0.01, rel=1e-4)
    assert not difference(ones * float("nan"), ones) <= 1


@pytest.mark.gpu
def test_measures_on_the_gpu(tmp_path, capsys):
    lines = tmp_path / "gpu.jsonl"
    assert main(["bench", "gpu", "--kernel", "rms_norm", "--json", str(lines)]) == 0
    rows = [json.loads(line) for line in lines.read_text().splitlines()]
    assert len(rows) == 3
    assert all(0 < row["of_copy"] < 2 and row["ms_p50"] > 0 for row in rows)
    assert "rms_norm" in capsys.readouterr().out
