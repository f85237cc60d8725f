"""The layers' weights on a device, and what is computed differently there.

Matrices are `GpuMatrices`; the residual stream is fp32, norms' outputs and what lies between matrices have the dtype of
`GpuDenseWeights`. With device "cpu" every operation runs its torch reference, which is how tests reach all of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from moejet.batch import Batch
from moejet.config import ModelConfig
from moejet.device_batch import Attending, DeviceBatch
from moejet.layers.mla import MLA
from moejet.ops.gpu_matrices import GpuMatrices
from moejet.ops.mla_decode import mla_decode
from moejet.ops.mla_prefill import mla_prefill
from moejet.ops.mla_prepare import mla_prepare
from moejet.ops.silu_mul import silu_mul
from moejet.weights.packed_state import Packed
from moejet.weights.spec import TensorSpec


@dataclass(frozen=True, slots=True)
class GpuDenseWeights:
    """How a model's dense matrices are held on a device; `layers.linear.DenseWeights` is the same for the CPU.

    dtype: of activations · own, prefix: see there.
    """

    format: str
    device: torch.device
    dtype: torch.dtype
    own: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""

    def within(self, part: str) -> GpuDenseWeights:
        """The same for a part of the model, in which names are relative to it."""
        return replace(self, prefix=f"{self.prefix}{part}.")

    def format_of(self, name: str) -> str:
        return self.own.get(self.prefix + name, self.format)

    def matrices(self, name: str, num: int, rows: int, cols: int) -> GpuMatrices:
        return GpuMatrices(num, rows, cols, format=self.format_of(name), device=self.device)

    def gated_mlp(self, hidden_size: int, intermediate_size: int) -> GpuGatedMLP:
        return GpuGatedMLP(hidden_size, intermediate_size, dense=self)

    def attention(self, config: ModelConfig) -> MLA:
        return GpuMLA(config, dense=self)


class GpuGatedMLP:
    """down(silu(gate(x)) * up(x)), gate and up as one product. x [T, D] to [T, D]."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, dense: GpuDenseWeights):
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.gate_up = dense.matrices("gate_proj", 2, intermediate_size, hidden_size)
        self.down = dense.matrices("down_proj", 1, hidden_size, intermediate_size)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down.apply(silu_mul(self.gate_up.apply(x), out_dtype=x.dtype))

    def tensor_specs(self, prefix: str) -> dict[str, TensorSpec]:
        inner = (self.intermediate_size, self.hidden_size)
        return {
            f"{prefix}.{name}_proj.weight": TensorSpec(
                shape,
                partial(matrices.set, index),
                load_stored=partial(matrices.set_stored, index),
            )
            for name, shape, matrices, index in (
                ("gate", inner, self.gate_up, 0),
                ("up", inner, self.gate_up, 1),
                ("down", inner[::-1], self.down, 0),
            )
        }

    def state(self, prefix: str) -> dict[str, Tensor | Packed]:
        gate_up = self.gate_up.state(f"{prefix}.gate_up")
        return {**gate_up, **self.down.state(f"{prefix}.down")}


class GpuMLA(MLA):
    """One attention layer on a device: absorbed for requests with few new tokens, expanded for the others."""

    def __call__(
        self, x: Tensor, cos_sin: Tensor, latent_cache: Tensor, batch: Batch | DeviceBatch
    ) -> Tensor:
        """As `MLA`, but cos_sin is the whole table [P, R] of `rope_table`."""
        assert isinstance(batch, DeviceBatch)
        config = self.config
        q = self.queries(x)
        q_pe = q[..., config.qk_nope_head_dim :]
        mla_prepare(
            self.kv_a_proj(x),
            q_pe,
            cos_sin,
            batch.positions,
            self.kv_a_norm.weight,
            self.kv_a_norm.eps,
            latent_cache,
            batch.slot_mapping,
            interleave=config.rope_interleave,
            q_pe_out=q_pe,
        )
        if len(batch.attending) == 1:
            mixed = self._attend(q, latent_cache, batch.attending[0])
        else:
            mixed = q.new_empty(*q.shape[:2], config.v_head_dim)
            for part in batch.attending:
                assert part.rows is not None
                mixed.index_copy_(0, part.rows, self._attend(q[part.rows], latent_cache, part))
        return self.o_proj(mixed.flatten(1))

    def _attend(self, q: Tensor, latent_cache: Tensor, part: Attending) -> Tensor:
        config, up = self.config, self.up
        nope = config.qk_nope_head_dim
        if part.prefill is None:
            mixed = mla_decode(
                up.w_uk_transposed.apply(q[..., :nope]),
                q[..., nope:],
                latent_cache,
                part.block_tables,
                part.context_lens_tensor,
                query_len=part.query_lens[0],
                scale=config.softmax_scale,
                max_context=part.max_context,
            )
            values: Tensor = up.w_uv.apply(mixed)
            return values
        return mla_prefill(
            q,
            self._expand,
            latent_cache,
            part.block_tables,
            query_lens=part.query_lens,
            context_lens=part.context_lens,
            rank=config.kv_lora_rank,
            rope_dim=config.qk_rope_head_dim,
            value_dim=config.v_head_dim,
            scale=config.softmax_scale,
            plan=part.prefill,
        )

    def _expand(self, c_kv: Tensor) -> tuple[Tensor, Tensor]:
        """Keys [K, H * N] and values [K, H * V] of all heads."""
        return self.up.w_uk.apply(c_kv), self.up.w_uv.apply(c_kv)
