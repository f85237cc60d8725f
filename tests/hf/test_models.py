"""Whole models: loading, packing, saving, switching, copying, compiling, leaving; and registration."""

import copy
import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import moejet.hf

PROMPT = torch.tensor([[5, 17, 99, 4, 60]])


def greedy(model: Any, count: int = 12) -> list[int]:
    tokens: list[int] = model.generate(PROMPT, max_new_tokens=count, do_sample=False)[0].tolist()
    return tokens


def layers_of(model: Any) -> list[Any]:
    return [layer.mlp.experts for layer in model.model.layers]


@pytest.fixture
def checkpoint(tmp_path: Path, tiny_model: Callable[..., nn.Module]) -> Path:
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(path: Path, implementation: str = "moejet") -> Any:
    return AutoModelForCausalLM.from_pretrained(path, experts_implementation=implementation)


def test_loaded_model_packs_layer_by_layer_and_frees(checkpoint: Path) -> None:
    model = load(checkpoint)
    layers = layers_of(model)
    parameters = [weakref.ref(layer.gate_up_proj) for layer in layers]
    seen: list[list[bool]] = []
    for layer in layers:
        layer.register_forward_hook(lambda *_: seen.append([ref() is None for ref in parameters]))
    with torch.no_grad():
        model(PROMPT)
    assert seen == [[i <= done for i in range(3)] for done in range(3)]
    assert not any("experts" in name for name, _ in model.named_parameters())
    sizes = [layer._moejet_packed.experts.nbytes for layer in layers]
    assert moejet.hf.pack(model) == sum(sizes)


def test_pack_before_the_first_call(checkpoint: Path) -> None:
    model, reference = load(checkpoint), load(checkpoint, "eager").float()
    assert moejet.hf.pack(model) == moejet.hf.pack(model) > 0
    assert greedy(model.float()) == greedy(reference)
    with pytest.raises(ValueError, match="no layer of this model"):
        moejet.hf.pack(reference)


def test_bf16_is_closer_to_the_truth_than_eager(checkpoint: Path) -> None:
    with torch.no_grad():
        truth = load(checkpoint, "eager").float()(PROMPT).logits
        eager = load(checkpoint, "eager")(PROMPT).logits.float()
        ours = load(checkpoint)(PROMPT).logits.float()
    assert (ours - truth).norm() < 1.1 * (eager - truth).norm()


def test_saving_after_packing_keeps_every_bit(checkpoint: Path, tmp_path: Path) -> None:
    model = load(checkpoint)
    tokens = greedy(model)
    model.save_pretrained(tmp_path / "again")
    assert greedy(model) == tokens
    original, saved = load(checkpoint, "eager"), load(tmp_path / "again", "eager")
    for (name, a), (_, b) in zip(
        original.named_parameters(), saved.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_saving_rounded_weights_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    moejet.hf.register("moejet-int4", expert_format="int4_g32", num_threads=1)
    model = load(checkpoint, "moejet-int4")
    model.save_pretrained(tmp_path / "before")
    moejet.hf.pack(model)
    with pytest.raises(RuntimeError, match="packed as int4_g32"):
        model.save_pretrained(tmp_path / "after")
    with pytest.raises(RuntimeError, match="packed already"):
        model.load_state_dict(load(checkpoint).state_dict(), strict=False)


def test_switching_back_and_forth(checkpoint: Path) -> None:
    model = load(checkpoint).float()
    tokens = greedy(model)
    model.set_experts_implementation("eager")
    assert greedy(model) == tokens
    assert all(layer.down_proj.requires_grad for layer in layers_of(model))
    model(PROMPT).logits.sum().backward()  # trains again
    assert all(layer.down_proj.grad.abs().sum() > 0 for layer in layers_of(model))
    model.set_experts_implementation("moejet")
    assert greedy(model) == tokens
    assert all(layer.down_proj is None for layer in layers_of(model))
    assert all(len(layer._forward_pre_hooks) == 1 for layer in layers_of(model))


def test_conversion_and_copies_after_packing(checkpoint: Path) -> None:
    model = load(checkpoint)
    moejet.hf.pack(model)
    wide = copy.deepcopy(model).float()
    assert next(wide.parameters()).dtype == torch.float32
    assert greedy(wide) == greedy(load(checkpoint, "eager").float())
    narrow = model.half()
    with torch.no_grad():
        logits = narrow(PROMPT).logits
    assert logits.dtype == torch.float16
    assert logits.isfinite().all()


def test_training_is_refused(checkpoint: Path) -> None:
    model = load(checkpoint).train()
    with pytest.raises(RuntimeError, match="no gradients"):
        model(PROMPT, labels=PROMPT)


def test_two_models_two_formats(checkpoint: Path) -> None:
    moejet.hf.register("moejet-int8", expert_format="int8", num_threads=1)
    exact, rounded, other = load(checkpoint), load(checkpoint, "moejet-int8"), load(checkpoint)
    with torch.no_grad():
        logits = [model(PROMPT).logits for model in (exact, rounded, other)]
    assert torch.equal(logits[0], logits[2])
    assert not torch.equal(logits[0], logits[1])
    pools = {layer._moejet_packed.experts.pool for m in (exact, rounded) for layer in layers_of(m)}
    assert len(pools) == 1


def test_threads_pack_once_and_agree(checkpoint: Path) -> None:
    model = load(checkpoint)
    results: list[torch.Tensor] = []

    def call() -> None:
        with torch.no_grad():
            results.append(model(PROMPT).logits)

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 4
    assert all(torch.equal(results[0], other) for other in results)
    assert all(len(layer._state_dict_hooks) == 1 for layer in layers_of(model))


def test_compiled_block(tiny_model: Callable[..., nn.Module]) -> None:
    """Router and shared parts are compiled around the experts, which are packed in the first call."""
    model = tiny_model(num_hidden_layers=1)
    block = model.model.layers[0].mlp
    x = torch.randn(1, 5, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = block(x)
        model.set_experts_implementation("moejet")
        compiled = torch.compile(block, backend="eager")
        first, second = compiled(x), compiled(x)
    assert block.experts.down_proj is None
    torch.testing.assert_close(first, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(first, second)


def test_models_that_go_leave_nothing(tiny_model: Callable[..., nn.Module]) -> None:
    """20 models with 19 MB of experts each: their packed weights, parameters and worker threads all go."""

    def step() -> weakref.ref[Any]:
        model = tiny_model(implementation="moejet", hidden_size=256, moe_intermediate_size=256)
        greedy(model, 2)
        return weakref.ref(layers_of(model)[0]._moejet_packed.experts.weights)

    def state() -> tuple[int, int]:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE"), len(os.listdir("/proc/self/task"))

    for _ in range(4):
        step()
    before = state()
    gone = [step() for _ in range(20)]
    after = state()
    assert all(ref() is None for ref in gone)
    assert after[0] - before[0] < 24e6
    assert after[1] <= before[1]


def test_unregistered_models_say_so(checkpoint: Path) -> None:
    model = load(checkpoint).float()
    tokens = greedy(model)
    moejet.hf.unregister()
    with pytest.raises(KeyError, match="moejet"):
        greedy(model)
    with pytest.raises(ValueError, match="not supported"):
        load(checkpoint)
    with pytest.raises(ValueError, match="not registered"):
        moejet.hf.unregister()
    model.set_experts_implementation("eager")
    assert greedy(model) == tokens


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"expert_format": "int3"}, "expert_format='int3' must be one of auto, int4_g32"),
        ({"num_threads": 0}, "num_threads=0 must be between 1"),
        ({"name": "grouped_mm"}, "name='grouped_mm' belongs to transformers"),
        ({"name": "eager"}, "name='eager' belongs to transformers"),
    ],
)
def test_wrong_registrations(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        moejet.hf.register(**arguments)
    assert list(moejet.hf._registered) == ["moejet"]


def test_old_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    def only_own_names(self: object, requested: str) -> str:
        raise ValueError(f"{requested} is not supported")

    monkeypatch.setattr(PreTrainedModel, "get_correct_experts_implementation", only_own_names)
    with pytest.raises(ImportError, match=r"needs transformers 5\.7 or newer, transformers 5\."):
        moejet.hf.register("other")
    assert list(moejet.hf._registered) == ["moejet"]


@pytest.mark.parametrize(
    ("variable", "threads", "warns"),
    [
        (None, 2, True),
        ("OMP_WAIT_POLICY", 2, False),
        ("GOMP_SPINCOUNT", 2, False),
        (None, 1, False),
    ],
)
def test_spinning_openmp_threads_are_reported_once(
    variable: str | None,
    threads: int,
    warns: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "PASSIVE" if variable == "OMP_WAIT_POLICY" else "1000")
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    moejet.hf._warn_of_spinning.cache_clear()
    moejet.hf.register(num_threads=1)
    moejet.hf.register(num_threads=1)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warns


def test_without_transformers() -> None:
    code = """
import sys
sys.modules["transformers"] = None
import moejet.hf
try:
    moejet.hf.register()
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'moejet[hf]'" in done.stdout


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_rest_of_the_model_on_the_gpu(checkpoint: Path) -> None:
    model = load(checkpoint).float()
    reference = load(checkpoint, "eager").float()
    moejet.hf.pack(model)
    model.to("cuda")
    with torch.no_grad():
        logits = model(PROMPT.cuda()).logits
        expected = reference(PROMPT).logits
    assert logits.is_cuda
    torch.testing.assert_close(logits.cpu(), expected, rtol=1e-3, atol=1e-3)
