"""The plan adds up to what an engine really holds, and its advice helps."""

from dataclasses import replace

import pytest

from moejet import LLM
from moejet.config import EngineConfig, ModelConfig
from moejet.loading import check_memory
from moejet.plan import GIB, Machine, make_plan
from moejet.presets import PRESETS
from moejet.testing.checkpoints import FAMILIES, hf_config

V3 = PRESETS["deepseek-v3"]


def plan_of(model: ModelConfig = V3, *, cache_tokens: int = 32768, machine=None, **options):
    config = EngineConfig(model="x", **options)
    return make_plan(model, config, machine=machine or Machine(), cache_tokens=cache_tokens)


@pytest.mark.parametrize("expert_format", ["int4_g32", "int8", "fp8", "bf16"])
@pytest.mark.parametrize(("dense_format", "cache_dtype"), [("int8", "bf16"), ("bf16", "fp8")])
def test_weights_and_cache_are_those_of_the_engine(expert_format, dense_format, cache_dtype):
    sizes = {
        "hidden_size": 512,
        "intermediate_size": 1024,
        "moe_intermediate_size": 352,
        "vocab_size": 2048,
    }
    shape = replace(PRESETS["deepseek-v2-lite"], num_hidden_layers=2, num_experts=8, **sizes)
    options = {"expert_format": expert_format, "dense_format": dense_format, "max_context": 512}
    options["cache_dtype"] = cache_dtype
    with LLM.synthetic(shape, cache_tokens=4096, **options) as llm:
        held = 0
        for value in llm.engine.runner.model.state().values():
            held += value.nbytes
        cache = llm.engine.runner.latent_cache.nbytes
        plan = make_plan(shape, llm.config, machine=Machine(), cache_tokens=4096)
    parts = {part.name: part.num_bytes for part in plan.parts}
    weights = sum(size for name, size in parts.items() if "experts" in name or "embedding" in name)
    assert weights == pytest.approx(held, rel=0.01)
    assert parts["latent cache"] == cache
    assert {part.place for part in plan.parts} == {"RAM"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_planned(family):
    model = ModelConfig.from_hf(hf_config(family))
    plan = make_plan(
        model,
        EngineConfig(model=family),
        machine=Machine(8 * GIB, None, 50.0, 0.8, 0.4),
        cache_tokens=512,
        depths=(0, 100),
    )
    assert plan.fits
    assert not plan.advice
    first, deep = plan.speeds
    assert first.decode > deep.decode > 0
    assert first.prefill > deep.prefill > 0


def test_unknown_machine_gives_sizes_only():
    plan = plan_of()
    assert plan.fits
    assert plan.speeds[0].decode is plan.speeds[0].prefill is None


@pytest.mark.parametrize(
    ("ram", "options", "words"),
    [
        (700, {"expert_format": "bf16"}, ("expert_format='int8'",)),
        (400, {"expert_format": "int8"}, ("expert_format='int4_g32'",)),
        (355, {"dense_format": "int8"}, ("dense_format='int4_g32'",)),
        (363, {"dense_format": "int4_g32", "cache_tokens": 163840}, ("max_context",)),
        (363, {"dense_format": "int4_g32", "cache_tokens": 163840}, ("cache_dtype='fp8'",)),
        (300, {}, ("GiB more RAM", "or a smaller model")),
    ],
)
def test_advice_makes_it_fit(ram, options, words):
    options = dict(options)
    cache_tokens = options.pop("cache_tokens", 4096)
    plan = plan_of(machine=Machine(ram * GIB), cache_tokens=cache_tokens, **options)
    assert not plan.fits
    text = " ".join(plan.advice)
    for word in words:
        assert word in text
    if "expert_format" in words[0]:
        better = {**options, "expert_format": words[0].split("'")[1]}
        assert plan_of(machine=Machine(ram * GIB), cache_tokens=cache_tokens, **better).fits
    if "cache_dtype" in words[0]:
        better = {**options, "cache_dtype": "fp8"}
        assert plan_of(machine=Machine(ram * GIB), cache_tokens=cache_tokens, **better).fits
    if words[0] == "max_context":
        tokens = int(text.split("of ")[-1])
        assert plan_of(machine=Machine(ram * GIB), cache_tokens=tokens, **options).fits


def test_vram_takes_dense_weights_first_and_then_experts():
    small = plan_of(machine=Machine(400 * GIB, 24 * GIB))
    large = plan_of(machine=Machine(400 * GIB, 80 * GIB))
    assert small.fits
    assert large.fits
    assert 0 < small.gpu_experts < large.gpu_experts
    assert small.bytes_in("VRAM") <= 24 * GIB
    total = small.bytes_in("RAM") + small.bytes_in("VRAM")
    assert total == large.bytes_in("RAM") + large.bytes_in("VRAM")
    tiny = plan_of(machine=Machine(400 * GIB, 8 * GIB))
    assert not tiny.fits
    assert "VRAM" in tiny.advice[0]


def test_loading_refuses_what_cannot_fit(monkeypatch):
    monkeypatch.setattr("moejet.topology.available_bytes", lambda: 20 * GIB)
    with pytest.raises(
        ValueError, match=r"needs 3\d\d\.\d GiB \(routed experts 342\.6.* 20\.0 GiB"
    ):
        check_memory(EngineConfig(model="x"), V3, 4096)
    check_memory(EngineConfig(model="x"), PRESETS["deepseek-v2-lite"], 4096)
