"""Experts that come and go on a CUDA device while graphs are replayed, with delays on every stream."""

import random

import pytest
import torch

from moejet import LLM, SamplingParams
from moejet.experts.bridge import CpuBridge, CudaStream
from moejet.experts.cpu_experts import CpuExperts, create_pool
from moejet.experts.expert_cache import CudaFetchStream, ExpertCache
from moejet.experts.hybrid_experts import HybridExperts
from moejet.experts.resident_experts import ResidentExperts
from moejet.testing.checkpoints import reference_greedy, tiny_checkpoint
from moejet.testing.random_swaps import RandomSwaps

pytestmark = pytest.mark.gpu

EXPERTS, HIDDEN, INTER, TOP_K, LAYERS, TOKENS, FREE = 16, 512, 256, 4, 3, 5, 6


class DelayedFetchStream(CudaFetchStream):
    """Some operations are preceded by a delay of up to a few steps."""

    def __init__(self, device: torch.device, seed: int) -> None:
        super().__init__(device)
        self._random = random.Random(seed)

    def run(self, operation) -> None:
        if self._random.random() < 0.5:
            super().run(lambda: torch.cuda._sleep(self._random.randrange(3_000_000)))
        super().run(operation)


@pytest.fixture(scope="module")
def pool():
    return create_pool()


def _layers(pool, format: str) -> list[HybridExperts]:
    made = []
    for seed in range(LAYERS):
        cpu = CpuExperts(EXPERTS, HIDDEN, INTER, format=format, pool=pool)
        cpu.fill_random(seed)
        resident = ResidentExperts(
            [2],
            *(EXPERTS, HIDDEN, INTER),
            format=format,
            down_format=format,
            device=torch.device("cuda"),
            num_free=FREE,
        )
        for name, w in zip(("gate", "up", "down"), cpu.dequantize(2), strict=True):
            HybridExperts(None, resident).set_projection(2, name, w)
        made.append(HybridExperts(cpu, resident))
    return made


def _example(layers: list[HybridExperts], seed: int):
    """(x, ids, weights) of a step, and each layer's result by the CPU alone."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(TOKENS, HIDDEN, generator=generator)
    ids = torch.rand(LAYERS, TOKENS, EXPERTS, generator=generator).argsort(-1)[..., :TOP_K].int()
    ids[0, 1, 2] = ids[2, 3, 0] = -1
    weights = torch.rand(LAYERS, TOKENS, TOP_K, generator=generator)
    outs = torch.empty(LAYERS, TOKENS, HIDDEN)
    for layer, i, w, out in zip(layers, ids, weights, outs, strict=True):
        layer.require_cpu().run_kernels(x, i, w, out)
    return (x, ids, weights), outs


def _enqueue(layers, x, ids, weights) -> torch.Tensor:
    outs = []
    for number, layer in enumerate(layers):
        layer.submit(x, ids[number], weights[number])
        outs.append(layer.collect())
    return torch.stack(outs)


@pytest.mark.parametrize("format", ["int4_g32", "bf16", "fp8"])
@pytest.mark.parametrize("host_functions", [False, True])
def test_storms_of_swaps_under_graph_replay(pool, format, host_functions) -> None:
    """A step is not awaited before the next one is launched; results wait in memory of their own."""
    layers = _layers(pool, format)
    device = torch.device("cuda")
    bridge = CpuBridge(
        [layer.require_cpu() for layer in layers],
        CudaStream(device, host_functions=host_functions),
        top_k=TOP_K,
        max_tokens=TOKENS,
        dtype=torch.float32,
    )
    for number, layer in enumerate(layers):
        layer.attach(bridge, number)
    policy = RandomSwaps(EXPERTS, [FREE] * LAYERS, fixed=[{2}] * LAYERS, seed=1)
    cache = ExpertCache(layers, DelayedFetchStream(device, 2), policy, num_buffers=3)
    examples = [_example(layers, seed) for seed in range(8)]
    static = [tensor.cuda() for tensor in examples[0][0]]
    _enqueue(layers, *static)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _enqueue(layers, *static)
    results, chosen = [], random.Random(3)
    on_device = [[tensor.cuda() for tensor in inputs] for inputs, _ in examples]
    for step in range(400):
        number = chosen.randrange(len(examples))
        cache.advance()
        for target, source in zip(static, on_device[number], strict=True):
            target.copy_(source)
        if chosen.random() < 0.2:
            torch.cuda._sleep(chosen.randrange(2_000_000))
        graph.replay()
        bridge.run_step(TOKENS)
        results.append((number, out.clone()))
        if step % 10 == 9:
            torch.cuda.synchronize()
            for tried, result in results:
                expected = examples[tried][1]
                # The CPU rounds activations of integer formats to int8, the GPU none here.
                scale = float(expected.abs().max())
                error = float((result.cpu() - expected).abs().max())
                assert error < (0.005 if format == "bf16" else 0.03) * scale
            results.clear()
    torch.cuda.synchronize()
    for _ in range(3):
        cache.advance()
        torch.cuda.synchronize()
    assert cache.counters.fetches > 100
    assert 0 < cache.counters.hits < cache.counters.uses
    assert cache.counters.copy_seconds > 0
    cache.close()
    bridge.close()


@pytest.mark.parametrize("graphs", [True, False])
@pytest.mark.parametrize("expert_format", ["bf16", "int4_g32"])
def test_greedy_tokens_while_experts_come_and_go(
    tmp_path, monkeypatch, graphs, expert_format
) -> None:
    """Of a small model as a whole: the same with and without swaps; in bf16 those of transformers, for a while."""
    monkeypatch.setenv("MOEJET_EAGER", "0" if graphs else "1")
    shape = {"kv_lora_rank": 64, "qk_rope_head_dim": 16}
    path = tiny_checkpoint(tmp_path, "deepseek_v3", dtype=torch.bfloat16, **shape)
    options = {"device": "cuda", "dense_format": "bf16", "max_context": 256, "gpu_experts": 3}
    greedy = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    prompt = list(range(20, 41))
    expected = reference_greedy(path, prompt, 24)[-24:]
    agreeing = []
    for cached in (0, 8):
        with LLM(path, expert_format=expert_format, expert_cache=cached, **options) as llm:
            cache = llm.engine.runner.expert_cache
            if cache is not None:
                residents = cache._residents
                cache.policy = RandomSwaps(
                    llm.model_config.num_experts,
                    [r.num_free for r in residents],
                    fixed=[r.slots for r in residents],
                )
            for _ in range(3):
                tokens = list(llm.generate([prompt], greedy)[0].outputs[0].token_ids)
            same = [ours == theirs for ours, theirs in zip(tokens, expected, strict=True)]
            agreeing.append([*same, False].index(False))
            if cache is not None:
                assert llm.counters()["expert_cache_hits"] > 0
                assert llm.engine.runner.transfers().fetched_bytes > 0
    if expert_format == "bf16":
        assert min(agreeing) >= 4  # activations are bf16 on the GPU
