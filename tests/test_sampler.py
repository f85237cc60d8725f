"""Sampling: exact distributions, cut-offs, penalties, and randomness that only (seed, position) decide."""

import math

import pytest
import torch

from moejet.ops.sample import sample_tokens
from moejet.ops.sample_ref import sample_tokens_ref
from moejet.request import Request, SamplingParams
from moejet.sampler import BadLogitsError, adjust_logits, derive_seed, sample, uniform


def _request(params: SamplingParams, prompt=(1, 2), output=(), seed=0) -> Request:
    request = Request(
        request_id="r",
        index=0,
        prompt_token_ids=tuple(prompt),
        params=params,
        seed=seed,
        max_total_tokens=100,
        eos_token_ids=frozenset(),
    )
    request.token_ids += list(output)
    return request


def choose(row: torch.Tensor, params: SamplingParams, u: float) -> int:
    """One token, the same from C++ and from the reference."""
    token = sample_tokens(row.unsqueeze(0), [params], [u])[0]
    assert token == sample_tokens_ref(row.unsqueeze(0), [params], [u])[0]
    return token


def _support(row: torch.Tensor, params: SamplingParams, steps: int = 2000) -> set[int]:
    return {choose(row, params, (i + 0.5) / steps) for i in range(steps)}


def test_uniform_numbers_are_uniform_and_reproducible():
    values = [uniform(seed, position) for seed in range(50) for position in range(200)]
    assert values == [uniform(seed, position) for seed in range(50) for position in range(200)]
    assert all(0.0 <= v < 1.0 for v in values)
    assert sum(values) / len(values) == pytest.approx(0.5, abs=0.01)
    assert len(set(values)) == len(values)
    assert sum((v - 0.5) ** 2 for v in values) / len(values) == pytest.approx(1 / 12, rel=0.03)


def test_samples_of_a_request_have_their_own_seeds():
    assert derive_seed(5, 0) == 5
    assert len({derive_seed(5, i) for i in range(64)}) == 64


def test_inverse_transform_matches_softmax():
    row = torch.tensor([0.0, 1.0, 2.0, -1.0])
    expected = torch.softmax(row / 0.7, dim=-1)
    params = SamplingParams(temperature=0.7)
    counts = torch.zeros(4)
    for i in range(4000):
        counts[choose(row, params, (i + 0.5) / 4000)] += 1
    torch.testing.assert_close(counts / 4000, expected, atol=1e-3, rtol=0)


def test_cut_offs_keep_exactly_the_right_tokens():
    row = torch.log(torch.tensor([0.05, 0.4, 0.3, 0.2, 0.05]))
    assert _support(row, SamplingParams(top_k=2)) == {1, 2}
    assert _support(row, SamplingParams(top_p=0.65)) == {1, 2}
    assert _support(row, SamplingParams(top_p=0.71)) == {1, 2, 3}
    assert _support(row, SamplingParams(min_p=0.45)) == {1, 2, 3}
    assert _support(row, SamplingParams(top_k=3, top_p=0.4)) == {1}
    assert _support(row, SamplingParams(top_p=1e-9)) == {1}


def test_large_vocabulary_agrees_with_a_full_sort():
    torch.manual_seed(0)
    row = torch.randn(20000)
    params = SamplingParams(top_p=0.9)
    probs = torch.softmax(row.double(), dim=-1)
    order = torch.argsort(probs, descending=True)
    before = torch.cumsum(probs[order], 0) - probs[order]
    kept = order[before < 0.9]
    weights = probs[kept] / probs[kept].sum()
    for u in (0.0, 0.1, 0.5, 0.9, 0.999999):
        expected = int(kept[torch.searchsorted(torch.cumsum(weights, 0), u, right=True)])
        assert choose(row, params, u) == expected


def test_masked_tokens_are_never_chosen():
    row = torch.tensor([-math.inf, 0.0, -math.inf])
    for u in (0.0, 0.5, 1 - 2**-53):
        assert choose(row, SamplingParams(), u) == 1


def test_greedy_and_seeded_sampling_ignore_the_neighbours():
    torch.manual_seed(1)
    logits = torch.randn(3, 50)
    requests = [
        _request(SamplingParams(temperature=0.0)),
        _request(SamplingParams(temperature=1.0), seed=7),
        _request(SamplingParams(temperature=1.0, top_p=0.8), seed=8),
    ]
    together = [t.token_id for t in sample(logits, requests)]
    alone = [sample(logits[i : i + 1], [r])[0].token_id for i, r in enumerate(requests)]
    assert together == alone
    assert together[0] == int(logits[0].argmax())


def test_penalties_and_bias():
    row = torch.tensor([1.0, -1.0, 2.0, 0.5])
    request = _request(SamplingParams(repetition_penalty=2.0), prompt=(0, 1))
    assert adjust_logits(row, request).tolist() == [0.5, -2.0, 2.0, 0.5]
    params = SamplingParams(presence_penalty=0.5, frequency_penalty=0.25)
    request = _request(params, prompt=(0,), output=(2, 2, 3))
    assert adjust_logits(row, request).tolist() == [1.0, -1.0, 1.0, -0.25]
    request = _request(SamplingParams(logit_bias={1: 100.0}, temperature=0.0))
    assert sample(row.unsqueeze(0), [request])[0].token_id == 1
    assert row.tolist() == [1.0, -1.0, 2.0, 0.5]


def test_logprobs_are_those_of_the_raw_logits():
    row = torch.tensor([[1.0, 2.0, 3.0]])
    params = SamplingParams(temperature=0.0, logprobs=2, logit_bias={0: 50.0})
    token = sample(row, [_request(params)])[0]
    expected = torch.log_softmax(row[0], -1)
    assert token.token_id == 0
    assert token.logprobs.logprob == pytest.approx(float(expected[0]))
    assert [i for i, _ in token.logprobs.top] == [2, 1]


def test_logprobs_of_a_large_vocabulary_match_log_softmax():
    torch.manual_seed(2)
    logits = torch.randn(2, 20000) * 3
    logits[:, 7] = -math.inf
    requests = [
        _request(SamplingParams(temperature=0.0, logprobs=20)),
        _request(SamplingParams(logprobs=0), seed=3),
    ]
    expected = torch.log_softmax(logits.double(), -1)
    for i, token in enumerate(sample(logits, requests)):
        assert token.logprobs.logprob == pytest.approx(float(expected[i, token.token_id]), abs=1e-6)
        assert len(token.logprobs.top) == (20 if i == 0 else 0)
        for token_id, logprob in token.logprobs.top:
            assert logprob == pytest.approx(float(expected[i, token_id]), abs=1e-6)


def test_adjusted_rows_are_checked_before_and_after():
    bias = {0: 100.0}
    requests = [_request(SamplingParams(logit_bias=bias)) for _ in range(2)]
    good, bad = sample(torch.tensor([[0.0, 1.0], [0.0, math.nan]]), requests)
    assert (good.token_id, good.error) == (0, None)
    assert isinstance(bad.error, BadLogitsError)
    overflowing = [_request(SamplingParams(repetition_penalty=0.01, temperature=0.0))]
    assert isinstance(
        sample(torch.tensor([[0.0, 3e38, 0.0]]), overflowing)[0].error, BadLogitsError
    )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_logits_are_an_error_and_name_the_request(bad):
    requests = [_request(SamplingParams(logprobs=2)) for _ in range(3)]
    requests[1].request_id = "broken"
    logits = torch.tensor([[0.0, 9.0], [0.0, bad], [0.0, 9.0]])
    tokens = sample(logits, requests)
    assert isinstance(tokens[1].error, BadLogitsError)
    assert "broken" in str(tokens[1].error)
    assert tokens[1].logprobs is None
    alone = sample(logits[::2], requests[::2])
    assert [tokens[0], tokens[2]] == alone


@pytest.mark.parametrize("temperature", [5e-324, 1e-307, 1e-5, 100.0])
@pytest.mark.parametrize("cut", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.1}])
def test_extreme_temperatures(temperature, cut):
    row = torch.tensor([1.0, 3.0, 2.0, -50.0])
    params = SamplingParams(temperature=temperature, **cut)
    chosen = {choose(row, params, u) for u in (0.0, 0.3, 0.999999)}
    assert chosen == {1} if temperature < 1 else chosen <= {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("presence_penalty", 3.0),
        ("frequency_penalty", -3.0),
        ("seed", 2**64),
        ("max_tokens", 0),
        ("n", 0),
        ("n", 65),
        ("logprobs", 21),
        ("stop", ("",)),
        ("stop_token_ids", (-1,)),
        ("logit_bias", {1: float("inf")}),
        ("logit_bias", [1]),
        ("stop", 5),
        ("stop_token_ids", 5),
        ("stop_token_ids", None),
        ("temperature", 10**400),
        ("ignore_eos", "no"),
    ],
)
def test_impossible_values_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        SamplingParams(**{field: value})
