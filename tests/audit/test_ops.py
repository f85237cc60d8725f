"""Every operation on CPU tensors with each of them wrong: refused by name, or the same as the reference says."""

from dataclasses import replace

import pytest
import torch

from moejet import _C
from moejet.ops.fused_add_rms_norm import fused_add_rms_norm
from moejet.ops.linear import PackedMatrices, linear
from moejet.ops.mla_attention import mla_attention
from moejet.ops.rms_norm import rms_norm
from moejet.ops.rope import apply_rope
from moejet.ops.router_logits import router_logits
from moejet.ops.router_topk import router_topk
from moejet.ops.sample import sample_tokens
from moejet.ops.silu_mul import silu_mul
from moejet.ops.store_latent import store_latent
from moejet.ops.token_scores import token_scores
from moejet.ops.top_logits import top_logits
from moejet.presets import PRESETS
from moejet.request import SamplingParams

F32 = torch.float32
CONFIG = replace(
    PRESETS["deepseek-v3"], num_experts=16, num_experts_per_tok=3, n_group=4, topk_group=2
)
POOL = _C.ThreadPool([0], pin=False)


def _randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def _matrices(num, rows, cols):
    matrices = PackedMatrices(num, rows, cols, format="fp32", pool=POOL)
    for i in range(num):
        matrices.set(i, _randn(rows, cols))
    return matrices


class Up:
    w_uk, w_uk_transposed, w_uv = _matrices(2, 4, 16), _matrices(2, 16, 4), _matrices(2, 6, 16)


ONE = _matrices(1, 8, 64)
CHOICES = [SamplingParams(top_p=0.8)] * 3
# The operation, and tensors that are right for it.
OPS = {
    "rms_norm": (
        lambda x, weight: rms_norm(x, weight, 1e-6, out_dtype=F32),
        {"x": _randn(3, 10), "weight": _randn(10)},
    ),
    "fused_add_rms_norm": (
        lambda x, residual, weight: fused_add_rms_norm(x, residual, weight, 1e-6, out_dtype=F32),
        {"x": _randn(3, 10), "residual": _randn(3, 10), "weight": _randn(10)},
    ),
    "silu_mul": (
        lambda gate, up: silu_mul(gate, up, out_dtype=F32),
        {"gate": _randn(3, 8), "up": _randn(3, 8)},
    ),
    "apply_rope": (
        lambda x, cos_sin: apply_rope(x, cos_sin, interleave=True),
        {"x": _randn(3, 2, 6), "cos_sin": _randn(3, 6)},
    ),
    "store_latent": (
        store_latent,
        {
            "c_kv": _randn(3, 10),
            "k_pe": _randn(3, 6),
            "latent_cache": torch.zeros(2, 4, 16),
            "slot_mapping": torch.tensor([6, 0, 3]),
        },
    ),
    "router_logits": (router_logits, {"x": _randn(3, 10), "weight": _randn(16, 10)}),
    "router_topk": (
        lambda router_logits, bias: router_topk(router_logits, bias, CONFIG),
        {"router_logits": _randn(3, 16), "bias": _randn(16)},
    ),
    "top_logits": (lambda logits: top_logits(logits, 3), {"logits": _randn(3, 16)}),
    "sample_tokens": (
        lambda logits: sample_tokens(logits, CHOICES, [0.3, 0.5, 0.9]),
        {"logits": _randn(3, 16)},
    ),
    "token_scores": (lambda logits: token_scores(logits, [1, 2, 3]), {"logits": _randn(3, 16)}),
    "linear": (lambda x: linear(x, ONE), {"x": _randn(3, 64)}),
    "mla_attention": (
        lambda q_nope, q_pe, latent_cache, block_tables: mla_attention(
            q_nope,
            q_pe,
            Up(),
            latent_cache,
            block_tables,
            query_lens=[3],
            context_lens=[5],
            scale=0.3,
        ),
        {
            "q_nope": _randn(3, 2, 4),
            "q_pe": _randn(3, 2, 6),
            "latent_cache": _randn(2, 4, 22),
            "block_tables": torch.tensor([[0, 1]]),
        },
    ),
}
# How the kernels call a tensor, and what else its shape is compared with.
NAMES = {
    "latent_cache": ("cache", "slot", "block_tables", "q"),
    "slot_mapping": ("slots",),
    "router_logits": ("logits", "bias"),
    "q_nope": ("q", "q_pe"),
    "q_pe": ("q",),
    "gate": ("up",),
    "x": ("weight", "residual", "cos_sin"),
    "c_kv": ("k_pe", "cache", "slot", "latent_cache"),
    "k_pe": ("cache", "latent_cache"),
    "block_tables": ("context_lens",),
}


def _wrong(tensor):
    """(what is wrong, the tensor): shapes that do not fit, and ids that are not there."""
    yield "a column less", tensor[..., :-1]
    yield "a column more", torch.cat((tensor, tensor[..., :1]), -1)
    yield "a row less", tensor[:-1]
    yield "a row more", torch.cat((tensor, tensor[:1]), 0)
    yield "flat", tensor.reshape(-1)
    yield "a dimension more", tensor[None]
    yield "a number", tensor.reshape(-1)[0]
    yield "empty", tensor[:0]
    yield "elsewhere", tensor.to("meta")
    if tensor.is_floating_point():
        yield "double", tensor.double()
        yield "integers", tensor.long()
    else:
        yield "floats", tensor.float()
        yield "negative", -tensor - 5
        yield "beyond", tensor + 10**9


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("is_double", [False, True], ids=["kernel", "reference"])
def test_wrong_tensors_are_refused_by_name(op, is_double):
    """is_double: the other tensors are of a type that only the reference takes."""
    function, given = OPS[op]
    if is_double and op in ("linear", "mla_attention", "router_logits"):
        pytest.skip("takes no fp64")
    problems = []
    for name, tensor in given.items():
        for what, bad in _wrong(tensor):
            if what == "elsewhere" and name == "logits":
                continue  # torch takes seconds to import how it sorts there
            right = {
                n: t.double() if is_double and t.is_floating_point() else t.clone()
                for n, t in given.items()
            }
            try:
                function(**{**right, name: bad})
            except (ValueError, TypeError) as error:
                names = (name, *NAMES.get(name, ()))
                is_named = any(str(error).startswith(n) for n in names)
                if not is_named and "must have one entry" not in str(error):
                    problems.append(f"{name} {what}: {error}")
            except Exception as error:
                if what != "elsewhere":  # torch names the devices
                    problems.append(f"{name} {what}: {error!r:.200}")
            else:
                fits = _fits(op, name, what, bad, tensor)
                problems += [] if fits else [f"{name} {what}: accepted"]
    assert not problems, "\n".join(problems)


def _fits(op, name, what, bad, tensor):
    """Whether what was taken means something: another number of tokens, experts, blocks or columns, or another type."""
    if what in ("double", "integers", "flat") and bad.dim() == tensor.dim():
        return True
    if name == "slot_mapping" and what == "negative":  # stores nothing, says the reference
        return True
    if what == "elsewhere":  # what is computed there stays there
        return True
    if (op, name) in {("rms_norm", "x"), ("silu_mul", "gate")}:
        return "row" in what or what in ("empty", "a dimension more")
    free = {"router_logits": "xw", "linear": "x", "router_topk": "r", "top_logits": "l"}
    if name[0] in free.get(op, ""):
        return "row" in what or what == "empty" or op == "top_logits"
    if name in ("logits", "latent_cache", "block_tables"):
        return "column" in what or what == "a row more"
    return False
