"""Steps over a simulated device: who chooses tokens, what the cache and the CPU get to see, and what failures leave."""

import time

import pytest
import torch

from moejet import LLM, SamplingParams
from moejet.batch import Batch
from moejet.config import EngineConfig
from moejet.gpu_loading import choose_device
from moejet.presets import PRESETS

OPTIONS = {
    "expert_format": "bf16",
    "dense_format": "bf16",
    "cache_dtype": "fp32",
    "max_context": 256,
    "isa": "avx2",
    "seed": 5,
}
SIMULATED = {**OPTIONS, "device": "simulated", "gpu_experts": 9}
PROMPTS = [list(range(20, 37)), [7, 9, 30], list(range(90, 99))]


@pytest.fixture
def sampled(monkeypatch):
    """Kinds of choices that were made on the device."""
    from moejet import decode_graphs, gpu_runner

    seen = []
    original = gpu_runner.sample_on_device

    def record(logits, columns, **options):
        seen.append((columns.is_random, columns.has_cut_offs))
        return original(logits, columns, **options)

    for module in (decode_graphs, gpu_runner):
        monkeypatch.setattr(module, "sample_on_device", record)
    return seen


def _tokens(llm: LLM, params) -> list[list[int]]:
    return [list(o.token_ids) for r in llm.generate(PROMPTS, params) for o in r.outputs]


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"temperature": 0.0}, (False, False)),
        ({"temperature": 1.0}, (True, False)),
        ({"temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.02, "n": 3}, (True, True)),
    ],
)
def test_the_device_chooses_what_the_cpu_would(changes, kind, checkpoint, sampled):
    params = SamplingParams(max_tokens=16, ignore_eos=True, **changes)
    path = checkpoint("deepseek_v3")
    with LLM(path, device="cpu", **OPTIONS) as llm:
        expected = _tokens(llm, params)
        assert sampled == []
    with LLM(path, **SIMULATED) as llm:
        assert _tokens(llm, params) == expected
    assert len(sampled) >= 16
    assert set(sampled) == {kind}


@pytest.mark.parametrize(
    "changes",
    [
        {"repetition_penalty": 1.3},
        {"logit_bias": {40: 5.0}},
        {"logprobs": 2},
        {"statistics": True},
    ],
)
def test_the_host_chooses_where_more_is_asked(changes, checkpoint, sampled):
    plain = SamplingParams(temperature=0.7, max_tokens=8, ignore_eos=True)
    special = SamplingParams(temperature=0.7, max_tokens=8, ignore_eos=True, **changes)
    path = checkpoint("deepseek_v3")
    with LLM(path, device="cpu", **OPTIONS) as llm:
        expected = _tokens(llm, [plain, special, plain])
    with LLM(path, **SIMULATED) as llm:
        assert _tokens(llm, [plain, special, plain]) == expected
    assert sampled == []


def test_padding_reaches_neither_the_cache_nor_the_cpu(checkpoint):
    with LLM(checkpoint("deepseek_v3"), **{**SIMULATED, "gpu_experts": 0}) as llm:
        runner, size = llm.engine.runner, llm.config.block_size
        ids = []
        for moe in runner.model.moe_layers:
            submit = moe.experts.submit

            def spy(x, topk_ids, topk_weights, submit=submit):
                ids.append(topk_ids.clone())
                submit(x, topk_ids, topk_weights)

            moe.experts.submit = spy
        with (
            llm.engine.scratch_request([5, 6, 7]) as a,
            llm.engine.scratch_request([8, 9]) as b,
            llm.engine.scratch_request([3]) as c,
        ):
            requests = [a, b, c]
            lens = [2, 1, 0]
            for request, num in zip(requests, lens, strict=True):
                if num:
                    runner.execute(Batch.build([request], [num], block_size=size))
                    request.num_computed_tokens = num
            before = runner.latent_cache.clone()
            ids.clear()
            logits = runner.execute(Batch.build(requests, [1, 1, 1], block_size=size))
            changed = (runner.latent_cache != before).any(-1).nonzero().tolist()
            blocks = {r.block_table[0] for r in requests}
            slots = {(r.block_table[0], n) for r, n in zip(requests, lens, strict=True)}
        assert logits.shape == (3, llm.model_config.vocab_size)
        assert {(block, offset) for _, block, offset in changed} == slots
        assert len(blocks) == 3
        assert len(ids) == llm.model_config.num_moe_layers
        for layer in ids:
            assert layer.shape[0] == 4
            assert (layer[:3] >= 0).all()
            assert (layer[3] == -1).all()


def test_a_batch_does_not_change_what_a_row_gets(checkpoint):
    """One request alone and among others, padded to other sizes."""
    with LLM(checkpoint("moonlight"), **SIMULATED) as llm:
        params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
        alone = [list(llm.generate([p], params)[0].outputs[0].token_ids) for p in PROMPTS]
        assert _tokens(llm, params) == alone


@pytest.mark.parametrize("gpu_experts", [0, 9])
def test_a_worker_that_fails_costs_nobody_tokens(gpu_experts, checkpoint, expected_greedy):
    path = checkpoint("deepseek_v3")
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    with LLM(path, **{**SIMULATED, "gpu_experts": gpu_experts}) as llm:
        made = _tokens(llm, params)
        assert made == expected_greedy(path, PROMPTS, made, 10)
        llm.engine.runner.bridge._native.fail_once(1, 0)
        assert _tokens(llm, params) == made


def test_a_failed_step_raises_and_leaves_the_runner_usable(checkpoint):
    with LLM(checkpoint("deepseek_v3"), **SIMULATED) as llm:
        runner, size = llm.engine.runner, llm.config.block_size
        for tokens in ([4], list(range(30, 50))):  # a decode batch, a prompt
            with llm.engine.scratch_request(tokens) as request:
                batch = Batch.build([request], [len(tokens)], block_size=size)
                good = runner.execute(batch)
                runner.bridge._native.fail_once(0, 0)
                with pytest.raises(RuntimeError):
                    runner.execute(batch)
                assert torch.equal(runner.execute(batch), good)


def test_a_pool_that_is_gone_is_an_error_within_seconds(checkpoint):
    with LLM(checkpoint("deepseek_v3"), **SIMULATED) as llm:
        runner, size = llm.engine.runner, llm.config.block_size
        with llm.engine.scratch_request([4]) as request:
            batch = Batch.build([request], [1], block_size=size)
            runner.execute(batch)
            runner.pool.close()
            start = time.monotonic()
            for _ in range(2):
                with pytest.raises(RuntimeError):
                    runner.execute(batch)
            assert time.monotonic() - start < 5.0


def test_a_worker_that_is_stuck_is_an_error_within_seconds(checkpoint, monkeypatch):
    """When it is back, the model goes on."""
    monkeypatch.delenv("MOEJET_WORKER_TIMEOUT", raising=False)
    with LLM(checkpoint("deepseek_v3"), num_threads=2, **SIMULATED) as llm:
        runner, size = llm.engine.runner, llm.config.block_size
        with llm.engine.scratch_request(list(range(30, 50))) as request:
            batch = Batch.build([request], [20], block_size=size)
            good = runner.execute(batch)
            runner.bridge._native.fail_once(1, 1, 5.5)
            start = time.monotonic()
            with pytest.raises(RuntimeError, match="worker 1 did not finish within 3 s") as caught:
                runner.execute(batch)
            assert time.monotonic() - start < 5.0
            assert any("worker 1 is not back" in note for note in caught.value.__notes__)
            with pytest.raises(RuntimeError, match="worker 1 is not back from a step that failed"):
                runner.execute(batch)
            assert time.monotonic() - start < 5.0
            time.sleep(max(0.0, start + 6.0 - time.monotonic()))
            assert torch.equal(runner.execute(batch), good)


def test_sessions_and_prefixes_on_disk(checkpoint, tmp_path):
    path = checkpoint("deepseek_v3")
    disk = {"prefix_disk_gib": 0.1, "prefix_dir": tmp_path / "prefix", "prefix_min_tokens": 8}
    options = {**SIMULATED, **disk, "block_size": 4}
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    with LLM(path, **options) as llm:
        first = _tokens(llm, params)
    with LLM(path, **options) as llm:
        assert _tokens(llm, params) == first
        assert llm.engine.counters.cached_tokens >= 16


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"device": "simulated", "dense_format": "fp32"}, "use 'bf16'"),
        ({"device": "simulated", "deterministic": True}, "deterministic=True is for the CPU"),
        ({"device": "cpu", "vram_gib": 8}, "vram_gib=8 needs a GPU"),
        ({"device": "cpu", "gpu_experts": 3}, "gpu_experts=3 needs a GPU"),
    ],
)
def test_contradicting_options(options, words):
    with pytest.raises(ValueError, match=words):
        choose_device(EngineConfig(model="x", **options), PRESETS["deepseek-v3"])


@pytest.mark.parametrize(
    "options", [{"device": "gpu"}, {"vram_gib": 0}, {"vram_gib": "8"}, {"gpu_experts": -1}]
)
def test_options_are_checked(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        EngineConfig(model="x", **options)


def test_without_a_gpu_auto_is_the_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("MOEJET_DEVICE", raising=False)
    assert choose_device(EngineConfig(model="x"), PRESETS["deepseek-v3"]) == "cpu"
    with pytest.raises(ValueError, match="torch sees no CUDA device"):
        choose_device(EngineConfig(model="x", device="cuda"), PRESETS["deepseek-v3"])
    with pytest.raises(ValueError, match=r"vram_gib=4 needs a GPU: torch sees no CUDA device"):
        choose_device(EngineConfig(model="x", vram_gib=4), PRESETS["deepseek-v3"])


def test_with_a_gpu_auto_takes_it_unless_the_options_need_the_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.delenv("MOEJET_DEVICE", raising=False)
    shape = PRESETS["deepseek-v3"]
    assert choose_device(EngineConfig(model="x"), shape) == "cuda"
    for options in ({"deterministic": True}, {"dense_format": "fp32"}, {"block_size": 24}):
        assert choose_device(EngineConfig(model="x", **options), shape) == "cpu"
        with pytest.raises(ValueError, match=next(iter(options))):
            choose_device(EngineConfig(model="x", device="cuda", **options), shape)
    monkeypatch.setenv("MOEJET_DEVICE", "cpu")
    assert choose_device(EngineConfig(model="x"), shape) == "cpu"
    monkeypatch.setenv("MOEJET_DEVICE", "tpu")
    with pytest.raises(ValueError, match="MOEJET_DEVICE='tpu'"):
        choose_device(EngineConfig(model="x"), shape)
