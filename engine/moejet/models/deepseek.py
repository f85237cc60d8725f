"""DeepSeek-V2/V3-architecture causal language models.

Serves deepseek_v2, deepseek_v3 (R1, V3.1, Moonlight), kimi_k2 and glm4_moe_lite: they share attention and block
structure and differ in dimensions and router, both in ModelConfig.

    h += MLA(norm(h));  h += MLP or MoE(norm(h));  logits = lm_head(norm(h))
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moejet.batch import Batch
from moejet.config import ModelConfig
from moejet.device_batch import DeviceBatch
from moejet.experts.cpu_experts import CpuExperts
from moejet.experts.hybrid_experts import HybridExperts
from moejet.layers.dense import GatedMLP
from moejet.layers.gpu import GpuGatedMLP
from moejet.layers.linear import Dense, Embedding, Linear, RMSNorm
from moejet.layers.mla import MLA
from moejet.layers.moe import MoE
from moejet.ops.rope import rope_table
from moejet.weights.packed_state import Packed
from moejet.weights.spec import TensorSpec
from moejet.weights.stored import StoredWeight


class DecoderLayer:
    """One transformer block."""

    def __init__(
        self,
        config: ModelConfig,
        layer: int,
        *,
        make_experts: Callable[[int], CpuExperts | HybridExperts],
        dense: Dense,
    ):
        hidden, eps = config.hidden_size, config.rms_norm_eps
        dense = dense.within(f"model.layers.{layer}")
        mlp_dense = dense.within("mlp")
        self.input_norm = RMSNorm(hidden, eps, dense=dense)
        self.attention: MLA = dense.within("self_attn").attention(config)
        self.post_attention_norm = RMSNorm(hidden, eps, dense=dense)
        self.mlp: MoE | GatedMLP | GpuGatedMLP
        if config.is_moe_layer(layer):
            experts = make_experts(layer - config.first_k_dense_replace)
            self.mlp = MoE(config, experts, dense=mlp_dense)
        else:
            self.mlp = mlp_dense.gated_mlp(hidden, config.intermediate_size)

    def __call__(
        self,
        hidden: Tensor,
        delta: Tensor | None,
        cos_sin: Tensor,
        latent_cache: Tensor,
        batch: Batch | DeviceBatch,
    ) -> Tensor:
        """Adds delta, what the block before has left to add, and the attention to hidden [T, D], in place.

        Returns what is left to add, [T, D].
        """
        x = self.input_norm.after(delta, hidden)
        x = self.post_attention_norm.after(self.attention(x, cos_sin, latent_cache, batch), hidden)
        if isinstance(batch, DeviceBatch) and isinstance(self.mlp, MoE):
            return self.mlp(x, batch.padding)
        return self.mlp(x)

    def tensor_specs(self, prefix: str) -> dict[str, TensorSpec]:
        return (
            self.input_norm.tensor_specs(f"{prefix}.input_layernorm")
            | self.attention.tensor_specs(f"{prefix}.self_attn")
            | self.post_attention_norm.tensor_specs(f"{prefix}.post_attention_layernorm")
            | self.mlp.tensor_specs(f"{prefix}.mlp")
        )

    def state(self, prefix: str) -> dict[str, Tensor | Packed]:
        return (
            self.input_norm.state(f"{prefix}.input_norm")
            | self.attention.state(f"{prefix}.attention")
            | self.post_attention_norm.state(f"{prefix}.post_attention_norm")
            | self.mlp.state(f"{prefix}.mlp")
        )


class DeepseekForCausalLM:
    """The whole model. Weights are uninitialised until `tensor_specs` have been loaded.

    make_experts(i): the routed experts of the i-th MoE layer.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        make_experts: Callable[[int], CpuExperts | HybridExperts],
        dense: Dense,
        max_context: int,
    ):
        self.config = config
        self.embed_tokens = Embedding(
            config.vocab_size,
            config.hidden_size,
            dtype=torch.float32 if dense.format == "fp32" else torch.bfloat16,
        )
        self.layers = [
            DecoderLayer(config, layer, make_experts=make_experts, dense=dense)
            for layer in range(config.num_hidden_layers)
        ]
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dense=dense)
        self.lm_head = Linear("lm_head", config.hidden_size, config.vocab_size, dense=dense)
        table = rope_table(config.rope, config.qk_rope_head_dim, max_context)
        self.rope = table.to(dense.device)

    @property
    def moe_layers(self) -> list[MoE]:
        return [layer.mlp for layer in self.layers if isinstance(layer.mlp, MoE)]

    def forward(self, batch: Batch | DeviceBatch, latent_caches: Tensor) -> Tensor:
        """Hidden states after the final norm of all tokens, [T, D]; fills the cache [layers, N, S, C + R]."""
        if isinstance(batch, DeviceBatch):
            hidden, cos_sin = batch.embeddings.to(torch.float32, copy=True), self.rope
        else:
            hidden, cos_sin = self.embed_tokens(batch.token_ids), self.rope[batch.positions]
        delta: Tensor | None = None
        for layer, latent_cache in zip(self.layers, latent_caches, strict=True):
            delta = layer(hidden, delta, cos_sin, latent_cache, batch)
        return self.norm.after(delta, hidden)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """hidden [L, D] to logits [L, V], fp32."""
        return self.lm_head(hidden, out_dtype=torch.float32)

    def tensor_specs(self) -> dict[str, TensorSpec]:
        """Checkpoint tensors by Hugging Face name, with the shape that each must have."""
        embedding = self.embed_tokens.tensor_specs("model.embed_tokens")
        specs = dict(embedding)
        for i, layer in enumerate(self.layers):
            specs |= layer.tensor_specs(f"model.layers.{i}")
        specs |= self.norm.tensor_specs("model.norm")
        if not self.config.tie_word_embeddings:
            return specs | self.lm_head.tensor_specs("lm_head")
        [(name, spec)] = embedding.items()

        def load_both(weight: StoredWeight) -> None:
            spec.take(weight)
            self.lm_head.load_stored(weight)

        return specs | {name: TensorSpec.stored(spec.shape, load_both)}

    def state(self) -> dict[str, Tensor | Packed]:
        """All that is loaded, in the form in which it is held."""
        state = self.embed_tokens.state("embed_tokens")
        for i, layer in enumerate(self.layers):
            state |= layer.state(f"layers.{i}")
        return state | self.norm.state("norm") | self.lm_head.state("lm_head")
