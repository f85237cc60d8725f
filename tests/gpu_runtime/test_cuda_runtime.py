"""The hybrid model on a CUDA device: graphs, eager launches and the CPU agree, wherever the routed experts live."""

import time

import pytest
import torch

from moejet import LLM, SamplingParams, gpu_loading
from moejet.batch import Batch
from moejet.experts import ring_size
from moejet.gpu_memory import GpuMemory
from moejet.plan import GIB
from moejet.testing.checkpoints import FAMILIES, reference_logprobs
from moejet.testing.tolerances import LOGPROB_LIMITS

pytestmark = pytest.mark.gpu

# Tiles of the attention kernels are no smaller.
SHAPE = {"qk_rope_head_dim": 16}
OPTIONS = {
    "expert_format": "bf16",
    "dense_format": "bf16",
    "cache_dtype": "fp32",
    "max_context": 256,
}
OPTIONS |= {"device": "cuda", "vram_gib": 4, "isa": "avx2"}
PLACEMENTS = {"none": 0, "some": 11, "all": 10**6}
NUM_GREEDY = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_GREEDY, ignore_eos=True)
PROMPTS = [list(range(20, 41)), [7, 9, 30, 31, 5], list(range(90, 130))]


@pytest.fixture
def fp32_activations(monkeypatch):
    """Then nothing but the order of sums differs from transformers."""
    monkeypatch.setitem(gpu_loading.ACTIVATIONS, "cuda", torch.float32)


@pytest.fixture(params=["graphs", "eager"])
def mode(request, monkeypatch):
    monkeypatch.setenv("MOEJET_EAGER", "1" if request.param == "eager" else "0")
    return request.param


def _tokens(llm: LLM, params=GREEDY) -> list[list[int]]:
    return [list(o.token_ids) for r in llm.generate(PROMPTS, params) for o in r.outputs]


def _graphs(llm: LLM) -> int:
    return sum(len(step.graphs) for step in llm.engine.runner.decoding.steps.values())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_tokens_are_those_of_transformers(
    family, placement, mode, checkpoint, expected_greedy, fp32_activations
):
    path = checkpoint(family, **SHAPE)
    with LLM(path, gpu_experts=PLACEMENTS[placement], **OPTIONS) as llm:
        for _ in range(2):
            made = _tokens(llm)
            assert made == expected_greedy(path, PROMPTS, made, NUM_GREEDY)
        assert (_graphs(llm) > 0) == (mode == "graphs")


@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize(
    "formats", [("int4_g32", "int8"), ("int8", "int4_g32"), ("fp8", "fp8")], ids="-".join
)
def test_graphs_compute_what_eager_launches_do(placement, formats, checkpoint, monkeypatch):
    path = checkpoint("deepseek_v3", **SHAPE, moe_intermediate_size=96)
    options = {**OPTIONS, "expert_format": formats[0], "dense_format": formats[1]}
    options |= {"cache_dtype": "bf16", "gpu_experts": PLACEMENTS[placement], "seed": 3}
    random = SamplingParams(temperature=0.8, top_p=0.95, top_k=50, max_tokens=32, ignore_eos=True)
    made = []
    for eager in "01":
        monkeypatch.setenv("MOEJET_EAGER", eager)
        with LLM(path, **options) as llm:
            made.append([_tokens(llm), _tokens(llm, random)])
    assert made[0] == made[1]


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_bf16_is_as_exact_as_bf16_is(placement, checkpoint):
    path, ids = checkpoint("deepseek_v3", **SHAPE), list(range(10, 130))
    expected = reference_logprobs(path, ids)
    options = {**OPTIONS, "cache_dtype": "bf16", "gpu_experts": PLACEMENTS[placement]}
    for chunk in (512, 11):
        with LLM(path, **options, max_batch_tokens=chunk) as llm:
            got = torch.tensor(llm.score(ids), dtype=torch.float64)
        likely = expected > -9.0
        assert float((got - expected).abs()[likely].max()) < LOGPROB_LIMITS["bf16"]


def test_padded_sizes_share_memory_and_agree(checkpoint, fp32_activations):
    """Batches of 1 to 20 requests, so several graphs in turn."""
    path = checkpoint("moonlight", **SHAPE)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    prompts = [[10 + i, 40, 7 * i + 9] for i in range(20)]
    with LLM(path, gpu_experts=5, **OPTIONS) as llm:
        alone = [list(llm.generate([p], params)[0].outputs[0].token_ids) for p in prompts]
        for count in (20, 3, 9, 1, 20):
            got = [list(r.outputs[0].token_ids) for r in llm.generate(prompts[:count], params)]
            assert got == alone[:count]
        assert _graphs(llm) >= 4


@pytest.mark.parametrize("is_prompt", [False, True])
def test_a_failing_worker_is_an_error_within_seconds(is_prompt, checkpoint):
    with LLM(checkpoint("deepseek_v3", **SHAPE), gpu_experts=9, **OPTIONS) as llm:
        runner, size = llm.engine.runner, llm.config.block_size
        tokens = list(range(30, 60)) if is_prompt else [4]
        with llm.engine.scratch_request(tokens) as request:
            batch = Batch.build([request], [len(tokens)], block_size=size)
            runner.execute(batch)
            good = runner.execute(batch)  # by the graph
            for layer in (0, 1):
                runner.bridge._native.fail_once(layer, 0)
                start = time.monotonic()
                with pytest.raises(RuntimeError):
                    runner.execute(batch)
                assert time.monotonic() - start < 5.0
                assert torch.equal(runner.execute(batch), good)


def test_a_pool_that_is_gone_is_an_error_within_seconds(checkpoint):
    with LLM(checkpoint("deepseek_v3", **SHAPE), gpu_experts=9, **OPTIONS) as llm:
        runner, size = llm.engine.runner, llm.config.block_size
        with llm.engine.scratch_request([4]) as request:
            batch = Batch.build([request], [1], block_size=size)
            runner.execute(batch)
            runner.execute(batch)
            runner.pool.close()
            start = time.monotonic()
            for _ in range(2):
                with pytest.raises(RuntimeError):
                    runner.execute(batch)
            assert time.monotonic() - start < 5.0


def test_memory_stays_within_the_plan(checkpoint):
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    path = checkpoint("deepseek_v3", **SHAPE)
    with LLM(path, gpu_experts=9, **OPTIONS) as llm:
        llm.generate([list(range(10, 200))] * 8, GREEDY)
        plan = GpuMemory.of(
            llm.model_config,
            llm.config,
            vram_bytes=4 * GIB,
            cache_tokens=llm.engine.block_pool.num_blocks * llm.config.block_size,
        )
        assert torch.cuda.max_memory_allocated() - before <= plan.on_device


def test_sessions_and_prefixes_on_disk(checkpoint, tmp_path):
    path = checkpoint("deepseek_v3", **SHAPE)
    disk = {"prefix_disk_gib": 0.1, "prefix_dir": tmp_path / "prefix", "prefix_min_tokens": 8}
    options = {**OPTIONS, **disk, "block_size": 4, "gpu_experts": 9}
    with LLM(path, **options) as llm:
        first = _tokens(llm)
    with LLM(path, **options) as llm:
        assert _tokens(llm) == first
        assert llm.engine.counters.cached_tokens >= 16


@pytest.mark.slow
def test_a_thousand_steps(checkpoint, fp32_activations):
    """No drift: the tokens repeat, memory does not grow."""
    path = checkpoint("deepseek_v3", **SHAPE)
    params = SamplingParams(temperature=0.0, max_tokens=100, ignore_eos=True)
    with LLM(path, gpu_experts=9, **OPTIONS) as llm:
        first = _tokens(llm, params)
        assert _tokens(llm, params) == first
        allocated = torch.cuda.memory_allocated()
        for _ in range(10):
            assert _tokens(llm, params) == first
        assert torch.cuda.memory_allocated() <= allocated + (1 << 20)


@pytest.mark.parametrize("placement", ["none", "some"])
def test_streamed_prompts(
    placement, mode, checkpoint, expected_greedy, fp32_activations, monkeypatch
):
    """Chunks of two experts or three, prompts in parts, generation in between."""
    monkeypatch.setattr(ring_size, "CHUNK_BYTES", 48 << 10)
    path = checkpoint("deepseek_v3", **SHAPE)
    options = {**OPTIONS, "stream_prefill_tokens": 8, "max_batch_tokens": 24}
    with LLM(path, gpu_experts=PLACEMENTS[placement], **options) as llm:
        for _ in range(3):
            made = _tokens(llm)
            assert made == expected_greedy(path, PROMPTS, made, NUM_GREEDY)
        assert llm.engine.runner.transfers().streamed_bytes > 0


@pytest.mark.parametrize("expert_format", ["int4_g32", "int8", "fp8"])
def test_streamed_experts_are_those_that_live_there(expert_format, checkpoint, fp32_activations):
    path, ids = checkpoint("deepseek_v3", **SHAPE, moe_intermediate_size=96), list(range(10, 130))
    options = {**OPTIONS, "expert_format": expert_format}
    with LLM(path, gpu_experts=10**6, **options) as llm:
        expected = torch.tensor(llm.score(ids))
    for resident in (0, 11):
        with LLM(path, gpu_experts=resident, stream_prefill_tokens=1, **options) as llm:
            got = torch.tensor(llm.score(ids))
            assert llm.engine.runner.transfers().streamed_bytes > 0
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-4)


def test_the_measured_threshold(checkpoint):
    with LLM(checkpoint("deepseek_v3", **SHAPE), gpu_experts=9, **OPTIONS) as llm:
        runner = llm.engine.runner
        assert runner.ring is not None
        assert runner._stream_tokens >= 1
        assert _tokens(llm)
