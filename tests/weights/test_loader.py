"""moejet.weights.loader: names matched before data is read, data delivered whole and in order, memory bounded."""

from __future__ import annotations

import io
import logging
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moejet.progress import ProgressLine
from moejet.testing import damage
from moejet.testing.checkpoints import tiny_checkpoint, write_safetensors
from moejet.weights.checkpoint import Checkpoint
from moejet.weights.loader import LoadReport, load_weights, on_load_progress
from moejet.weights.progress import LoadProgress
from moejet.weights.spec import TensorSpec
from moejet.weights.stored import StoredWeight


class Target:
    """Stands for a model: wants every tensor of a published checkpoint and keeps what it gets."""

    def __init__(self, root: Path):
        self.got: dict[str, Tensor] = {}
        self.order: list[str] = []
        self.specs = {info.name: self.spec(info.name, info.shape) for info in Checkpoint.open(root)}

    def spec(self, name: str, shape: tuple[int, ...], *, optional: bool = False) -> TensorSpec:
        def load(tensor: Tensor) -> None:
            assert name not in self.got, "loaded twice"
            assert tensor.is_contiguous()
            self.got[name] = tensor.clone()
            self.order.append(name)

        return TensorSpec(shape, load, optional)

    def load(self, root: Path, **kwargs: object) -> LoadReport:
        return load_weights(Checkpoint.open(root), self.specs, **kwargs)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(
        tmp_path_factory.mktemp("plain"), "moonlight", num_hidden_layers=2, num_shards=3
    )


def make(path: Path, **kwargs: object) -> Path:
    return tiny_checkpoint(path, "moonlight", num_hidden_layers=2, **kwargs)  # type: ignore[arg-type]


def test_loads_every_tensor_in_file_order(plain: Path) -> None:
    target = Target(plain)
    seen: list[LoadProgress] = []
    with on_load_progress(seen.append):
        report = target.load(plain, show_progress=False)
    checkpoint = Checkpoint.open(plain)
    assert target.order == [info.name for info in checkpoint]
    assert report.num_tensors == len(checkpoint) == len(seen)
    assert report.num_bytes == checkpoint.num_bytes == seen[-1].bytes_done == seen[-1].bytes_total
    assert report.ignored == report.absent == ()
    for name, tensor in target.got.items():
        assert torch.equal(tensor, checkpoint.read(name))


@pytest.mark.parametrize("prefix", ["language_model.", "model.language_model."])
def test_multimodal_names(plain: Path, tmp_path: Path, prefix: str) -> None:
    make(tmp_path)

    def rename(tensors: dict[str, Tensor]) -> None:
        for name in list(tensors):
            # The second form is transformers' own: the prefix replaces "model.", lm_head stays.
            nested = name.removeprefix("model.") if prefix.startswith("model.") else name
            is_head = nested == "lm_head.weight" and prefix.startswith("model.")
            tensors[nested if is_head else prefix + nested] = tensors.pop(name)
        tensors["vision_tower.encoder.weight"] = torch.ones(3)
        tensors["mm_projector.proj.weight"] = torch.ones(3)
        tensors["model.visual.patch.weight"] = torch.ones(3)

    damage.edit_tensors(tmp_path, rename)
    target = Target(plain)
    report = target.load(tmp_path)
    assert len(report.ignored) == 3
    assert set(target.got) == set(target.specs)


def test_stacked_experts(plain: Path, tmp_path: Path) -> None:
    make(tmp_path, fused_experts=True)
    names = set(Checkpoint.open(tmp_path).tensors)
    assert "model.layers.1.mlp.experts.gate_up_proj" in names
    target, reference = Target(plain), Checkpoint.open(plain)
    report = target.load(tmp_path)
    assert report.num_tensors == len(reference)
    for name, tensor in target.got.items():
        assert torch.equal(tensor, reference.read(name)), name

    def edit(tensors: dict[str, Tensor]) -> None:
        name = "model.layers.1.mlp.experts.gate_up_proj"
        tensors[name] = tensors[name][:-1].clone()

    damage.edit_tensors(tmp_path, edit)
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj is \[11, 160, 96\]"):
        Target(plain).load(tmp_path)


def test_left_out_on_purpose(plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    make(tmp_path)
    extra = [
        "model.layers.0.self_attn.rotary_emb.inv_freq",
        "model.layers.2.eh_proj.weight",
        "model.layers.2.mlp.experts.0.up_proj.weight",
        "step_head.weight",
        "step_head.bias",
    ]
    damage.edit_tensors(tmp_path, lambda t: t.update({name: torch.ones(2) for name in extra}))
    target = Target(plain)
    with caplog.at_level(logging.INFO):
        report = target.load(tmp_path)
    assert sorted(report.ignored) == sorted(extra)
    assert "left out 5 tensors" in caplog.text


def test_tied_embeddings(plain: Path, tmp_path: Path) -> None:
    make(tmp_path)
    target = Target(plain)
    shape = target.specs.pop("lm_head.weight").shape
    assert target.load(tmp_path).ignored == ("lm_head.weight",)
    damage.edit_tensors(tmp_path, lambda t: t.pop("lm_head.weight"))
    target = Target(plain)
    target.specs["lm_head.weight"] = target.spec("lm_head.weight", shape, optional=True)
    assert target.load(tmp_path).absent == ("lm_head.weight",)
    with pytest.raises(ValueError, match=r"1 missing: lm_head\.weight .*tie_word_embeddings"):
        Target(plain).load(tmp_path)


def test_differences_are_reported_together_before_loading(plain: Path, tmp_path: Path) -> None:
    make(tmp_path)

    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors["model.norm.weight"]
        tensors["model.layers.0.extra.weight"] = torch.ones(2)
        tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
        tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].double()

    damage.edit_tensors(tmp_path, edit)
    target = Target(plain)
    with pytest.raises(ValueError, match="do not match") as caught:
        target.load(tmp_path)
    text = str(caught.value)
    assert "1 missing: model.norm.weight" in text
    assert "1 unexpected: model.layers.0.extra.weight" in text
    assert "1 of another shape: lm_head.weight is [319, 96], not [320, 96]" in text
    assert "1 of another form: model.embed_tokens.weight is stored as F64; supported: F32" in text
    assert "\n" not in text
    assert target.got == {}


def test_long_lists_are_cut(plain: Path, tmp_path: Path) -> None:
    make(tmp_path)
    damage.edit_tensors(tmp_path, lambda t: [t.pop(n) for n in list(t) if ".experts." in n])
    with pytest.raises(ValueError, match=r"36 missing: .*, and 26 more"):
        Target(plain).load(tmp_path)


def _edited(path: Path, edit: Callable[[dict[str, Tensor]], None]) -> Path:
    make(path)
    damage.edit_tensors(path, edit)
    return path


EXPERT = "model.layers.1.mlp.experts.3.up_proj"


def test_fp8_reaches_specs_as_stored_or_as_values(tmp_path: Path) -> None:
    codes = torch.randn(200, 300).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 3) + 0.5
    write_safetensors(tmp_path, {"a.weight": codes, "a.weight_scale_inv": scales}, num_shards=2)
    stored: list[StoredWeight] = []
    values: list[Tensor] = []
    for spec in (
        TensorSpec((200, 300), values.append, load_stored=stored.append),
        TensorSpec((200, 300), values.append),
    ):
        load_weights(Checkpoint.open(tmp_path), {"a.weight": spec})
    [weight], [value] = stored, values
    assert weight.encoding == "fp8"
    assert torch.equal(weight.scale, scales)
    rows, cols = torch.arange(200) // 128, torch.arange(300) // 128
    assert torch.equal(value, codes.float() * scales[rows][:, cols])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_int4_values(dtype: torch.dtype, tmp_path: Path) -> None:
    codes = torch.randint(0, 16, (6, 64))
    packed = torch.tensor(
        [
            [sum(int(c) << 4 * i for i, c in enumerate(row[8 * w : 8 * w + 8])) for w in range(8)]
            for row in codes
        ]
    )
    scales = (torch.rand(6, 2) + 0.5).to(dtype)
    tensors = {
        "a.weight_packed": torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32),
        "a.weight_scale": scales,
        "a.weight_shape": torch.tensor([6, 64]),
    }
    write_safetensors(tmp_path, tensors)
    values: list[Tensor] = []
    load_weights(Checkpoint.open(tmp_path), {"a.weight": TensorSpec((6, 64), values.append)})
    assert torch.equal(values[0], (codes - 8.0) * scales.float().repeat_interleave(32, 1))


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"weight": "fp8"}, "is fp8 without weight_scale_inv"),
        ({"weight": "fp8", "weight_scale": torch.ones(1)}, "it has scale"),
        ({"weight": "fp8", "weight_scale_inv": torch.ones(2, 1)}, "shape [2, 1], not [1, 1]"),
        ({"weight": "fp8", "weight_scale_inv": torch.ones(1, 1).double()}, "scales of dtype F64"),
        ({"weight": torch.zeros(80, 96, dtype=torch.int8)}, "is stored as I8; supported"),
        ({"weight_packed": "int4"}, "has no weight_scale"),
        ({"weight_packed": "int4", "weight_scale": torch.ones(80, 1)}, "[80, 1], not [80, 3]"),
        ({"weight_packed": "int4", "weight_zero_point": torch.ones(1)}, "is asymmetric int4"),
        ({"weight_packed": "int4", "weight_g_idx": torch.ones(1)}, "is reordered int4"),
        ({"weight_packed": torch.zeros(80, 12)}, "is F32 [80, 12]; supported: I32"),
        (
            {
                "weight_packed": torch.zeros(80, 10, dtype=torch.int32),
                "weight_scale": torch.ones(80, 3),
            },
            "has 80 columns",
        ),
    ],
)
def test_quantised_weights_that_do_not_fit(
    parts: dict[str, Tensor | str], message: str, plain: Path, tmp_path: Path
) -> None:
    known = {
        "fp8": torch.zeros(80, 96).to(torch.float8_e4m3fn),
        "int4": torch.zeros(80, 12, dtype=torch.int32),
    }

    def edit(tensors: dict[str, Tensor]) -> None:
        del tensors[f"{EXPERT}.weight"]
        for name, part in parts.items():
            tensors[f"{EXPERT}.{name}"] = known[part] if isinstance(part, str) else part

    target = Target(plain)
    with pytest.raises(ValueError, match=re.escape(message)) as e:
        target.load(_edited(tmp_path, edit))
    assert f"1 of another form: {EXPERT}.weight" in str(e.value)
    assert "unexpected" not in str(e.value)
    assert "missing" not in str(e.value)
    assert target.got == {}


def test_scales_without_a_weight(plain: Path, tmp_path: Path) -> None:
    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight_scale_inv"] = torch.ones(1, 1)

    with pytest.raises(ValueError, match=r"1 unexpected: model\.norm\.weight_scale_inv"):
        Target(plain).load(_edited(tmp_path, edit))


def test_ue8m0_scales(tmp_path: Path) -> None:
    exponents = torch.tensor([[0, 127], [126, 254]], dtype=torch.uint8)
    tensors = {
        "a.weight": torch.ones(256, 256).to(torch.float8_e4m3fn),
        "a.weight_scale_inv": exponents.view(torch.float8_e8m0fnu),
    }
    write_safetensors(tmp_path, tensors)
    values: list[Tensor] = []
    spec = TensorSpec((256, 256), lambda value: values.append(value.clone()))
    load_weights(Checkpoint.open(tmp_path), {"a.weight": spec})
    assert values[0][::128, ::128].tolist() == [[2.0**-127, 1.0], [0.5, 2.0**127]]
    exponents[0, 0] = 255
    write_safetensors(tmp_path, tensors)
    with pytest.raises(ValueError, match="ue8m0 scales hold NaN"):
        load_weights(Checkpoint.open(tmp_path), {"a.weight": spec})


def test_the_same_tensor_under_two_names(plain: Path, tmp_path: Path) -> None:
    make(tmp_path)

    def edit(tensors: dict[str, Tensor]) -> None:
        tensors["language_model.model.norm.weight"] = tensors["model.norm.weight"].clone()

    damage.edit_tensors(tmp_path, edit)
    with pytest.raises(ValueError, match=r"unexpected: .*norm\.weight \(same as"):
        Target(plain).load(tmp_path)


def reader_threads() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "moejet-read"]


def test_errors_of_a_load_pass_through(plain: Path) -> None:
    target = Target(plain)

    def refuse(_: Tensor) -> None:
        raise RuntimeError("no room")

    target.specs["model.norm.weight"] = TensorSpec((96,), refuse)
    with pytest.raises(RuntimeError, match="no room") as caught:
        target.load(plain)
    assert "while loading model.norm.weight" in caught.value.__notes__[0]
    assert reader_threads() == []


def test_interruption_ends_the_reader(plain: Path) -> None:
    def interrupt(_: LoadProgress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), on_load_progress(interrupt):
        Target(plain).load(plain)
    assert reader_threads() == []


def test_a_file_that_shrinks_while_loading(plain: Path, tmp_path: Path) -> None:
    make(tmp_path)
    target = Target(plain)
    checkpoint = Checkpoint.open(tmp_path)
    damage.truncate(tmp_path / "model.safetensors", 64)
    with pytest.raises(ValueError, match=r"model\.safetensors: file ends .* bytes early"):
        load_weights(checkpoint, target.specs)
    assert reader_threads() == []


def test_progress_line() -> None:
    stream = io.StringIO()
    line = ProgressLine(stream=stream)
    assert not line.enabled
    line.update(LoadProgress(1, 2, 1.0, "x"))
    line.close()
    assert stream.getvalue() == ""
    line = ProgressLine(enabled=True, stream=stream)
    line.update(LoadProgress(3 * 2**30, 4 * 2**30, 90.0, "x"))
    text = stream.getvalue()
    assert "75%" in text
    assert "3.00 of 4.00 GiB" in text
    assert "30 s left" in text
    line.update(LoadProgress(4 * 2**30, 4 * 2**30, 100.0, "x"))
    assert stream.getvalue() == text, "redrawn too soon"
    line.close()
    assert stream.getvalue().endswith("\r")
    assert "left" not in str(LoadProgress(0, 0, 0.0, "x"))


MEASURE = """
import resource, sys, torch
from moejet.weights.checkpoint import Checkpoint
from moejet.weights.spec import TensorSpec
from moejet.weights.loader import load_weights
checkpoint = Checkpoint.open(sys.argv[1])
read = []
specs = {i.name: TensorSpec(i.shape, lambda t: read.append(float(t[0, 0]))) for i in checkpoint}
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
report = load_weights(checkpoint, specs, show_progress=False)
after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert len(read) == len(specs)
print((after - before) / 1024, report.num_bytes / 2**20)
"""


def test_memory_is_bounded(tmp_path: Path) -> None:
    """200 MiB in two shards pass through; resident memory grows by a few pieces only."""
    tensors = {f"model.layers.{i}.w.weight": torch.ones(2**20, 10) for i in range(5)}
    write_safetensors(tmp_path, tensors, num_shards=2)
    del tensors
    # The read-ahead budget is lowered so that the bound shows at this size.
    code = "import moejet.weights.reader as r; r.READ_AHEAD_BYTES = 50 << 20\n" + MEASURE
    out = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    grown_mib, total_mib = map(float, out.stdout.split())
    assert total_mib == 200
    assert grown_mib < 110
