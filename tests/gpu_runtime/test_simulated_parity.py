"""The hybrid model over a simulated device: the tokens of transformers, wherever the routed experts live.

Every operation runs its torch reference, the CPU's share goes through the bridge over a simulated stream. Weights are
rounded to bf16, so that bf16 matrices and experts lose nothing.
"""

import pytest
import torch

from moejet import LLM, SamplingParams
from moejet.testing.checkpoints import FAMILIES, reference_greedy, reference_logits
from moejet.testing.tolerances import LOGPROB_LIMITS

NUM_GREEDY = 24
OPTIONS = {
    "device": "simulated",
    "expert_format": "bf16",
    "dense_format": "bf16",
    "cache_dtype": "fp32",
    "max_context": 256,
    "isa": "avx2",
}
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_GREEDY, ignore_eos=True)


@pytest.fixture(scope="module")
def expected_greedy(checkpoint):
    made: dict[str, list[int]] = {}

    def get(family: str, prompt: list[int]) -> list[int]:
        key = f"{family} {prompt}"
        if key not in made:
            tokens = reference_greedy(checkpoint(family), prompt, NUM_GREEDY)
            made[key] = tokens[-NUM_GREEDY:]
        return made[key]

    return get


def _prompt(length: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(10, 250, (length,), generator=generator).tolist()


PROMPTS = [_prompt(21, 1), _prompt(5, 2), _prompt(40, 3)]


def _tokens(outputs) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


def _num_experts(llm: LLM) -> int:
    return llm.model_config.num_moe_layers * llm.model_config.num_experts


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placement", ["none", "some", "all"])
def test_greedy_tokens(family, placement, checkpoint, expected_greedy):
    count = {"none": 0, "some": 11, "all": 10**6}[placement]
    with LLM(checkpoint(family), gpu_experts=count, **OPTIONS) as llm:
        runner = llm.engine.runner
        resident = sum(
            0 if moe.experts.resident is None else len(moe.experts.resident.slots)
            for moe in runner.model.moe_layers
        )
        assert resident == min(count, _num_experts(llm))
        assert (runner.bridge is None) == (placement == "all")
        expected = [expected_greedy(family, prompt) for prompt in PROMPTS]
        assert _tokens(llm.generate(PROMPTS, GREEDY)) == expected
        # The second time the prompts are found in the cache.
        assert _tokens(llm.generate(PROMPTS, GREEDY)) == expected
        assert llm.engine.counters.cached_tokens > 0


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_chunked_prompts_beside_decoding(family, checkpoint, expected_greedy):
    """Chunks of prompts and single tokens in one batch, absorbed and expanded attention side by side."""
    options = {**OPTIONS, "max_batch_tokens": 13, "max_mixed_tokens": 11, "block_size": 4}
    expected = [expected_greedy(family, prompt) for prompt in PROMPTS]
    with LLM(checkpoint(family), gpu_experts=9, **options) as llm:
        seen = set()
        llm.engine.on_scheduled = lambda batch: seen.add(tuple(sorted(set(batch.query_lens))))
        assert _tokens(llm.generate(PROMPTS, GREEDY)) == expected
    assert any(lens[0] == 1 and lens[-1] > 8 for lens in seen), seen


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_of_every_position(family, checkpoint):
    ids = _prompt(60, 4)
    logits = reference_logits(checkpoint(family), ids)
    logprobs = torch.log_softmax(logits[:-1].double(), -1)
    expected = logprobs.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)
    for chunk in (512, 11, 7):  # 7: absorbed attention of several tokens of one request
        with LLM(
            checkpoint(family), gpu_experts=7, **{**OPTIONS, "max_batch_tokens": chunk}
        ) as llm:
            got = torch.tensor(llm.score(ids), dtype=torch.float64)
        assert float((got - expected).abs().max()) < LOGPROB_LIMITS["fp32"]


def test_tied_embeddings_and_attention_bias(checkpoint):
    path = checkpoint("deepseek_v3", tie_word_embeddings=True, attention_bias=True)
    expected = reference_greedy(path, PROMPTS[0], NUM_GREEDY)[-NUM_GREEDY:]
    with LLM(path, gpu_experts=9, **OPTIONS) as llm:
        assert _tokens(llm.generate([PROMPTS[0]], GREEDY)) == [expected]


@pytest.mark.parametrize("expert_format", ["int4_g32", "int8", "fp8"])
@pytest.mark.parametrize("gpu_experts", [0, 13])
def test_quantised_weights_lose_what_they_lose_on_the_cpu(expert_format, gpu_experts, checkpoint):
    path, ids = checkpoint("deepseek_v3", moe_intermediate_size=96), _prompt(100, 6)
    logprobs = torch.log_softmax(reference_logits(path, ids)[:-1].double(), -1)
    exact = logprobs.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).squeeze(1)

    def error(**options) -> float:
        with LLM(path, expert_format=expert_format, max_context=256, **options) as llm:
            return float((torch.tensor(llm.score(ids)).double() - exact).abs().mean())

    assert error(device="simulated", gpu_experts=gpu_experts) < 1.3 * error(device="cpu")
