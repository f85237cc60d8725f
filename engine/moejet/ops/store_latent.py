"""Writes the compressed keys and values of new tokens into the paged latent cache."""

from __future__ import annotations

from torch import Tensor


def store_latent(c_kv: Tensor, k_pe: Tensor, latent_cache: Tensor, slot_mapping: Tensor) -> None:
    """latent_cache[slot] = [c_kv | k_pe] for every token, in place.

    c_kv [T, C] · k_pe [T, R] · latent_cache [N, S, C + R] contiguous · slot_mapping [T] i64, block * S + offset.
    """
    store_latent_ref(c_kv, k_pe, latent_cache, slot_mapping)


def store_latent_ref(
    c_kv: Tensor, k_pe: Tensor, latent_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Torch reference of `store_latent`."""
    rank = c_kv.shape[-1]
    rows = latent_cache.view(-1, latent_cache.shape[-1])
    rows[slot_mapping, :rank] = c_kv.to(latent_cache.dtype)
    rows[slot_mapping, rank:] = k_pe.to(latent_cache.dtype)
