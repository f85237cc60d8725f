"""The hybrid model while experts come and go on the device: the tokens of transformers, whatever is where."""

from collections import Counter

import pytest
import torch

from moejet import LLM, SamplingParams
from moejet.config import EngineConfig
from moejet.gpu_loading import choose_device
from moejet.gpu_memory import GpuMemory
from moejet.presets import PRESETS
from moejet.testing.checkpoints import reference_logits
from moejet.testing.random_swaps import RandomSwaps
from moejet.testing.tolerances import LOGPROB_LIMITS

NUM_GREEDY = 20
OPTIONS = {
    "device": "simulated",
    "expert_format": "bf16",
    "dense_format": "bf16",
    "cache_dtype": "fp32",
    "max_context": 256,
    "isa": "avx2",
    "stream_prefill_tokens": 0,
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_GREEDY, ignore_eos=True)


def _prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 250, (length,), generator=generator).tolist()


PROMPTS = [_prompt(21, 1), _prompt(5, 2)]


def _swap_at_random(llm: LLM, seed: int) -> RandomSwaps:
    """In place of the policy; and copies are awaited, so that many arrive in a short test."""
    cache = llm.engine.runner.expert_cache
    residents = cache._residents
    policy = RandomSwaps(
        llm.model_config.num_experts,
        [r.num_free for r in residents],
        fixed=[r.slots for r in residents],
        seed=seed,
    )
    cache.policy = policy
    cache.choose_every = 1
    send = cache._send_copied

    def awaiting() -> None:
        for fetch in cache._fetches:
            fetch.copied.result(10)
        send()

    cache._send_copied = awaiting
    return policy


def _tokens(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("gpu_experts", [0, 9])
def test_greedy_tokens_under_random_swaps(family, gpu_experts, checkpoint, expected_greedy):
    path = checkpoint(family)
    with LLM(path, gpu_experts=gpu_experts, expert_cache=8, **OPTIONS) as llm:
        runner = llm.engine.runner
        _swap_at_random(llm, seed=gpu_experts)
        for _ in range(2):
            made = _tokens(llm.generate(PROMPTS, GREEDY))
            assert made == expected_greedy(path, PROMPTS, made, NUM_GREEDY)
        counters = llm.counters()
        assert counters["expert_cache_hits"] > 0
        assert counters["expert_cache_hits"] < counters["expert_cache_uses"]
        assert runner.expert_cache.counters.fetches > 10
        transfers = runner.transfers()
        assert counters["expert_cache_bytes"] == transfers.fetched_bytes > 0
        assert transfers.streamed_bytes == 0 < transfers.copy_seconds


@pytest.mark.parametrize("gpu_experts", [0, 9])
def test_prompts_that_stream_compute_no_expert_twice(gpu_experts, checkpoint, expected_greedy):
    """Among what streams are experts that have a copy in a slot."""
    path = checkpoint("deepseek_v3")
    prompts = [_prompt(9, seed) for seed in range(6)]
    greedy = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    options = {**OPTIONS, "stream_prefill_tokens": 4, "gpu_experts": gpu_experts}
    with LLM(path, expert_cache=16, **options) as llm:
        _swap_at_random(llm, seed=2)
        made = [_tokens(llm.generate([prompt], greedy))[0] for prompt in prompts]
        assert made == expected_greedy(path, prompts, made, 6)
        assert llm.engine.runner.transfers().streamed_bytes > 0
        assert llm.counters()["expert_cache_hits"] > 0


@pytest.mark.parametrize("expert_format", ["int4_g32", "int8", "fp8"])
def test_logprobs_of_quantised_experts_under_random_swaps(expert_format, checkpoint):
    """Weights of a slot are those in RAM, bit for bit; activations are rounded otherwise."""
    path, ids = checkpoint("deepseek_v3", moe_intermediate_size=96), _prompt(90, 6)
    logprobs = torch.log_softmax(reference_logits(path, ids)[:-1].double(), -1)
    exact = logprobs.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
    errors = {}
    for cached in (0, 12):
        options = {**OPTIONS, "expert_format": expert_format, "max_batch_tokens": 6}
        with LLM(path, gpu_experts=3, expert_cache=cached, **options) as llm:
            if cached:
                _swap_at_random(llm, seed=1)
            errors[cached] = (torch.tensor(llm.score(ids)).double() - exact).abs().mean()
            if cached:
                assert llm.counters()["expert_cache_hits"] > 0
    assert errors[12] < 1.3 * errors[0] + LOGPROB_LIMITS["fp32"]


def test_the_policy_fills_the_slots_with_what_is_used(checkpoint):
    """Over the same few tokens the hit rate grows; a second model does the same."""
    rates = []
    for _ in range(2):
        with LLM(checkpoint("deepseek_v3"), gpu_experts=0, expert_cache=12, **OPTIONS) as llm:
            cache = llm.engine.runner.expert_cache
            cache.policy.price, cache.choose_every = 1.0, 1
            send = cache._send_copied
            cache._send_copied = lambda c=cache, s=send: (
                [f.copied.result(10) for f in c._fetches],
                c._stream._stream.synchronize(),
                s(),
            )
            halves = Counter()
            for half in range(2):
                before = llm.counters()
                llm.generate([PROMPTS[1]] * 2, GREEDY)
                gained = {k: v - before[k] for k, v in llm.counters().items()}
                halves[half] = gained["expert_cache_hits"] / gained["expert_cache_uses"]
            rates.append((halves[0], halves[1], llm.counters()["expert_cache_bytes"]))
    assert rates[0] == rates[1]
    assert rates[0][1] > rates[0][0] > 0
    assert rates[0][1] > 12 / 16 * 0.5


@pytest.mark.parametrize("value", [-1, 2.5, "all", True])
def test_options_are_checked(value):
    with pytest.raises(ValueError, match="expert_cache="):
        EngineConfig(model="x", expert_cache=value)


def test_a_cache_needs_a_gpu():
    shape = PRESETS["deepseek-v3"]
    with pytest.raises(ValueError, match="expert_cache=5 needs a GPU"):
        choose_device(EngineConfig(model="x", device="cpu", expert_cache=5), shape)
    assert choose_device(EngineConfig(model="x", device="cpu", expert_cache="auto"), shape) == "cpu"


def _memory(budget: int, **options) -> GpuMemory:
    config = EngineConfig(model="x", expert_format="int4_g32", **options)
    return GpuMemory.of(PRESETS["deepseek-v3"], config, vram_bytes=budget, cache_tokens=8192)


def test_shares_of_the_budget():
    """Of a 48 GiB card: all of what is left is used, no expert is planned twice, and nothing exceeds the budget."""
    budget = 48 << 30
    plain, half = _memory(budget), _memory(budget, expert_cache="auto")
    num_plain = plain.placement.num_resident
    assert plain.placement.num_cached == plain.expert_cache == 0
    assert 0.4 * num_plain < half.placement.num_resident < 0.55 * num_plain
    assert 0.4 * num_plain < half.placement.num_cached < 0.55 * num_plain
    assert budget - (64 << 20) < half.on_device <= budget
    assert half.cpu_experts > plain.cpu_experts
    assert half.pinned > plain.pinned
    fixed = _memory(budget, expert_cache=116)
    assert fixed.placement.cached == (2,) * 58
    assert budget - (64 << 20) < fixed.on_device <= budget
    rest = _memory(budget, expert_cache="auto", gpu_experts=58)
    assert rest.placement.num_resident == 58
    assert rest.placement.num_cached > 0.8 * (num_plain - 58)
    assert rest.on_device <= budget
    nothing = _memory(20 << 30, expert_cache="auto", gpu_experts=58 * 256)
    assert nothing.placement.num_cached == nothing.expert_cache == 0
    everything = _memory(1000 << 30, expert_cache="auto")
    assert everything.placement.num_resident == 58 * 256
    assert everything.placement.num_cached == 0
    exact = EngineConfig(model="x", expert_format="fp32", expert_cache="auto")
    memory = GpuMemory.of(PRESETS["deepseek-v3"], exact, vram_bytes=budget, cache_tokens=8192)
    assert memory.placement.num_cached == 0 < memory.placement.num_resident
    small = _memory(1 << 30, expert_cache="auto")
    assert small.placement.num_resident == small.placement.num_cached == 0
