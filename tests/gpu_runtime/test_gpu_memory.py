"""Where everything lives: the plan has what is allocated, budgets hold, and nobody takes memory twice."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moejet import LLM
from moejet.config import EngineConfig, ModelConfig
from moejet.experts.placement import counts_that_fit
from moejet.gpu_memory import RESERVE_BYTES, GpuMemory, device_tensors
from moejet.loading import check_memory
from moejet.plan import GIB, Machine, make_plan
from moejet.presets import PRESETS
from moejet.testing.checkpoints import FAMILIES, hf_config

SMALL = replace(
    PRESETS["deepseek-v2-lite"],
    num_hidden_layers=3,
    num_experts=8,
    vocab_size=1024,
    hidden_size=512,
    intermediate_size=768,
    moe_intermediate_size=256,
)
OPTIONS = {"max_context": 512, "cache_tokens": 2048, "max_batch_tokens": 256, "max_num_requests": 4}


def _resident(llm: LLM) -> list[int]:
    layers = llm.engine.runner.model.moe_layers
    return [0 if m.experts.resident is None else len(m.experts.resident.slots) for m in layers]


@pytest.mark.parametrize("expert_format", ["int4_g32", "int8", "fp8", "bf16"])
@pytest.mark.parametrize(
    ("dense_format", "cache_dtype", "gpu_experts", "expert_cache"),
    [("int8", "bf16", 0, 0), ("bf16", "fp8", 5, 7), ("fp8", "bf16", 16, 0), ("int8", "bf16", 0, 3)],
)
def test_the_plan_is_what_is_allocated(
    expert_format, dense_format, cache_dtype, gpu_experts, expert_cache
):
    options = {**OPTIONS, "expert_format": expert_format, "dense_format": dense_format}
    options |= {"cache_dtype": cache_dtype, "gpu_experts": gpu_experts, "device": "simulated"}
    options["expert_cache"] = expert_cache
    with LLM.synthetic(SMALL, **options) as llm:
        config, runner = llm.config, llm.engine.runner
        held = sum(tensor.nbytes for tensor in device_tensors(runner))
        in_ram = sum(
            m.experts.cpu.weights.expert_nbytes * (SMALL.num_experts - count)
            for m, count in zip(runner.model.moe_layers, _resident(llm), strict=True)
            if m.experts.cpu is not None
        )
        assert sum(_resident(llm)) == gpu_experts
        llm.engine.add_request([1, 2, 3], llm.default_sampling())
        llm.engine.step()
    memory = GpuMemory.of(SMALL, config, vram_bytes=64 * GIB, cache_tokens=2048)
    tables = 6 * SMALL.num_experts * 4  # of slots, and their numbers
    planned = memory.dense + memory.cache + memory.experts + memory.ring + memory.expert_cache
    assert held - tables <= planned <= held
    assert (memory.ring > 0) == (gpu_experts < 16)
    assert memory.placement.num_cached == expert_cache
    assert memory.cpu_experts == pytest.approx(in_ram, rel=0.01)
    plan = make_plan(SMALL, config, machine=Machine(None, 64 * GIB), cache_tokens=2048)
    assert plan.bytes_in("VRAM") == memory.on_device
    assert plan.gpu_experts == gpu_experts


@pytest.mark.parametrize("family", FAMILIES)
def test_dense_bytes_of_every_family(family):
    model = ModelConfig.from_hf(hf_config(family))
    options = {**OPTIONS, "device": "simulated", "gpu_experts": 0, "stream_prefill_tokens": 0}
    with LLM.synthetic(model, **options) as llm:
        held = sum(tensor.nbytes for tensor in device_tensors(llm.engine.runner))
        memory = GpuMemory.of(model, llm.config, vram_bytes=GIB, cache_tokens=2048)
    assert memory.dense + memory.cache == held


def test_a_budget_is_filled_and_not_exceeded():
    config = EngineConfig(model="x", stream_prefill_tokens=0, **OPTIONS)
    empty = GpuMemory.of(SMALL, replace(config, gpu_experts=0), vram_bytes=0, cache_tokens=2048)
    one = GpuMemory.of(
        SMALL, replace(config, gpu_experts=1), vram_bytes=0, cache_tokens=2048
    ).experts
    for count in (0, 1, 7, 16):
        budget = empty.on_device + count * one
        exact = GpuMemory.of(SMALL, config, vram_bytes=budget, cache_tokens=2048)
        assert exact.placement.num_resident == count
        assert exact.on_device == budget
        if count:
            less = GpuMemory.of(SMALL, config, vram_bytes=budget - 1, cache_tokens=2048)
            assert less.placement.num_resident == count - 1
    more = GpuMemory.of(SMALL, config, vram_bytes=budget + 10 * one, cache_tokens=2048)
    assert more.placement.num_resident == 16
    assert more.cpu_experts == 0


def test_the_ring_is_there_where_experts_are_in_ram():
    def memory(**options) -> GpuMemory:
        config = EngineConfig(model="x", **{**OPTIONS, **options})
        return GpuMemory.of(SMALL, config, vram_bytes=budget, cache_tokens=2048)

    budget = 0
    without, one = memory(gpu_experts=0, stream_prefill_tokens=0), memory(gpu_experts=1).experts
    ring = memory(gpu_experts=0).ring
    assert memory(gpu_experts=0).on_device == without.on_device + ring
    assert memory(gpu_experts=0).pinned > without.pinned
    assert memory(gpu_experts=0, expert_format="fp32").ring == 0
    assert memory(gpu_experts=0, expert_format="fp32", stream_prefill_tokens=9).ring > 0
    for count in (0, 5, 15):
        budget = without.on_device + ring + count * one
        if budget < without.on_device + 16 * one:
            assert memory().placement.num_resident == count
            assert memory().on_device == budget
    # Where the last expert fits, nothing streams, and its memory is free.
    budget = without.on_device + 16 * one
    assert memory().placement.num_resident == 16
    assert memory().ring == 0
    budget -= 1
    assert memory().placement.num_resident == max(0, (16 * one - 1 - ring) // one)
    assert memory().ring == ring


def test_layers_get_alike_and_others_go_on_where_one_is_too_large():
    assert counts_that_fit([10, 10, 10], 4, 75) == [3, 2, 2]
    assert counts_that_fit([10, 30], 4, 75) == [4, 1]
    assert counts_that_fit([10, 10], 4, 10**6) == [4, 4]
    assert counts_that_fit([10, 10], 4, 10**6, most=3) == [2, 1]
    assert counts_that_fit([10, 10], 4, -5) == [0, 0]
    assert counts_that_fit([], 4, 100) == []


def test_vram_that_half_of_the_experts_fit_into():
    options = {**OPTIONS, "device": "simulated", "stream_prefill_tokens": 0}
    config = EngineConfig(model="x", **options)
    empty = GpuMemory.of(
        SMALL, replace(config, gpu_experts=0), vram_bytes=0, cache_tokens=2048
    ).on_device
    half = GpuMemory.of(
        SMALL, replace(config, gpu_experts=8), vram_bytes=0, cache_tokens=2048
    ).on_device
    assert empty < half
    with LLM.synthetic(SMALL, vram_gib=half / GIB, **options) as llm:
        assert _resident(llm) == [4, 4]


def test_too_little_vram_is_refused_with_the_numbers():
    config = EngineConfig(model="x", device="simulated", vram_gib=0.5, **OPTIONS)
    with pytest.raises(ValueError, match=r"GiB of GPU memory .*0\.5 GiB are available: use"):
        check_memory(config, SMALL, 2048)
    fixed = EngineConfig(
        model="x",
        device="simulated",
        vram_gib=RESERVE_BYTES / GIB + 0.3,
        gpu_experts=10**6,
        **OPTIONS,
    )
    wide = replace(SMALL, num_experts=64, moe_intermediate_size=1408)
    with pytest.raises(ValueError, match="128 of 128 routed experts"):
        check_memory(fixed, wide, 2048)


def test_experts_on_the_gpu_take_no_ram():
    model = replace(SMALL, hidden_size=1024, moe_intermediate_size=1024, num_hidden_layers=2)
    options = {**OPTIONS, "expert_format": "bf16", "device": "simulated"}
    with LLM.synthetic(model, gpu_experts=5, **options) as llm:
        [moe] = llm.engine.runner.model.moe_layers
        weights = moe.experts.cpu.weights
        [memory] = weights.buffers()
        present = _pages_present(memory)
        split = len(present) * 5 // 8
        # Huge pages may reach over the border.
        assert present[:split].sum() * 4096 <= 4 << 20
        assert present[split:].mean() > 0.99
        llm.engine.add_request(list(range(50)), llm.default_sampling())
        llm.engine.step()
        assert _pages_present(memory)[:split].sum() * 4096 <= 4 << 20
    with LLM.synthetic(model, gpu_experts=8, **options) as llm:
        [moe] = llm.engine.runner.model.moe_layers
        assert moe.experts.cpu is None


def _pages_present(memory: np.ndarray) -> np.ndarray:
    first, last = memory.ctypes.data // 4096, (memory.ctypes.data + memory.nbytes) // 4096
    with Path("/proc/self/pagemap").open("rb", buffering=0) as file:
        file.seek(first * 8)
        entries = np.frombuffer(file.read((last - first) * 8), np.uint64)
    return (entries >> np.uint64(63)).astype(np.int64)
