"""The hybrid model over a simulated device: the tokens of transformers, wherever the routed experts live.

Every operation runs its torch reference, the CPU's share goes through the bridge over a simulated stream. Weights are
rounded to bf16, so that bf16 matrices and experts lose nothing.
"""

import pytest
import torch

from moejet import LLM, SamplingParams
from moejet.testing.checkpoints import FAMILIES, random_prompt, reference_logprobs
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


PROMPTS = [random_prompt(21, 1), random_prompt(5, 2), random_prompt(40, 3)]


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
        made = _tokens(llm.generate(PROMPTS, GREEDY))
        expected = expected_greedy(checkpoint(family), PROMPTS, made, NUM_GREEDY)
        assert made == expected
        # The second time the prompts are found in the cache.
        assert _tokens(llm.generate(PROMPTS, GREEDY)) == expected
        assert llm.engine.counters.cached_tokens > 0


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
def test_chunked_prompts_beside_decoding(family, checkpoint, expected_greedy):
    """Chunks of prompts and single tokens in one batch, absorbed and expanded attention side by side."""
    options = {**OPTIONS, "max_batch_tokens": 13, "max_mixed_tokens": 11, "block_size": 4}
    path = checkpoint(family)
    with LLM(path, gpu_experts=9, **options) as llm:
        seen = set()
        llm.engine.on_scheduled = lambda batch: seen.add(tuple(sorted(set(batch.query_lens))))
        made = _tokens(llm.generate(PROMPTS, GREEDY))
    assert made == expected_greedy(path, PROMPTS, made, NUM_GREEDY)
    assert any(lens[0] == 1 and lens[-1] > 8 for lens in seen), seen


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_of_every_position(family, checkpoint):
    ids = random_prompt(60, 4)
    expected = reference_logprobs(checkpoint(family), ids)
    for chunk in (512, 11, 7):  # 7: absorbed attention of several tokens of one request
        with LLM(
            checkpoint(family), gpu_experts=7, **{**OPTIONS, "max_batch_tokens": chunk}
        ) as llm:
            got = torch.tensor(llm.score(ids), dtype=torch.float64)
        assert float((got - expected).abs().max()) < LOGPROB_LIMITS["fp32"]


def test_tied_embeddings_and_attention_bias(checkpoint, expected_greedy):
    path = checkpoint("deepseek_v3", tie_word_embeddings=True, attention_bias=True)
    with LLM(path, gpu_experts=9, **OPTIONS) as llm:
        made = _tokens(llm.generate(PROMPTS[:1], GREEDY))
    assert made == expected_greedy(path, PROMPTS[:1], made, NUM_GREEDY)


@pytest.mark.parametrize("expert_format", ["int4_g32", "int8", "fp8"])
@pytest.mark.parametrize("gpu_experts", [0, 13])
def test_quantised_weights_lose_what_they_lose_on_the_cpu(expert_format, gpu_experts, checkpoint):
    path, ids = checkpoint("deepseek_v3", moe_intermediate_size=96), random_prompt(100, 6)
    exact = reference_logprobs(path, ids)

    def error(**options) -> float:
        with LLM(path, expert_format=expert_format, max_context=256, **options) as llm:
            return float((torch.tensor(llm.score(ids)).double() - exact).abs().mean())

    assert error(device="simulated", gpu_experts=gpu_experts) < 1.3 * error(device="cpu")
