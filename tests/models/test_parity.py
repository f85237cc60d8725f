"""Tokens and log-probabilities against transformers, for every family and every way through the engine.

Checkpoints are tiny and random, their weights rounded to bf16, so that bf16 experts lose nothing. The instruction sets
up to AVX-512 compute bf16 experts in fp32 and must match to fp32 accuracy; AMX rounds activations to bf16.
"""

import pytest
import torch

from moejet import LLM, SamplingParams
from moejet.testing.checkpoints import (
    FAMILIES,
    random_prompt,
    reference_logits,
    reference_logprobs,
    tiny_checkpoint,
)
from moejet.testing.tolerances import LOGPROB_LIMITS, logprob_error

NUM_GREEDY = 64
EXACT = {"expert_format": "bf16", "dense_format": "fp32", "cache_dtype": "fp32", "max_context": 256}


PROMPTS = [random_prompt(21, 1), random_prompt(5, 2), random_prompt(40, 3)]
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_GREEDY, ignore_eos=True)


@pytest.fixture(params=["avx512", "avx2", "scalar"])
def exact_isa(request, usable_isa):
    return usable_isa(request.param)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_alone_batched_and_chunked(family, checkpoint, expected_greedy, exact_isa):
    if exact_isa == "scalar" and family != "deepseek_v3":
        pytest.skip("the scalar table is slow; one family covers it")
    path = checkpoint(family)
    with LLM(path, isa=exact_isa, **EXACT) as llm:
        alone = llm.generate([PROMPTS[0]], GREEDY)[0].outputs[0]
        batch = [list(r.outputs[0].token_ids) for r in llm.generate(PROMPTS, GREEDY)]
        expected = expected_greedy(path, PROMPTS, batch, NUM_GREEDY)
        assert batch == expected
        assert list(alone.token_ids) == expected[0]
        assert alone.finish_reason == "length"
    with LLM(path, isa=exact_isa, max_batch_tokens=7, block_size=4, **EXACT) as llm:
        chunked = llm.generate(PROMPTS, GREEDY)
        assert [list(r.outputs[0].token_ids) for r in chunked] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_logprobs_of_every_position(family, checkpoint, exact_isa):
    if exact_isa == "scalar" and family != "deepseek_v3":
        pytest.skip("the scalar table is slow; one family covers it")
    ids = random_prompt(60, 4)
    expected = reference_logprobs(checkpoint(family), ids)
    for chunk in (512, 11):
        options = {**EXACT, "max_batch_tokens": chunk}
        with LLM(checkpoint(family), isa=exact_isa, **options) as llm:
            got = torch.tensor(llm.score(ids), dtype=torch.float64)
        assert float((got - expected).abs().max()) < LOGPROB_LIMITS["fp32"]


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3"])
@pytest.mark.parametrize("isa", ["avx512_bf16", "amx", "amx_emulated"])
def test_tile_log_probabilities(family, isa, checkpoint, usable_isa):
    ids = random_prompt(120, 5)
    expected = reference_logprobs(checkpoint(family), ids)
    with LLM(checkpoint(family), isa=usable_isa(isa), **EXACT) as llm:
        got = torch.tensor(llm.score(ids), dtype=torch.float64)
    likely = expected > -9.0
    assert float((got - expected).abs()[likely].max()) < LOGPROB_LIMITS["bf16"]


@pytest.mark.parametrize(
    ("expert_format", "allowed"), [("bf16", 1.5), ("int8", 2.0), ("int4_g32", 4.0)]
)
def test_default_precision_costs_no_more_than_bf16_does(expert_format, allowed, checkpoint):
    """bf16 dense layers and packed experts, measured by what transformers itself loses in bf16.

    Means, because in a random model a rounded router score sometimes sends a token elsewhere.
    """
    path, ids = checkpoint("deepseek_v3"), random_prompt(200, 6)
    exact = reference_logprobs(path, ids)
    theirs = reference_logprobs(path, ids, torch.bfloat16)
    with LLM(path, expert_format=expert_format, max_context=256) as llm:
        ours = torch.tensor(llm.score(ids), dtype=torch.float64)
    error = float((ours - exact).abs().mean())
    assert error < allowed * float((theirs - exact).abs().mean())


@pytest.mark.parametrize(("expert_format", "allowed"), [("int8", 2.5), ("int4_g32", 4.0)])
def test_int8_arithmetic_of_a_whole_model(expert_format, allowed, checkpoint, usable_isa):
    """int8 tiles in experts and dense layers, by the same measure: 1.7 and 2.7 times what bf16 loses there."""
    path, ids = checkpoint("deepseek_v3"), random_prompt(200, 6)
    exact = reference_logprobs(path, ids)
    theirs = reference_logprobs(path, ids, torch.bfloat16)
    isa = usable_isa("amx_emulated")
    with LLM(path, isa=isa, arithmetic="int8", expert_format=expert_format, max_context=256) as llm:
        model = llm.engine.runner.model
        packed = [model.lm_head.packed.weights, model.layers[0].attention.o_proj.packed.weights]
        packed += [model.moe_layers[0].experts, model.moe_layers[0].shared_experts.packed]
        assert [weights.arithmetic for weights in packed] == ["int8"] * 4
        ours = torch.tensor(llm.score(ids), dtype=torch.float64)
    error = float((ours - exact).abs().mean())
    assert error < allowed * float((theirs - exact).abs().mean())


def test_tied_embeddings_and_attention_bias(tmp_path):
    path = tiny_checkpoint(
        tmp_path, "deepseek_v3", dtype=torch.bfloat16, tie_word_embeddings=True, attention_bias=True
    )
    ids = random_prompt(30, 7)
    logits = reference_logits(path, ids)
    with LLM(path, isa="auto", **EXACT) as llm:
        result = llm.generate(
            [ids], SamplingParams(temperature=0.0, max_tokens=1, logprobs=5, ignore_eos=True)
        )
    entry = result[0].outputs[0].logprobs[0]
    expected = torch.log_softmax(logits[-1].double(), -1)
    for token_id, logprob in entry.top:
        assert logprob == pytest.approx(float(expected[token_id]), abs=LOGPROB_LIMITS["bf16"])


def test_preempted_requests_give_the_same_tokens(checkpoint, expected_greedy, usable_isa):
    """A cache too small for all three at once: someone is thrown out and computed again."""
    options = {**EXACT, "max_context": 112, "cache_tokens": 160, "block_size": 8}
    path = checkpoint("deepseek_v3")
    with LLM(path, isa=usable_isa("avx2"), **options) as llm:
        result = llm.generate(PROMPTS, GREEDY)
        assert llm.engine.scheduler.num_preemptions > 0
        llm.engine.scheduler.check_integrity()
    made = [list(r.outputs[0].token_ids) for r in result]
    assert made == expected_greedy(path, PROMPTS, made, NUM_GREEDY)


def test_logits_of_the_whole_vocabulary(checkpoint, usable_isa):
    from moejet.batch import Batch

    ids = random_prompt(33, 8)
    expected = reference_logits(checkpoint("deepseek_v2_lite"), ids)
    with (
        LLM(checkpoint("deepseek_v2_lite"), isa=usable_isa("avx2"), **EXACT) as llm,
        llm.engine.scratch_request(ids) as request,
    ):
        batch = Batch.build([request], [33], block_size=llm.config.block_size)
        batch.logits_indices = torch.arange(33)
        logits = llm.engine.runner.execute(batch)
    assert logprob_error(logits, expected) < LOGPROB_LIMITS["fp32"]
