"""Operations that have GPU kernels, on the CPU: references against direct formulas and against the CPU's own path."""

import math

import pytest
import torch
import torch.nn.functional as F

from moejet.latent_layout import row_elements
from moejet.ops.device_sampling import SamplingTensors, count_tokens, sample_on_device
from moejet.ops.fused_add_rms_norm import fused_add_rms_norm, fused_add_rms_norm_ref
from moejet.ops.latent_rows import CACHE_TYPES, decode_latents
from moejet.ops.mla_prepare import mla_prepare
from moejet.ops.rms_norm import rms_norm
from moejet.ops.rope import apply_rope
from moejet.ops.silu_mul import silu_mul
from moejet.ops.store_latent import store_latent, store_latent_ref
from moejet.ops.top_logits import top_logits, top_logits_on_device
from moejet.request import SamplingParams


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_add_rms_norm(dtype):
    x, residual, weight = torch.randn(3, 40).to(dtype), torch.randn(3, 40).to(dtype), torch.rand(40)
    total = (x.float() + residual.float()).to(dtype)
    expected = F.rms_norm(total.float(), (40,), weight, 1e-5)
    for function in (fused_add_rms_norm, fused_add_rms_norm_ref):
        summed = residual.clone()
        got = function(x, summed, weight, 1e-5, out_dtype=torch.float32)
        assert torch.equal(summed, total)
        torch.testing.assert_close(got, expected)


def test_silu_mul():
    gate_up = torch.randn(4, 10)
    expected = torch.sigmoid(gate_up[:, :5]) * gate_up[:, :5] * gate_up[:, 5:]
    torch.testing.assert_close(silu_mul(gate_up, out_dtype=torch.float32), expected)


@pytest.mark.parametrize("kind", CACHE_TYPES)
def test_mla_prepare_is_the_separate_operations(kind):
    latent, q_pe, weight = torch.randn(3, 136), torch.randn(3, 4, 8), torch.rand(128)
    table, positions, slots = torch.randn(20, 8), torch.tensor([3, 19, 3]), torch.tensor([5, 0, 2])
    shape = (2, 4, row_elements(128, 8, kind))
    ours, theirs = (torch.zeros(shape, dtype=CACHE_TYPES[kind]) for _ in range(2))
    got = mla_prepare(
        latent, q_pe, table, positions, weight, 1e-6, ours, slots, interleave=True
    )  # fmt: skip
    torch.testing.assert_close(got, apply_rope(q_pe, table[positions], interleave=True))
    k_pe = apply_rope(latent[:, 128:], table[positions], interleave=True)
    c_kv = rms_norm(latent[:, :128], weight, 1e-6, out_dtype=torch.float32)
    store_latent(c_kv, k_pe, theirs, slots)
    # One step of rounding where the two sums of squares differ in the last place.
    step = {"fp32": 1e-5, "bf16": 2**-7, "fp8": 2**-2}[kind]
    rows = (decode_latents(cache.view(8, -1), 128, 8) for cache in (ours, theirs))
    for mine, reference in zip(*rows, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=step)


def test_padding_is_not_stored():
    cache = torch.zeros(1, 4, 6)
    store_latent_ref(torch.ones(2, 4), torch.ones(2, 2), cache, torch.tensor([-1, 1]))
    assert cache.sum(-1)[0].tolist() == [0, 6, 0, 0]


def test_sampling_tensors():
    params = [
        SamplingParams(temperature=0.0, logit_bias={2: 5.0}),
        SamplingParams(temperature=0.0, repetition_penalty=100.0, frequency_penalty=2.0),
    ]
    counts = torch.stack([count_tokens([], 0, 4), count_tokens([3, 1, 1], 1, 4)])
    assert counts.tolist() == [[0, 0, 0, 0], [0, 4, 0, 1]]
    logits = torch.tensor([[1.0, 2.0, 0.0, 3.0], [1.0, 2.0, 0.0, 3.0]])
    rows = SamplingTensors.of(params, [0.0, 0.0], device="cpu", counts=counts)
    assert (rows.is_random, rows.has_cut_offs) == (False, False)
    tokens, logprobs, sums = sample_on_device(logits, rows, with_logprobs=True)
    assert tokens.tolist() == [2, 0]
    expected = torch.log_softmax(logits, -1)
    assert logprobs is not None
    assert sums is not None
    torch.testing.assert_close(logprobs, torch.stack((expected[0, 2], expected[1, 0])))
    assert sample_on_device(logits, rows)[1:] == (None, None)
    plain = SamplingTensors.of(params, [0.0, 0.0], device="cpu", adjust=False)
    assert sample_on_device(logits, plain)[0].tolist() == [3, 3]


def test_top_logits_on_device_is_top_logits():
    logits = torch.randn(2, 30).round()
    logits[0, 3] = -math.inf
    values, ids, sums = top_logits(logits, 7)
    got = top_logits_on_device(logits, 7)
    assert torch.equal(got[0], values)
    assert torch.equal(got[1], ids)
    assert got[2].tolist() == pytest.approx(sums, rel=1e-6)
