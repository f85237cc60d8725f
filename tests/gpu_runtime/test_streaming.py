"""Prompts whose experts stream through the ring, over a simulated device: as transformers, and as without the ring."""

from contextlib import ExitStack

import pytest
import torch

from moejet import LLM, SamplingParams
from moejet.batch import Batch
from moejet.config import EngineConfig, ModelConfig
from moejet.experts import expert_ring, ring_size
from moejet.experts.ring_copies import StagedCopies
from moejet.experts.stream_threshold import cpu_seconds_per_token, guessed_threshold
from moejet.presets import PRESETS
from moejet.testing.checkpoints import FAMILIES, hf_config, reference_logprobs
from moejet.testing.gguf_files import write_gguf
from moejet.testing.tolerances import LOGPROB_LIMITS

OPTIONS = {
    "device": "simulated",
    "expert_format": "bf16",
    "dense_format": "bf16",
    "cache_dtype": "fp32",
    "max_context": 256,
    "isa": "avx2",
    "stream_prefill_tokens": 1,
}
IDS = torch.randint(10, 250, (60,), generator=torch.Generator().manual_seed(7)).tolist()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Of two experts or three: about 48 KiB in bf16."""
    monkeypatch.setattr(ring_size, "CHUNK_BYTES", 48 << 10)


def _streamed(llm: LLM) -> int:
    return llm.engine.runner.transfers().streamed_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_of_every_position(family, checkpoint):
    expected = reference_logprobs(checkpoint(family), IDS)
    cases = [(17, 7)] if family != "deepseek_v3" else [(17, 7), (512, 0)]
    for chunk, resident in cases:
        options = {**OPTIONS, "max_batch_tokens": chunk, "gpu_experts": resident}
        with LLM(checkpoint(family), **options) as llm:
            ring = llm.engine.runner.ring
            assert len(ring._chunks) > 2 * len(ring._layers)
            got = torch.tensor(llm.score(IDS), dtype=torch.float64)
            assert _streamed(llm) > 0
        assert float((got - expected).abs().max()) < LOGPROB_LIMITS["fp32"]


@pytest.mark.parametrize("gpu_experts", [0, 9])
def test_prompts_stream_and_generated_tokens_do_not(gpu_experts, checkpoint, expected_greedy):
    """Beside prefixes that are found, prompts in chunks, and requests that generate meanwhile."""
    path, num = checkpoint("deepseek_v3"), 12
    prompts = [IDS[:21], IDS[30:35], IDS[:40]]
    greedy = SamplingParams(temperature=0.0, max_tokens=num, ignore_eos=True)
    options = {**OPTIONS, "max_batch_tokens": 13, "max_mixed_tokens": 11, "block_size": 4}
    with LLM(path, gpu_experts=gpu_experts, **options) as llm:
        runner = llm.engine.runner
        for _ in range(2):
            made = [list(o.outputs[0].token_ids) for o in llm.generate(prompts, greedy)]
            assert made == expected_greedy(path, prompts, made, num)
        served = runner.bridge.counters()["layers"]
        assert served > 0
        assert _streamed(llm) > 0
        before = _streamed(llm)
        with llm.engine.scratch_request(IDS[:20]) as request:
            runner.execute(Batch.build([request], [20], block_size=4))
        assert runner.bridge.counters()["layers"] == served
        assert _streamed(llm) > before


@pytest.mark.parametrize("expert_format", ["int4_g32", "int8", "fp8", "Q4_0", "Q8_0"])
def test_every_format_as_if_experts_lived_there(expert_format, checkpoint, tmp_path):
    path = checkpoint("deepseek_v3", moe_intermediate_size=96)
    options = {**OPTIONS, "expert_format": expert_format}
    if expert_format.startswith("Q"):
        path = write_gguf(path, tmp_path / "model.gguf", expert_format)
        options |= {"expert_format": "native", "dense_format": "native"}
    with LLM(path, **options) as llm:
        assert llm.engine.runner.ring is None
        expected = torch.tensor(llm.score(IDS))
    for resident in (0, 11):
        with LLM(path, gpu_experts=resident, **options) as llm:
            got = torch.tensor(llm.score(IDS))
            assert _streamed(llm) > 0
        torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


def test_only_from_the_threshold_on(checkpoint):
    options = {**OPTIONS, "stream_prefill_tokens": 20}
    with LLM(checkpoint("deepseek_v3"), gpu_experts=0, **options) as llm:
        llm.score(IDS[:19])
        assert _streamed(llm) == 0
        llm.score(IDS[:20])
        assert llm.engine.runner.transfers().chunks == len(llm.engine.runner.ring._chunks)
        assert llm.engine.runner.transfers().copy_seconds > 0.0
    with LLM(
        checkpoint("deepseek_v3"), gpu_experts=0, **{**options, "stream_prefill_tokens": 0}
    ) as llm:
        assert llm.engine.runner.ring is None
        llm.score(IDS)
        assert _streamed(llm) == 0


@pytest.mark.parametrize("fails", ["gpu_experts", "shared", "copy"])
def test_a_step_that_fails_leaves_all_in_order(fails, checkpoint, monkeypatch):
    """In the ring, between submitting and collecting, and on the copies' thread; then steps of both kinds."""
    options = {**OPTIONS, "stream_prefill_tokens": 20}
    with LLM(checkpoint("deepseek_v3"), gpu_experts=5, **options) as llm, ExitStack() as stack:
        runner, batches = llm.engine.runner, []
        for tokens in (IDS, IDS[:10]):
            request = stack.enter_context(llm.engine.scratch_request(tokens))
            batches.append(Batch.build([request], [len(tokens)], block_size=llm.config.block_size))
        many, few = batches
        good = [runner.execute(batch) for batch in batches]
        calls = iter(range(10**6))

        def break_sometimes(function):
            def broken(*args, **kwargs):
                if next(calls) == 3:
                    raise RuntimeError("out of something")
                return function(*args, **kwargs)

            return broken

        with monkeypatch.context() as patch:
            if fails == "gpu_experts":
                patch.setattr(expert_ring, "gpu_experts", break_sometimes(expert_ring.gpu_experts))
            elif fails == "copy":
                patch.setattr(StagedCopies, "_fill", break_sometimes(StagedCopies._fill))
            else:
                calls = iter((3,))
                shared = llm.engine.runner.model.moe_layers[0]
                patch.setattr(shared, "shared_experts", break_sometimes(shared.shared_experts))
            with pytest.raises(RuntimeError, match="out of something"):
                runner.execute(many)
        for _ in range(2):
            assert torch.equal(runner.execute(few), good[1])
            assert torch.equal(runner.execute(many), good[0])


def test_the_guessed_threshold():
    """DeepSeek-V3 in int4: 6.3 GB a layer take a third of a second, a token 1.4 ms."""
    tokens = guessed_threshold(256 * 24_772_608, PRESETS["deepseek-v3"])
    assert 200 < tokens < 250
    options = {**OPTIONS, "stream_prefill_tokens": "auto"}
    model = ModelConfig.from_hf(hf_config("deepseek_v3"))
    with LLM.synthetic(model, gpu_experts=0, **options) as llm:
        runner = llm.engine.runner
        assert runner._stream_tokens == guessed_threshold(runner.ring.layer_bytes, llm.model_config)


def test_the_cpu_is_measured_with_what_it_has(checkpoint):
    """More and more tokens up to those of a step; experts on the GPU are none of its business."""
    options = {**OPTIONS, "gpu_experts": 9, "max_batch_tokens": 100}
    with LLM(checkpoint("deepseek_v3"), **options) as llm:
        layer = llm.engine.runner.model.moe_layers[0].experts
        asked = []
        run = layer.cpu.run_kernels

        def watched(x, ids, weights, out):
            asked.append((x.shape[0], set(ids.flatten().tolist())))
            run(x, ids, weights, out)

        layer.cpu.run_kernels = watched
        seconds = cpu_seconds_per_token(
            layer, llm.model_config, max_tokens=100, dtype=torch.bfloat16
        )
    assert 0.0 < seconds < 0.1
    assert [tokens for tokens, _ in asked] == [32, 32, 64, 100]
    assert asked[-1][1] == {-1, *layer.in_ram}


@pytest.mark.parametrize("value", [-1, 1.5, True, "sometimes", None])
def test_bad_options_are_refused(value):
    with pytest.raises(ValueError, match=r"stream_prefill_tokens=.* must be an integer .*'auto'"):
        EngineConfig(model="x", stream_prefill_tokens=value)
