"""Writes the compressed keys and values of new tokens into the paged latent cache."""

from __future__ import annotations

import torch
from torch import Tensor

from moejet.environment import use_reference
from moejet.extension import load_extension
from moejet.ops.latent_rows import CACHE_TYPES, encode_latents
from moejet.ops.native import check_dims, check_tensor, cpu_isa, runs_native


def store_latent(c_kv: Tensor, k_pe: Tensor, latent_cache: Tensor, slot_mapping: Tensor) -> None:
    """latent_cache[slot] = [c_kv | k_pe] for every token, in place.

    c_kv [T, C] · k_pe [T, R] · latent_cache [N, S, row] contiguous, rows as in `moejet.latent_layout` ·
    slot_mapping [T] i64, block * S + offset; negative (not on the C++ path) stores nothing: the padding of a captured
    batch.
    """
    if c_kv.is_cuda and not use_reference():
        from moejet.kernels.store_latent import store_latent as launch

        launch(c_kv, k_pe, latent_cache, slot_mapping)
    elif latent_cache.dtype in CACHE_TYPES.values() and runs_native(c_kv, k_pe):
        load_extension().store_latent(c_kv, k_pe, latent_cache, slot_mapping, isa=cpu_isa())
    else:
        check_dims("c_kv", c_kv, "T, C")
        check_dims("latent_cache", latent_cache, "blocks, block_size, row")
        check_tensor("k_pe", k_pe, (c_kv.shape[0], *k_pe.shape[-1:]), c_kv)
        check_tensor("slot_mapping", slot_mapping, c_kv.shape[:1], c_kv)
        if not latent_cache.is_floating_point() and latent_cache.dtype != torch.uint8:
            raise TypeError(
                f"latent_cache has dtype {latent_cache.dtype}, expected a float or uint8"
            )
        width = c_kv.shape[1] + k_pe.shape[1]
        if latent_cache.dtype != torch.uint8 and latent_cache.shape[2] != width:
            raise ValueError(
                f"latent_cache has shape {list(latent_cache.shape)}, expected [blocks, S, {width}]"
            )
        num_slots = latent_cache.shape[0] * latent_cache.shape[1]
        if len(slot_mapping) and int(slot_mapping.max()) >= num_slots:
            raise ValueError(
                f"slot_mapping holds {int(slot_mapping.max())}, expected at most {num_slots - 1}"
            )
        if slot_mapping.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"slot_mapping has dtype {slot_mapping.dtype}, expected int32 or int64")
        store_latent_ref(c_kv, k_pe, latent_cache, slot_mapping)


def store_latent_ref(
    c_kv: Tensor, k_pe: Tensor, latent_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Torch reference of `store_latent`."""
    rows = latent_cache.view(-1, latent_cache.shape[-1])
    kept = slot_mapping >= 0
    rows[slot_mapping[kept]] = encode_latents(c_kv[kept], k_pe[kept], latent_cache.dtype)
