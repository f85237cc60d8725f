"""Choosing tokens from logits: temperature, top_k, top_p and min_p, then inverse transform sampling.

With u in [0, 1), the chosen token is the first whose cumulative probability exceeds u: in order of token id without
cut-offs, else in order of descending probability, the smaller id first among equals. top_p is taken of what top_k
left, min_p relative to the largest probability. temperature=0 takes the largest logit, the smallest id among equals.
"""

from __future__ import annotations

from torch import Tensor

from moejet.environment import use_reference
from moejet.extension import load_extension
from moejet.ops.device_sampling import SamplingTensors, sample_on_device
from moejet.ops.native import check_dims, cpu_isa, runs_native
from moejet.ops.sample_ref import choose_token, sample_tokens_ref
from moejet.request import SamplingParams

_UNDECIDED = -2  # C++ considers so many tokens at most and leaves the rest to torch


def sample_tokens(logits: Tensor, params: list[SamplingParams], uniforms: list[float]) -> list[int]:
    """One token id, or BAD_LOGITS, per row of logits [B, V] fp32. Each row has its params and its u.

    Waits for the device, where the logits are on one; `moejet.ops.device_sampling` does not.
    """
    check_dims("logits", logits, "B, V")
    if not len(params) == len(uniforms) == len(logits):
        raise ValueError(
            f"logits has shape {list(logits.shape)}, expected a row for each of {len(params)} params "
            f"and {len(uniforms)} uniforms"
        )
    if params and logits.is_cuda and not use_reference():
        rows = SamplingTensors.of(params, uniforms, device=logits.device, adjust=False)
        chosen: list[int] = sample_on_device(logits, rows)[0].tolist()
        return chosen
    if not params or not runs_native(logits):
        return sample_tokens_ref(logits, params, uniforms)
    tokens: list[int] = load_extension().sample(
        logits,
        [p.temperature for p in params],
        [min(p.top_k, logits.shape[1]) for p in params],
        [p.top_p for p in params],
        [p.min_p for p in params],
        uniforms,
        isa=cpu_isa(),
    )
    for i, token in enumerate(tokens):
        if token == _UNDECIDED:
            tokens[i] = choose_token(logits[i], params[i], uniforms[i])
    return tokens
