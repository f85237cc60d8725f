"""`--plot` of the benchmarks: what is drawn, what is wrong before anything is measured."""

import sys

import pytest

from moejet.cli import bench, plot

ROOFLINE = {"ms_p50": 1.0, "bytes": 1000, "operations": 4000, "tflops": 0.1, "read_gbps": 20.0}
LAYER = {"bench": "moe", "shape": "s", "isa": "avx2", "threads": 2, "cpu": "X", "format": "int8"}
LAYER |= {**ROOFLINE, "ceiling": "avx2_int8", "ceiling_tflops": 0.4, "tokens": 1}
KERNEL = {"bench": "gpu", "kernel": "norm", "case": "8 x 7168", "ms_p50": 1.0, "bytes": 1000}
KERNEL |= {"flops": 10, "tflops": 0.1, "copy_gbps": 3000.0, "matmul_tflops": 700.0, "gpu": "G"}


def model(test, depth=0, **other):
    row = {
        "bench": "model",
        "test": test,
        "depth": depth,
        "model": "m",
        "format": "int8",
        "cpu": "X",
    }
    row |= {"threads": 2, "isa": "avx2", "num_tokens": 8, "batch": 1, "tokens_per_s": 5.0}
    return row | {"tokens_per_s_sd": 0.5, **other}


def test_points_of_a_roofline():
    wrong = {**LAYER, "ms_p50": None}
    layer, other, kernel = plot.roofline_points(
        [LAYER, {**LAYER, "threads": 1}, wrong, KERNEL][:3]
    ) + (plot.roofline_points([KERNEL]))
    assert layer["intensity"] == 4.0
    assert (layer["series"], other["series"]) == ("int8 2", "int8 1")
    assert (layer["label"], layer["peak"], layer["ceiling"]) == ("1", 0.4, "avx2_int8")
    assert (kernel["series"], kernel["read_gbps"], kernel["peak"]) == ("norm", 3000.0, 700.0)


def test_points_over_depth_are_named_by_what_differs():
    rows = [model("pp8"), model("tg8", 64), model("tg8@xb4", 64, batch=4)]
    prompt, one, four = plot.depth_points(rows)
    assert (prompt["kind"], prompt["series"], prompt["depth"]) == ("pp", "int8", 0)
    assert (one["series"], four["series"]) == ("int8, batch 1", "int8, batch 4")
    assert plot.depth_points([model("pp8"), model("pp8", model="n", tokens_per_s_sd=None)])[1] == {
        "kind": "pp",
        "series": "n",
        "depth": 0,
        "tokens_per_s": 5.0,
        "sd": 0.0,
    }


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([LAYER, {**LAYER, "tokens": 4}], ["memory reads 20.0 GB/s", "avx2_int8 0.40", "s on X"]),
        ([{**KERNEL, "matmul_tflops": None}], ["norm", "on G"]),
        (
            [model("pp8"), model("tg8"), model("tg8", 64)],
            ["prefill", "decode", "m on X, 2 threads"],
        ),
    ],
)
def test_pictures(tmp_path, rows, words):
    pytest.importorskip("matplotlib")
    plot.save_rows(rows, tmp_path / "x.svg")
    text = (tmp_path / "x.svg").read_text()
    for word in words:
        assert word in text


def test_a_picture_carries_what_it_is_of(tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "x.png"
    plot.save_roofline(plot.roofline_points([LAYER]), path, "title", description="data 123")
    assert b"data 123" in path.read_bytes()


def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no case gave a right answer"):
        plot.save_rows([{**LAYER, "ms_p50": None}], tmp_path / "x.png")


def test_wrong_paths_are_named_before_anything_is_measured(moejet, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "_measure_all", lambda *_: pytest.fail("it measured"))
    for arguments, message in (
        (["--plot", "x.bmp"], "--plot x.bmp must end with one of .png, .pdf, .svg"),
        (["--plot", str(tmp_path / "none/x.png")], "needs the directory"),
    ):
        result = moejet("bench", *arguments)
        assert (result.code, message in result.err) == (2, True), result.err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for command in (["bench"], ["bench", "moe"]):
        result = moejet(*command, "--plot", str(tmp_path / "x.png"))
        assert result.code == 1
        assert "pip install 'moejet[plot]'" in result.err
