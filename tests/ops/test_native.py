"""Which tensors the operations hand to C++, and that both ways give the same."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moejet import _C
from moejet.ops import native
from moejet.ops.rms_norm import rms_norm, rms_norm_ref
from moejet.ops.rope import apply_rope, apply_rope_ref
from moejet.ops.router_logits import router_logits, router_logits_ref
from moejet.ops.router_topk import router_topk, router_topk_ref
from moejet.ops.sample import sample_tokens
from moejet.ops.sample_ref import sample_tokens_ref
from moejet.ops.store_latent import store_latent, store_latent_ref
from moejet.ops.top_logits import top_logits, top_logits_ref
from moejet.presets import PRESETS
from moejet.request import SamplingParams

CONFIG = replace(
    PRESETS["deepseek-v3"], num_experts=16, num_experts_per_tok=3, n_group=4, topk_group=2
)


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _store(c_kv: Tensor, k_pe: Tensor, dtype: torch.dtype, store: Callable[..., None]) -> Tensor:
    cache = torch.full((2, 4, c_kv.shape[1] + k_pe.shape[1]), -1.0, dtype=dtype)
    store(c_kv, k_pe, cache, torch.tensor([6, 0, 3])[: c_kv.shape[0]])
    return cache


def _cases() -> dict[str, tuple[Callable[[], Any], Callable[[], Any]]]:
    x, weight, cos_sin = _randn(3, 10), _randn(10), _randn(3, 6)
    q = _randn(3, 2, 9)[..., 3:]
    overlapping = _randn(10).expand(3, 10)
    logits, bias = _randn(3, 16), _randn(16)
    params = [SamplingParams(top_p=0.8), SamplingParams(temperature=0.0), SamplingParams()]
    u = [0.3, 0.5, 0.9]
    f32, bf16 = torch.float32, torch.bfloat16
    return {
        "rms_norm": (
            lambda: rms_norm(x, weight, 1e-6, out_dtype=f32),
            lambda: rms_norm_ref(x, weight, 1e-6, out_dtype=f32),
        ),
        "rms_norm of heads": (
            lambda: rms_norm(q, weight[:6], 1e-6, out_dtype=f32),
            lambda: rms_norm_ref(q, weight[:6], 1e-6, out_dtype=f32),
        ),
        "rms_norm to bf16": (
            lambda: rms_norm(x, weight, 1e-6, out_dtype=bf16),
            lambda: rms_norm_ref(x, weight, 1e-6, out_dtype=bf16),
        ),
        "rms_norm of bf16": (
            lambda: rms_norm(x.bfloat16(), weight, 1e-6, out_dtype=f32),
            lambda: rms_norm_ref(x.bfloat16(), weight, 1e-6, out_dtype=f32),
        ),
        "rms_norm, overlapping rows": (
            lambda: rms_norm(overlapping, weight, 1e-6, out_dtype=f32),
            lambda: rms_norm_ref(overlapping, weight, 1e-6, out_dtype=f32),
        ),
        "rms_norm, transposed": (
            lambda: rms_norm(x.T, weight[:3], 1e-6, out_dtype=f32),
            lambda: rms_norm_ref(x.T, weight[:3], 1e-6, out_dtype=f32),
        ),
        "rms_norm, no tokens": (
            lambda: rms_norm(x[:0], weight, 1e-6, out_dtype=f32),
            lambda: rms_norm_ref(x[:0], weight, 1e-6, out_dtype=f32),
        ),
        "rope": (
            lambda: apply_rope(q, cos_sin, interleave=True),
            lambda: apply_rope_ref(q, cos_sin, interleave=True),
        ),
        "rope without heads": (
            lambda: apply_rope(x[:, 4:], cos_sin, interleave=False),
            lambda: apply_rope_ref(x[:, 4:], cos_sin, interleave=False),
        ),
        "rope of bf16": (
            lambda: apply_rope(q.bfloat16(), cos_sin, interleave=True),
            lambda: apply_rope_ref(q.bfloat16(), cos_sin, interleave=True),
        ),
        "store_latent": (
            lambda: _store(x, cos_sin, bf16, store_latent),
            lambda: _store(x, cos_sin, bf16, store_latent_ref),
        ),
        "store_latent in fp16": (
            lambda: _store(x, cos_sin, torch.float16, store_latent),
            lambda: _store(x, cos_sin, torch.float16, store_latent_ref),
        ),
        "router_logits": (
            lambda: router_logits(x, _randn(16, 10)),
            lambda: router_logits_ref(x, _randn(16, 10)),
        ),
        "router_logits of bf16": (
            lambda: router_logits(x.bfloat16(), _randn(16, 10)),
            lambda: router_logits_ref(x.bfloat16(), _randn(16, 10)),
        ),
        "router_topk": (
            lambda: router_topk(logits, bias, CONFIG),
            lambda: router_topk_ref(logits, bias, CONFIG),
        ),
        "sample_tokens": (
            lambda: sample_tokens(logits, params, u),
            lambda: sample_tokens_ref(logits, params, u),
        ),
        "sample_tokens, strided": (
            lambda: sample_tokens(logits[:, ::2], params, u),
            lambda: sample_tokens_ref(logits[:, ::2], params, u),
        ),
        "top_logits": (lambda: top_logits(logits, 5), lambda: top_logits_ref(logits, 5)),
        "top_logits, k beyond V": (
            lambda: top_logits(logits, 99),
            lambda: top_logits_ref(logits, 16),
        ),
    }


@pytest.mark.parametrize("name", sorted(_cases()))
@pytest.mark.parametrize("reference", ["0", "1"])
def test_native_and_reference_agree(
    monkeypatch: pytest.MonkeyPatch, name: str, reference: str
) -> None:
    monkeypatch.setenv("MOEJET_REF", reference)
    operation, expected = _cases()[name]
    torch.testing.assert_close(operation(), expected(), atol=1e-6, rtol=1e-5)


def test_reference_mode_does_not_reach_cpp(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("C++ was called")

    for name in ("rms_norm", "rope", "store_latent", "router_logits", "router_topk"):
        monkeypatch.setattr(_C, name, refuse)
    for name in ("sample", "top_logits"):
        monkeypatch.setattr(_C, name, refuse)
    chosen = ("rms_norm", "rope", "router_logits", "router_topk", "sample_tokens", "top_logits")
    for name in (*chosen, "store_latent"):
        monkeypatch.setenv("MOEJET_REF", "1")
        _cases()[name][0]()
        monkeypatch.setenv("MOEJET_REF", "0")
        with pytest.raises(AssertionError, match="was called"):
            _cases()[name][0]()


def test_many_experts_and_many_candidates_go_to_torch() -> None:
    config = replace(CONFIG, num_experts=1100, n_group=1, topk_group=1)
    logits = _randn(2, 1100)
    ids, _ = router_topk(logits, None, config)
    assert torch.equal(ids, router_topk_ref(logits, None, config)[0])
    assert torch.equal(
        top_logits(_randn(1, 3000), 2000)[1], top_logits_ref(_randn(1, 3000), 2000)[1]
    )
    flat = torch.zeros(1, 3000)
    assert sample_tokens(flat, [SamplingParams(top_p=0.9)], [0.5]) == [1350]
    assert sample_tokens(flat, [SamplingParams(top_k=2000)], [0.7502]) == [1500]


def test_the_instruction_set_follows_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEJET_MAX_ISA", "scalar")
    assert native.cpu_isa() == "scalar"
    monkeypatch.delenv("MOEJET_MAX_ISA")
    assert native.cpu_isa() == _C.resolve_isa()


def test_the_references_break_ties_towards_the_smaller_id() -> None:
    logits = torch.zeros(1, 16)
    logits[0, 9] = 1.0
    assert router_topk_ref(logits, torch.zeros(16), CONFIG)[0].tolist() == [[9, 0, 1]]
    assert top_logits_ref(logits, 3)[1].tolist() == [[9, 0, 1]]
    params = [SamplingParams(top_k=3)]
    assert [sample_tokens_ref(logits, params, [u])[0] for u in (0.1, 0.7, 0.99)] == [9, 0, 1]


def test_limits_agree_with_cpp() -> None:
    from moejet.ops import rope, router_topk, sample, sample_ref, top_logits

    assert sample_ref.BAD_LOGITS == _C.BAD_LOGITS
    assert sample._UNDECIDED == _C.UNDECIDED
    assert top_logits._MAX_NATIVE_K == _C.MAX_TOP_LOGITS
    assert rope._MAX_NATIVE_DIM == _C.MAX_ROPE_DIM
    assert router_topk._MAX_NATIVE_EXPERTS == _C.MAX_ROUTER_EXPERTS
