"""Multi-head latent attention with weight absorption (DeepSeek-V2, arXiv 2405.04434, section 2.1).

The cache keeps [c_kv | k_pe] per token and nothing else. kv_b_proj of the checkpoint, rows [H, N + V], becomes the
up-projections of `LatentUp`, ready for both forms of `moejet.ops.mla_attention`.
"""

from __future__ import annotations

from torch import Tensor

from moejet.batch import Batch
from moejet.config import ModelConfig
from moejet.layers.linear import DenseWeights, Linear, RMSNorm
from moejet.ops.mla_attention import mla_attention
from moejet.ops.rope import apply_rope
from moejet.ops.store_latent import store_latent
from moejet.weights.packed_cache import Packed
from moejet.weights.spec import TensorSpec

# The latent norms use this epsilon whatever rms_norm_eps says, as the published models do.
_LATENT_NORM_EPS = 1e-6


class LatentUp:
    """W_UK [H, N, C] and W_UV [H, V, C], packed. W_UK is held twice, because both of its sides serve as inputs.

    Shapes: H heads, N nope, V value dims, C latent rank.
    """

    def __init__(self, config: ModelConfig, dense: DenseWeights):
        self.heads, self.nope = config.num_attention_heads, config.qk_nope_head_dim
        rank = config.kv_lora_rank
        self.w_uk = dense.matrices(self.heads, self.nope, rank)
        self.w_uk_transposed = dense.matrices(self.heads, rank, self.nope)
        self.w_uv = dense.matrices(self.heads, config.v_head_dim, rank)

    def load(self, kv_b: Tensor) -> None:
        """kv_b [H * (N + V), C] as the checkpoint has it."""
        w_uk, w_uv = _split_heads(kv_b, self.heads, self.nope)
        for head in range(self.heads):
            self.w_uk.set(head, w_uk[head])
            self.w_uk_transposed.set(head, w_uk[head].T.contiguous())
            self.w_uv.set(head, w_uv[head])

    def state(self, prefix: str) -> dict[str, Tensor | Packed]:
        return {
            f"{prefix}.w_uk": self.w_uk,
            f"{prefix}.w_uk_transposed": self.w_uk_transposed,
            f"{prefix}.w_uv": self.w_uv,
        }


def _split_heads(kv_b: Tensor, heads: int, nope: int) -> tuple[Tensor, Tensor]:
    per_head = kv_b.view(heads, -1, kv_b.shape[1])
    return per_head[:, :nope], per_head[:, nope:]


class MLA:
    """One attention layer."""

    def __init__(self, config: ModelConfig, *, dense: DenseWeights):
        self.config = config
        heads, hidden = config.num_attention_heads, config.hidden_size
        rank, bias = config.kv_lora_rank, config.attention_bias
        self.q_a_proj: Linear | None = None
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, heads * config.qk_head_dim, dense=dense)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank, dense=dense, bias=bias)
            self.q_a_norm = RMSNorm(config.q_lora_rank, _LATENT_NORM_EPS)
            self.q_proj = Linear(config.q_lora_rank, heads * config.qk_head_dim, dense=dense)
        self.kv_a_proj = Linear(hidden, config.latent_dim, dense=dense, bias=bias)
        self.kv_a_norm = RMSNorm(rank, _LATENT_NORM_EPS)
        self.up = LatentUp(config, dense)
        self.o_proj = Linear(heads * config.v_head_dim, hidden, dense=dense, bias=bias)

    def __call__(self, x: Tensor, cos_sin: Tensor, latent_cache: Tensor, batch: Batch) -> Tensor:
        """x [T, D], cos_sin [T, R], this layer's latent_cache [N, S, row]. Returns [T, D]."""
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
            self.up,
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
        specs[f"{prefix}.kv_b_proj.weight"] = TensorSpec((rows, config.kv_lora_rank), self.up.load)
        return specs | self.o_proj.tensor_specs(f"{prefix}.o_proj")

    def state(self, prefix: str) -> dict[str, Tensor | Packed]:
        """What holds the weights once they are loaded, by name."""
        own = self.q_proj.state(f"{prefix}.q_proj")
        if self.q_a_proj is not None:
            own |= self.q_a_proj.state(f"{prefix}.q_a_proj")
            own |= self.q_a_norm.state(f"{prefix}.q_a_norm")
        own |= self.kv_a_proj.state(f"{prefix}.kv_a_proj")
        own |= self.kv_a_norm.state(f"{prefix}.kv_a_norm")
        return own | self.up.state(f"{prefix}.kv_b") | self.o_proj.state(f"{prefix}.o_proj")
