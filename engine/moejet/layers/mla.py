"""Multi-head latent attention with weight absorption (DeepSeek-V2, arXiv 2405.04434, section 2.1).

The cache keeps [c_kv | k_pe] per token and nothing else. kv_b_proj of the checkpoint, rows [H, N + V], becomes the
up-projections of `LatentUp`, ready for both forms of `moejet.ops.mla_attention`.
"""

from __future__ import annotations

from torch import Tensor

from moejet.batch import Batch
from moejet.config import ModelConfig
from moejet.device_batch import DeviceBatch
from moejet.layers.linear import Dense, Linear, RMSNorm
from moejet.ops.mla_attention import mla_attention
from moejet.ops.rope import apply_rope
from moejet.ops.store_latent import store_latent
from moejet.weights.packed_state import Packed
from moejet.weights.spec import TensorSpec
from moejet.weights.stored import StoredWeight

# The latent norms use this epsilon whatever rms_norm_eps says, as the published models do.
_LATENT_NORM_EPS = 1e-6


class LatentUp:
    """W_UK [H, N, C] and W_UV [H, V, C], packed. W_UK is held twice, because both of its sides serve as inputs.

    Shapes: H heads, N nope, V value dims, C latent rank.
    Of W_UK quantised in the checkpoint, the direction in which it is stored keeps its bits where the format allows.
    """

    def __init__(self, config: ModelConfig, dense: Dense):
        self.heads, self.nope = config.num_attention_heads, config.qk_nope_head_dim
        self.rank, self.value = config.kv_lora_rank, config.v_head_dim
        dense = dense.within("kv_b_proj")
        self.w_uk = dense.matrices("w_uk", self.heads, self.nope, self.rank)
        self.w_uk_transposed = dense.matrices("w_uk_transposed", self.heads, self.rank, self.nope)
        self.w_uv = dense.matrices("w_uv", self.heads, self.value, self.rank)

    def load(self, kv_b: Tensor) -> None:
        """kv_b [H * (N + V), C] as the checkpoint has it."""
        self.load_kv_b(StoredWeight.plain(kv_b))

    def load_kv_b(self, kv_b: StoredWeight) -> None:
        parts = kv_b.split_rows(self.nope, self.value)
        for head in range(self.heads):
            w_uk, w_uv = parts[2 * head : 2 * head + 2]
            self.w_uk.set_stored(head, w_uk)
            self.w_uk_transposed.set(head, w_uk.dequantize().T.contiguous())
            self.w_uv.set_stored(head, w_uv)

    def load_k_b(self, k_b: StoredWeight) -> None:
        """W_UK as [H, C, N]."""
        for head, part in enumerate(k_b.split_rows(self.rank)):
            self.w_uk_transposed.set_stored(head, part)
            self.w_uk.set(head, part.dequantize().T.contiguous())

    def load_v_b(self, v_b: StoredWeight) -> None:
        """W_UV [H, V, C]."""
        for head, part in enumerate(v_b.split_rows(self.value)):
            self.w_uv.set_stored(head, part)

    def tensor_specs(self, prefix: str) -> dict[str, TensorSpec]:
        """kv_b_proj, or in its place k_b_proj and v_b_proj as GGUF files have them."""
        halves = {
            f"{prefix}.k_b_proj.weight": TensorSpec.stored(
                (self.heads, self.rank, self.nope), self.load_k_b
            ),
            f"{prefix}.v_b_proj.weight": TensorSpec.stored(
                (self.heads, self.value, self.rank), self.load_v_b
            ),
        }
        shape = (self.heads * (self.nope + self.value), self.rank)
        whole = TensorSpec.stored(shape, self.load_kv_b, parts=halves)
        return {f"{prefix}.kv_b_proj.weight": whole}

    def state(self, prefix: str) -> dict[str, Tensor | Packed]:
        return {
            **self.w_uk.state(f"{prefix}.w_uk"),
            **self.w_uk_transposed.state(f"{prefix}.w_uk_transposed"),
            **self.w_uv.state(f"{prefix}.w_uv"),
        }


class MLA:
    """One attention layer."""

    def __init__(self, config: ModelConfig, *, dense: Dense):
        self.config = config
        heads, hidden = config.num_attention_heads, config.hidden_size
        rank, bias = config.kv_lora_rank, config.attention_bias
        self.q_a_proj: Linear | None = None
        if config.q_lora_rank is None:
            self.q_proj = Linear("q_proj", hidden, heads * config.qk_head_dim, dense=dense)
        else:
            self.q_a_proj = Linear("q_a_proj", hidden, config.q_lora_rank, dense=dense, bias=bias)
            self.q_a_norm = RMSNorm(config.q_lora_rank, _LATENT_NORM_EPS, dense=dense)
            self.q_proj = Linear(
                "q_b_proj", config.q_lora_rank, heads * config.qk_head_dim, dense=dense
            )
        self.kv_a_proj = Linear(
            "kv_a_proj_with_mqa", hidden, config.latent_dim, dense=dense, bias=bias
        )
        self.kv_a_norm = RMSNorm(rank, _LATENT_NORM_EPS, dense=dense)
        self.up = LatentUp(config, dense)
        self.o_proj = Linear("o_proj", heads * config.v_head_dim, hidden, dense=dense, bias=bias)

    def __call__(
        self, x: Tensor, cos_sin: Tensor, latent_cache: Tensor, batch: Batch | DeviceBatch
    ) -> Tensor:
        """x [T, D], cos_sin [T, R], this layer's latent_cache [N, S, row]. Returns [T, D]."""
        assert isinstance(batch, Batch)
        config = self.config
        nope = config.qk_nope_head_dim
        q = self.queries(x)
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

    def queries(self, x: Tensor) -> Tensor:
        """x [T, D] to [T, H, N + R], not rotated."""
        latent_q = x if self.q_a_proj is None else self.q_a_norm(self.q_a_proj(x))
        config = self.config
        return self.q_proj(latent_q).view(-1, config.num_attention_heads, config.qk_head_dim)

    def tensor_specs(self, prefix: str) -> dict[str, TensorSpec]:
        specs: dict[str, TensorSpec] = {}
        if self.q_a_proj is None:
            specs |= self.q_proj.tensor_specs(f"{prefix}.q_proj")
        else:
            specs |= self.q_a_proj.tensor_specs(f"{prefix}.q_a_proj")
            specs |= self.q_a_norm.tensor_specs(f"{prefix}.q_a_layernorm")
            specs |= self.q_proj.tensor_specs(f"{prefix}.q_b_proj")
        specs |= self.kv_a_proj.tensor_specs(f"{prefix}.kv_a_proj_with_mqa")
        specs |= self.kv_a_norm.tensor_specs(f"{prefix}.kv_a_layernorm")
        specs |= self.up.tensor_specs(prefix)
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
