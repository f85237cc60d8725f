"""Multi-head latent attention with weight absorption (DeepSeek-V2, arXiv 2405.04434, section 2.1).

The cache keeps [c_kv | k_pe] per token and nothing else. kv_b_proj of the checkpoint, rows [H, N + V], is stored once
as w_uk [H, N, C] and w_uv [H, C, V], ready for both forms of `moejet.ops.mla_attention`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moejet.batch import Batch
from moejet.config import ModelConfig
from moejet.layers.linear import Linear, RMSNorm
from moejet.ops.mla_attention import mla_attention
from moejet.ops.rope import apply_rope
from moejet.ops.store_latent import store_latent
from moejet.weights.spec import TensorSpec

# The latent norms use this epsilon whatever rms_norm_eps says, as the published models do.
_LATENT_NORM_EPS = 1e-6


class MLA:
    """One attention layer."""

    def __init__(self, config: ModelConfig, *, dtype: torch.dtype):
        self.config = config
        heads, hidden = config.num_attention_heads, config.hidden_size
        rank, bias = config.kv_lora_rank, config.attention_bias
        self.q_a_proj: Linear | None = None
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim, dtype=dtype)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, dtype=dtype, bias=bias)
            self.q_a_norm = RMSNorm(config.q_lora_rank, _LATENT_NORM_EPS, out_dtype=dtype)
            self.q_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim, dtype=dtype)
        self.kv_a_proj = Linear(hidden, config.latent_dim, dtype=dtype, bias=bias)
        self.kv_a_norm = RMSNorm(rank, _LATENT_NORM_EPS, out_dtype=dtype)
        self.w_uk = torch.empty(heads, config.qk_nope_head_dim, rank, dtype=dtype)
        self.w_uv = torch.empty(heads, rank, config.v_head_dim, dtype=dtype)
        self.o_proj = Linear(heads * config.v_head_dim, hidden, dtype=dtype, bias=bias)

    def __call__(self, x: Tensor, cos_sin: Tensor, latent_cache: Tensor, batch: Batch) -> Tensor:
        """x [T, D], cos_sin [T, R], this layer's latent_cache [N, S, C + R]. Returns [T, D]."""
        config = self.config
        nope = config.qk_nope_head_dim
        latent_q = x if self.q_a_proj is None else self.q_a_norm(self.q_a_proj(x))
        q = self.q_proj(latent_q).view(-1, config.num_attention_heads, config.qk_head_dim)
        q_nope, q_pe = q[..., :nope], q[..., nope:]
        latent = self.kv_a_proj(x)
        c_kv, k_pe = latent[:, : config.kv_lora_rank], latent[:, config.kv_lora_rank :]
        q_pe = apply_rope(q_pe, cos_sin, interleave=config.rope_interleave)
        k_pe = apply_rope(k_pe, cos_sin, interleave=config.rope_interleave)
        store_latent(self.kv_a_norm(c_kv), k_pe, latent_cache, batch.slot_mapping)
        mixed = mla_attention(
            q_nope,
            q_pe,
            self.w_uk,
            self.w_uv,
            latent_cache,
            batch.block_tables,
            query_lens=batch.query_lens,
            context_lens=batch.context_lens,
            scale=config.softmax_scale,
        )
        return self.o_proj(mixed.flatten(1))

    def tensor_specs(self, prefix: str) -> dict[str, TensorSpec]:
        config = self.config
        specs: dict[str, TensorSpec] = {}
        if self.q_a_proj is None:
            specs |= self.q_proj.tensor_specs(f"{prefix}.q_proj")
        else:
            specs |= self.q_a_proj.tensor_specs(f"{prefix}.q_a_proj")
            specs |= self.q_a_norm.tensor_specs(f"{prefix}.q_a_layernorm")
            specs |= self.q_proj.tensor_specs(f"{prefix}.q_b_proj")
        specs |= self.kv_a_proj.tensor_specs(f"{prefix}.kv_a_proj_with_mqa")
        specs |= self.kv_a_norm.tensor_specs(f"{prefix}.kv_a_layernorm")
        rows = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
        specs[f"{prefix}.kv_b_proj.weight"] = TensorSpec(
            (rows, config.kv_lora_rank), self._load_kv_b
        )
        return specs | self.o_proj.tensor_specs(f"{prefix}.o_proj")

    def _load_kv_b(self, weight: Tensor) -> None:
        heads = weight.view(self.config.num_attention_heads, -1, self.config.kv_lora_rank)
        nope = self.config.qk_nope_head_dim
        self.w_uk.copy_(heads[:, :nope])
        self.w_uv.copy_(heads[:, nope:].transpose(1, 2))
