"""Writes the compressed keys and values of new tokens into the paged latent cache."""

from __future__ import annotations

import torch
from torch import Tensor

from moejet.extension import load_extension
from moejet.ops.native import cpu_isa, runs_native


def store_latent(c_kv: Tensor, k_pe: Tensor, latent_cache: Tensor, slot_mapping: Tensor) -> None:
    """latent_cache[slot] = [c_kv | k_pe] for every token, in place.

    c_kv [T, C] · k_pe [T, R] · latent_cache [N, S, C + R] contiguous · slot_mapping [T] i64, block * S + offset.
    """
    if latent_cache.dtype in (torch.float32, torch.bfloat16) and runs_native(c_kv, k_pe):
        load_extension().store_latent(c_kv, k_pe, latent_cache, slot_mapping, isa=cpu_isa())
    else:
        store_latent_ref(c_kv, k_pe, latent_cache, slot_mapping)


def store_latent_ref(
    c_kv: Tensor, k_pe: Tensor, latent_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Torch reference of `store_latent`."""
    rank = c_kv.shape[-1]
    rows = latent_cache.view(-1, latent_cache.shape[-1])
    rows[slot_mapping, :rank] = c_kv.to(latent_cache.dtype)
    rows[slot_mapping, rank:] = k_pe.to(latent_cache.dtype)
