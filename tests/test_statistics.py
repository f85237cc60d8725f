"""Per-token statistics against float64, their sums in outputs, and the engine's counters."""

import math

import pytest
import torch

from moejet import LLM, SamplingParams
from moejet.engine_counters import EngineCounters
from moejet.ops.token_scores import token_scores
from moejet.statistics import TokenScores, TokenStatistics
from moejet.testing.checkpoints import tiny_checkpoint


def _reference(row: torch.Tensor, token_id: int) -> TokenScores:
    logp = torch.log_softmax(row.double(), dim=-1)
    logp_possible = logp[torch.isfinite(logp)]
    top = torch.sort(logp_possible, descending=True).values
    return TokenScores(
        logprob=float(logp[token_id]),
        entropy=float(-(logp_possible.exp() * logp_possible).sum()),
        gap=float(top[0] - top[1]) if len(top) > 1 else 0.0,
        confidence=float(-top[:20].mean()),
        self_certainty=float(-(logp_possible + math.log(len(logp_possible))).mean()),
        top5_share=float(logp[token_id].exp() / top[:5].exp().sum()),
    )


def _assert_close(got: TokenScores, want: TokenScores) -> None:
    for name in TokenScores.__dataclass_fields__:
        assert getattr(got, name) == pytest.approx(getattr(want, name), rel=1e-4, abs=1e-4), name


@pytest.mark.parametrize(
    ("rows", "vocab", "spread"), [(1, 2, 1.0), (3, 17, 3.0), (5, 320, 30.0), (9, 129281, 3.0)]
)
def test_scores_agree_with_float64(rows, vocab, spread):
    logits = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(rows)) * spread
    tokens = [(7 * i) % vocab for i in range(rows)]
    for row, (token, got) in enumerate(zip(tokens, token_scores(logits, tokens), strict=True)):
        _assert_close(got, _reference(logits[row], token))


def test_scores_of_columns_and_of_impossible_tokens():
    logits = torch.randn(50, 6, generator=torch.Generator().manual_seed(1)).t()[::2]
    logits[1, 10:] = -torch.inf
    got = token_scores(logits, [0, 1, 2])
    for row in range(3):
        _assert_close(got[row], _reference(logits[row], row))
    assert token_scores(torch.zeros(0, 5), []) == []


def test_extremes():
    uniform, certain, single = torch.zeros(1, 64), torch.zeros(1, 64), torch.zeros(1, 64) - 1e9
    certain[0, 5] = 200.0
    single[0, 1:] = -torch.inf
    [flat] = token_scores(uniform, [3])
    assert flat.entropy == pytest.approx(math.log(64), rel=1e-5)
    assert flat.self_certainty == pytest.approx(0.0, abs=1e-5)
    [sure] = token_scores(certain, [5])
    assert sure.entropy == pytest.approx(0.0, abs=1e-6)
    assert sure.gap == pytest.approx(200.0)
    assert sure.self_certainty > 100
    assert (flat.top5_share, sure.top5_share) == pytest.approx((0.2, 1.0))
    assert token_scores(certain * 1e6, [4])[0].top5_share == 0.0
    [only] = token_scores(single, [0])
    assert (only.logprob, only.gap, only.entropy) == pytest.approx((0.0, 0.0, 0.0))


def test_share_among_the_five_likeliest_is_a_softmax_over_them():
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(2)) * 4
    order = torch.sort(logits, descending=True).indices
    tokens = [int(order[row, row]) for row in range(6)]  # ranks 0 to 5: the last is not among them
    shares = [scores.top5_share for scores in token_scores(logits, tokens)]
    for row in range(5):
        softmax = torch.softmax(logits[row].double()[order[row, :5]], dim=0)
        assert shares[row] == pytest.approx(float(softmax[row]), abs=1e-6)
    probs = torch.softmax(logits[5].double(), dim=0)
    assert shares[5] == pytest.approx(float(probs[tokens[5]] / probs[order[5, :5]].sum()), abs=1e-6)


def test_sums_means_and_last():
    statistics = TokenStatistics()
    assert statistics.mean == TokenScores()
    statistics.add(TokenScores(-1.0, 2.0, 3.0, 4.0, 5.0))
    kept = statistics.copy()
    statistics.add(TokenScores(-3.0, 0.0, 1.0, 2.0, 3.0))
    assert statistics.sum == TokenScores(-4.0, 2.0, 4.0, 6.0, 8.0)
    assert statistics.mean == TokenScores(-2.0, 1.0, 2.0, 3.0, 4.0)
    assert statistics.last.logprob == -3.0
    assert kept.num_tokens == 1


@pytest.fixture(scope="module")
def llm(tmp_path_factory):
    path = tiny_checkpoint(tmp_path_factory.mktemp("model"), "deepseek_v3", dtype=torch.bfloat16)
    with LLM(path, expert_format="bf16", dense_format="fp32", max_context=128) as llm:
        yield llm


def test_outputs_hold_statistics_only_if_asked(llm):
    params = SamplingParams(seed=4, max_tokens=9, n=3, ignore_eos=True, logprobs=0, statistics=True)
    outputs = llm.generate("some text", params)[0].outputs
    for output in outputs:
        assert output.statistics.num_tokens == 9
        assert output.statistics.sum.logprob == pytest.approx(output.cumulative_logprob, abs=1e-4)
        assert output.statistics.last.logprob == pytest.approx(output.logprobs[-1].logprob)
        assert 0 < output.statistics.mean.entropy < math.log(llm.model_config.vocab_size)
    assert len({o.statistics.sum.entropy for o in outputs}) == 3
    without = SamplingParams(seed=4, max_tokens=9, n=3, ignore_eos=True)
    plain = llm.generate("some text", without)[0].outputs
    assert [o.statistics for o in plain] == [None] * 3
    assert [o.token_ids for o in plain] == [o.token_ids for o in outputs]


def test_penalties_do_not_change_what_is_measured(llm):
    """Statistics come from the raw logits, like log-probabilities."""
    bias = dict.fromkeys(range(0, 300), -100.0)
    params = SamplingParams(
        seed=1, max_tokens=5, logit_bias=bias, logprobs=0, statistics=True, ignore_eos=True
    )
    output = llm.generate("abc", params)[0].outputs[0]
    assert output.statistics.sum.logprob == pytest.approx(output.cumulative_logprob, abs=1e-4)


def test_counters_tell_prefill_from_decode(llm):
    def after(prompt, tokens):
        before = llm.counters()
        llm.generate(
            prompt, SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True, n=2)
        )
        return EngineCounters(**{k: v - before[k] for k, v in llm.counters().items()})

    prompt = [(3 * i) % 250 + 5 for i in range(90)]
    first = after(prompt, 6)
    # The last token of a sample is never computed.
    assert (first.prefill_tokens, first.decode_tokens, first.cached_tokens) == (90, 2 * 5, 0)
    assert first.steps == 6
    assert (first.prompt_tokens, first.generated_tokens) == (90, 2 * 6)
    second = after(prompt, 2)
    size = llm.engine.block_pool.block_size
    assert second.cached_tokens == 89 // size * size > 0
    assert second.prefill_tokens == 90 - second.cached_tokens
    assert second.preemptions == 0
