"""The hybrid model over a simulated device: the tokens of transformers, wherever the routed experts live.

Every operation runs its torch reference, the CPU's share goes through the bridge over a simulated stream. Weights are
rounded to bf16, so that bf16 matrices and experts lose nothing.
"""

import pytest
import torch

from moejet import LLM, SamplingParams
from moejet.testing.checkpoints import FAMILIES, reference_greedy, reference_logits, tiny_checkpoint
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
def checkpoint(tmp_path_factory):
    made = {}

    def get(family: str):
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            made[family] = tiny_checkpoint(path, family, dtype=torch.bfloat16)
        return made[family]

    return get


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
