"""What a model must read and multiply at the least: the one source of bytes and operations per token.

Bytes are those of weights and cache as they are held, scales included; norms, biases and activations
are too small to count. Operations are those of matrix products, two for each multiply-add. Attention
counts in the cheaper of its two forms (`moejet.ops.mla_attention`):
  absorbed   W_UK and W_UV once per query token and head, 2 C + R multiply-adds per query-key pair
  expanded   keys and values rebuilt once per context token and head, N + R + V per pair
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from moejet.config import FORMAT_BITS, EngineConfig, ModelConfig
from moejet.latent_layout import row_bytes


@dataclass(frozen=True, slots=True)
class ModelCost:
    """Bytes and operations of `config` with weights and cache in the given formats."""

    config: ModelConfig
    expert_formats: tuple[tuple[str, str], ...]  # of every MoE layer: gate and up, down
    dense_format: str
    cache_dtype: str
    # Dense matrices with another format than dense_format, by name.
    dense_formats: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, config: ModelConfig, engine: EngineConfig) -> ModelCost:
        """In the formats of an engine."""
        engine = engine.for_model(config)
        formats = engine.expert_formats_of(config)
        dense_format, own = engine.dense_formats_of(config)
        return cls(config, formats, dense_format, engine.cache_dtype, own)

    @property
    def expert_bytes(self) -> float:
        """One routed expert, the mean over all layers."""
        matrix = self.config.hidden_size * self.config.moe_intermediate_size
        bits = [
            2 * FORMAT_BITS[gate_up] + FORMAT_BITS[down] for gate_up, down in self.expert_formats
        ]
        return matrix * sum(bits) / max(len(bits), 1) / 8

    @property
    def routed_bytes(self) -> float:
        """All routed experts of all layers."""
        return self.config.num_moe_layers * self.config.num_experts * self.expert_bytes

    @property
    def packed_bytes(self) -> float:
        """Attention (with W_UK in both directions), shared experts, dense layers and output projection, as held."""
        return sum(num_bytes for _, num_bytes in self._dense_matrix_bytes())

    @property
    def dense_bytes(self) -> float:
        """Everything but routed experts, as it is held: see `moejet.layers`."""
        c = self.config
        table = c.vocab_size * c.hidden_size
        table_bytes = 4 if self.dense_format == "fp32" else 2
        return self.packed_bytes + table_bytes * table + 4 * self._router_parameters

    @property
    def weight_bytes(self) -> float:
        """All weights."""
        return self.dense_bytes + self.routed_bytes

    @property
    def latent_bytes(self) -> int:
        """One token in the cache, all layers."""
        c = self.config
        row = row_bytes(c.kv_lora_rank, c.qk_rope_head_dim, self.cache_dtype)
        return c.num_hidden_layers * row

    @property
    def step_bytes(self) -> float:
        """Weights beside routed experts that every step of decoding reads."""
        # One direction of W_UK is for expanded attention.
        dense = (size for name, size in self._dense_matrix_bytes() if not name.endswith("w_uk"))
        return 4.0 * self._router_parameters + sum(dense)

    def unique_experts(self, num_tokens: int) -> float:
        """Experts of one layer that num_tokens hit, on average with uniform routing."""
        miss = 1.0 - self.config.num_experts_per_tok / self.config.num_experts
        return self.config.num_experts * (1.0 - miss**num_tokens)

    def decode_bytes(self, context: float, batch: int = 1) -> float:
        """What one step of `batch` sequences reads, each `context` tokens long."""
        routed = self.config.num_moe_layers * self.unique_experts(batch) * self.expert_bytes
        return self.step_bytes + routed + batch * context * self.latent_bytes

    def decode_operations(self, context: float, batch: int = 1) -> float:
        """Of one step of `batch` sequences, each `context` tokens long."""
        linear = self._linear_parameters + self._up_parameters + self._output_parameters
        return batch * (2.0 * linear + context * self._absorbed_per_pair)

    def prefill_operations(self, num_tokens: int, depth: int = 0) -> float:
        """Of num_tokens of prompt behind `depth` tokens in the cache; logits of the last token only."""
        pairs = num_tokens * depth + num_tokens * (num_tokens + 1) / 2
        absorbed = 2.0 * num_tokens * self._up_parameters + pairs * self._absorbed_per_pair
        expanded = 2.0 * (depth + num_tokens) * self._up_parameters
        expanded += pairs * self._expanded_per_pair
        linear = 2.0 * (num_tokens * self._linear_parameters + self._output_parameters)
        return linear + min(absorbed, expanded)

    def _dense_matrix_bytes(self) -> Iterator[tuple[str, float]]:
        for name, parameters in self._dense_matrices():
            yield (
                name,
                parameters * FORMAT_BITS[self.dense_formats.get(name, self.dense_format)] / 8,
            )

    def _dense_matrices(self) -> Iterator[tuple[str, int]]:
        """(name, parameters) of all packed matrices but routed experts, named as `moejet.layers` do."""
        c = self.config
        hidden, heads, rank = c.hidden_size, c.num_attention_heads, c.kv_lora_rank
        q_rank, q_size = c.q_lora_rank, heads * c.qk_head_dim
        w_uk = heads * c.qk_nope_head_dim * rank
        attention = {
            **({"q_proj": hidden * q_size} if q_rank is None else {}),
            **({"q_a_proj": hidden * q_rank, "q_b_proj": q_rank * q_size} if q_rank else {}),
            "kv_a_proj_with_mqa": hidden * c.latent_dim,
            "kv_b_proj.w_uk": w_uk,
            "kv_b_proj.w_uk_transposed": w_uk,
            "kv_b_proj.w_uv": heads * c.v_head_dim * rank,
            "o_proj": heads * c.v_head_dim * hidden,
        }
        for layer in range(c.num_hidden_layers):
            prefix = f"model.layers.{layer}"
            for name, parameters in attention.items():
                yield f"{prefix}.self_attn.{name}", parameters
            mlp, width = f"{prefix}.mlp", c.intermediate_size
            if c.is_moe_layer(layer):
                mlp, width = f"{mlp}.shared_experts", c.num_shared_experts * c.moe_intermediate_size
            yield f"{mlp}.gate_proj", 2 * hidden * width
            yield f"{mlp}.down_proj", hidden * width
        yield "lm_head", self._output_parameters

    @property
    def _output_parameters(self) -> int:
        return self.config.vocab_size * self.config.hidden_size

    @property
    def _router_parameters(self) -> int:
        c = self.config
        return c.num_moe_layers * c.num_experts * c.hidden_size

    @property
    def _packed_parameters(self) -> int:
        """Attention, shared experts, dense layers and the output projection (a copy where tied)."""
        c = self.config
        tables = self._output_parameters * (1 if c.tie_word_embeddings else 2)
        return c.num_dense_parameters - tables - self._router_parameters + self._output_parameters

    @property
    def _up_parameters(self) -> int:
        """W_UK and W_UV of all layers."""
        c = self.config
        per_head = c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim)
        return c.num_hidden_layers * c.num_attention_heads * per_head

    @property
    def _linear_parameters(self) -> int:
        """What multiplies every token, routed experts included; without W_UK, W_UV and output."""
        c = self.config
        expert = 3 * c.hidden_size * c.moe_intermediate_size
        routed = c.num_moe_layers * c.num_experts_per_tok * expert
        dense = self._packed_parameters - self._up_parameters - self._output_parameters
        return dense + self._router_parameters + routed

    @property
    def _absorbed_per_pair(self) -> int:
        c = self.config
        macs = 2 * c.kv_lora_rank + c.qk_rope_head_dim
        return 2 * c.num_hidden_layers * c.num_attention_heads * macs

    @property
    def _expanded_per_pair(self) -> int:
        c = self.config
        macs = c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim
        return 2 * c.num_hidden_layers * c.num_attention_heads * macs
