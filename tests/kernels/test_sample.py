"""Sampling and the largest logits in Triton: compiled ahead of time for every architecture, run on a GPU."""

import math

import pytest
import torch

from moejet.ops.device_sampling import SamplingTensors, sample_on_device, sample_on_device_ref
from moejet.ops.sample import sample_tokens
from moejet.ops.sample_ref import BAD_LOGITS, sample_tokens_ref
from moejet.ops.top_logits import top_logits, top_logits_on_device, top_logits_ref
from moejet.request import SamplingParams

pytest.importorskip("triton")

from moejet.kernels.card import CARDS
from moejet.kernels.sample import sample_tokens as launch
from moejet.kernels.top_logits import top_logits as launch_top
from moejet.testing.aot import assert_fits, launches_compiled_for

VOCABULARY = 129280


def _meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: f"sm{card.capability}")
def test_compiles(card):
    rows, i32, f64 = 8, torch.int32, torch.float64
    logits = _meta(rows, VOCABULARY)
    rules = [_meta(rows), _meta(rows, dtype=i32), *(_meta(rows, dtype=f64) for _ in range(3))]
    penalties = (_meta(rows), _meta(rows), _meta(rows), _meta(rows, VOCABULARY, dtype=i32))
    biases = (_meta(rows, 4, dtype=i32), _meta(rows, 4))
    with launches_compiled_for(card) as compiled:
        if card.capability in (86, 90, 120):
            launch(logits, *rules, penalties=penalties, biases=biases, log_sums=True)
            if card.capability == 86:
                launch_top(logits, 20)
                # No number that changes from step to step compiles anything again.
                kernels = {id(kernel.asm) for kernel in compiled}
                biases = (_meta(rows, 16, dtype=i32), _meta(rows, 16))
                launch(logits, *rules, penalties=penalties, biases=biases, log_sums=True)
                launch_top(logits, 32)
                assert {id(kernel.asm) for kernel in compiled} == kernels
                del compiled[8:]
        else:
            launch(logits.bfloat16(), *rules, has_cut_offs=False)
    assert len(compiled) == {86: 8, 90: 6, 120: 6}.get(card.capability, 3)
    for kernel in compiled:
        assert_fits(kernel, card)
        # What is kept on the stack over the one search of a row costs nothing (Triton 3.6 on SM120: 8 bytes).
        assert kernel.spilled <= 16, kernel.name


CUT_OFFS = [
    {},
    {"top_k": 20},
    {"top_p": 0.95},
    {"min_p": 0.05},
    {"top_k": 50, "top_p": 0.9, "min_p": 0.02},
]


@pytest.mark.gpu
@pytest.mark.parametrize("spread", [0.2, 4.0])  # nearly flat: cut-offs beyond what can be listed
@pytest.mark.parametrize("vocab_size", [1, 1000, VOCABULARY, 200000])
def test_sample_on_the_gpu(vocab_size, spread):
    """A boundary within rounding of u is rare: nearly all tokens are the reference's, and two runs are the same."""
    params = [SamplingParams(temperature=t, **c) for c in CUT_OFFS for t in (0.6, 1.0, 0.0)]
    logits = torch.randn(len(params), vocab_size) * spread
    uniforms = torch.rand(len(params), dtype=torch.float64).tolist()
    got = sample_tokens(logits.cuda(), params, uniforms)
    assert got == sample_tokens(logits.cuda(), params, uniforms)
    expected = sample_tokens_ref(logits, params, uniforms)
    assert sum(a != b for a, b in zip(got, expected, strict=True)) <= 1


@pytest.mark.gpu
def test_bad_rows_and_penalties_on_the_gpu():
    logits = torch.randn(5, VOCABULARY) * 3
    logits[0, 70000], logits[1, 5], logits[2, :] = math.nan, math.inf, -math.inf
    params = [SamplingParams(top_p=0.9, repetition_penalty=1.3, logit_bias={7: 3.0})] * 5
    counts = torch.randint(4, (5, VOCABULARY), dtype=torch.int32)
    rows = SamplingTensors.of(params, [0.3] * 5, device="cpu", counts=counts)
    expected, logprobs, sums = sample_on_device_ref(logits, rows, with_logprobs=True)
    rows = SamplingTensors.of(params, [0.3] * 5, device="cuda", counts=counts.cuda())
    got = sample_on_device(logits.cuda(), rows, with_logprobs=True)
    assert got[0].tolist() == expected.tolist()
    assert got[0].tolist()[:3] == [BAD_LOGITS] * 3
    for mine, reference in ((got[1], logprobs), (got[2], sums)):
        assert mine is not None
        assert reference is not None
        torch.testing.assert_close(mine[3:].cpu(), reference[3:], atol=1e-4, rtol=1e-5)


@pytest.mark.gpu
def test_a_captured_graph_follows_its_inputs():
    logits = torch.randn(4, VOCABULARY, device="cuda")
    params = [
        SamplingParams(),
        SamplingParams(top_p=0.9),
        SamplingParams(top_k=9),
        SamplingParams(),
    ]
    rows = SamplingTensors.of(params, [0.1] * 4, device="cuda")
    for _ in range(2):
        sample_on_device(logits, rows)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sample_on_device(logits, rows)[0]
    for u in (0.2, 0.8):
        logits.normal_(std=3.0)
        rows.uniforms.fill_(u)
        rows.temperature[3] = u - 0.2  # 0 at first
        graph.replay()
        assert tokens.tolist() == sample_on_device(logits, rows)[0].tolist()


@pytest.mark.gpu
@pytest.mark.parametrize("k", [0, 1, 20, 32, 100])
def test_top_logits_on_the_gpu(k):
    logits = (torch.randn(3, VOCABULARY) * 64).round() / 16  # with ties
    values, ids, sums = top_logits(logits.cuda(), k)
    expected_values, expected_ids, expected_sums = top_logits_ref(logits, k)
    assert torch.equal(values.cpu(), expected_values)
    assert torch.equal(ids.cpu(), expected_ids)
    assert sums == pytest.approx(expected_sums, abs=1e-4)
    assert torch.equal(top_logits_on_device(logits.cuda(), k)[1].cpu(), expected_ids)
