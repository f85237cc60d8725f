"""What stands between MLA's projections and its attention: latent norm, rotations, the latent cache's new rows."""

from __future__ import annotations

import torch
from torch import Tensor

from moejet.environment import use_reference
from moejet.ops.rms_norm import rms_norm_ref
from moejet.ops.rope import apply_rope_ref
from moejet.ops.store_latent import store_latent_ref


def mla_prepare(
    latent: Tensor,
    q_pe: Tensor,
    cos_sin: Tensor,
    positions: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    latent_cache: Tensor,
    slot_mapping: Tensor,
    *,
    interleave: bool,
    q_pe_out: Tensor | None = None,
) -> Tensor:
    """latent_cache[slot] = [rms_norm(c_kv) | rope(k_pe)] of every token; returns the rotated q_pe.

    latent [T, C + R] = [c_kv | k_pe] as kv_a_proj gives it · q_pe [T, H, R], may be a view of [T, H, N + R] ·
    cos_sin fp32: the table of `rope_table` [P, R] with positions [T] int32 or int64, or each token's row [T, R] with
    positions=None · norm_weight [C] · latent_cache [N, S, row] contiguous, rows as in `moejet.latent_layout` ·
    slot_mapping [T], block * S + offset; -1 stores nothing (the padding of a captured batch) ·
    q_pe_out [T, H, R] any strides, may be q_pe itself; None: a new tensor of q_pe's dtype.
    Arithmetic is fp32, and nothing is rounded before it is stored.
    """
    if latent.is_cuda and not use_reference():
        from moejet.kernels.mla_prepare import mla_prepare as launch

        return launch(
            latent,
            q_pe,
            cos_sin,
            positions,
            norm_weight,
            eps,
            latent_cache,
            slot_mapping,
            interleave=interleave,
            q_pe_out=q_pe_out,
        )
    return mla_prepare_ref(
        latent,
        q_pe,
        cos_sin,
        positions,
        norm_weight,
        eps,
        latent_cache,
        slot_mapping,
        interleave=interleave,
        q_pe_out=q_pe_out,
    )


def mla_prepare_ref(
    latent: Tensor,
    q_pe: Tensor,
    cos_sin: Tensor,
    positions: Tensor | None,
    norm_weight: Tensor,
    eps: float,
    latent_cache: Tensor,
    slot_mapping: Tensor,
    *,
    interleave: bool,
    q_pe_out: Tensor | None = None,
) -> Tensor:
    """Torch reference of `mla_prepare`."""
    rank = norm_weight.shape[0]
    angles = cos_sin if positions is None else cos_sin[positions]
    c_kv = rms_norm_ref(latent[:, :rank], norm_weight, eps, out_dtype=torch.float32)
    k_pe = apply_rope_ref(latent[:, rank:].float(), angles, interleave=interleave)
    store_latent_ref(c_kv, k_pe, latent_cache, slot_mapping)
    rotated = apply_rope_ref(q_pe, angles, interleave=interleave)
    return rotated if q_pe_out is None else q_pe_out.copy_(rotated)
