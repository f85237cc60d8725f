"""The CPU forward pass as one native call per step: the CPU's counterpart of a CUDA graph.

`CpuProgram` walks the model's layers once and records what they compute, as operations of the extension over buffers
that are allocated here. A step then costs one call, whatever the number of layers. The torch layers stay the readable
definition and the reference (MOEJET_REF=1); both read the same weights.

    h = embed(tokens)
    per layer   x = norm(h += mlp, shared)          q, latent = W x
                q_pe, k_pe rotated; [c_kv | k_pe] into the cache
                a = attention(q, cache)              o = W_O a
                x = norm(h += o)                     mlp = experts(x, router(x)), shared = shared_experts(x)
    logits = lm_head(norm(h += mlp, shared))
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moejet import huge_pages
from moejet.batch import Batch, int64_tensor
from moejet.config import ModelConfig
from moejet.experts.cpu_experts import CpuExperts
from moejet.extension import load_extension
from moejet.layers.dense import GatedMLP
from moejet.layers.gpu import GpuGatedMLP
from moejet.layers.linear import RMSNorm
from moejet.layers.mla import MLA
from moejet.layers.moe import MoE
from moejet.ops.router_topk import group_rank

if TYPE_CHECKING:
    from moejet._C import ExpertWeights, ThreadPool
    from moejet.models.deepseek import DeepseekForCausalLM


class CpuProgram:
    """A model's forward pass, recorded for steps of at most max_tokens tokens.

    Buffers are fp32 [max_tokens, ...]; their memory becomes resident as steps use it.
    """

    def __init__(
        self,
        model: DeepseekForCausalLM,
        latent_cache: Tensor,
        *,
        max_tokens: int,
        pool: ThreadPool,
        isa: str,
        attention_form: str = "auto",
    ):
        """latent_cache [layers, blocks, block_size, row], see `moejet.latent_layout`; isa: a name, not "auto"."""
        self._native = load_extension().Program(pool, max_tokens, isa, attention_form)
        self._max_tokens = max_tokens
        self._config = model.config
        self._cos_sin = model.rope
        self._vocab_size = model.config.vocab_size
        self._everyone = (
            torch.zeros(max_tokens, 1, dtype=torch.int32),
            torch.ones(max_tokens, 1),
        )
        self._num_groups = 0
        self._routed_groups: list[int] = []
        self._allocate(model.config)
        self._native.embed(model.embed_tokens.weight, self._hidden)
        deltas: list[Tensor] = []
        for layer, cache in zip(model.layers, latent_cache, strict=True):
            self._norm(layer.input_norm, deltas)
            self._record_attention(layer.attention, cache)
            self._norm(layer.post_attention_norm, [self._attention_out])
            deltas = self._record_mlp(layer.mlp)
        self._norm(model.norm, deltas, only_logits_rows=True)
        self._native.lm_head(model.lm_head.packed.weights, self._x)

    def run(self, batch: Batch) -> Tensor:
        """Logits [L, V] fp32 of batch.logits_indices; the batch's latents are in the cache afterwards."""
        logits = torch.empty(batch.logits_indices.shape[0], self._vocab_size)
        self._native.run(
            batch.token_ids,
            batch.positions,
            batch.slot_mapping,
            int64_tensor(batch.query_lens),
            int64_tensor(batch.context_lens),
            batch.block_tables,
            batch.logits_indices,
            logits,
        )
        return logits

    def hidden(self, num_rows: int) -> Tensor:
        """What the last run computed its logits from [L, D] fp32, until the next run."""
        return self._x[:num_rows]

    def expert_loads(self) -> tuple[int, int]:
        """Routed experts that all layers have read in all runs so far, and the bytes of their weights."""
        groups = self._native.expert_loads()
        routed = [groups[i] for i in self._routed_groups]
        return sum(loads for loads, _ in routed), sum(num_bytes for _, num_bytes in routed)

    def _buffer(self, columns: int) -> Tensor:
        return huge_pages.empty(self._max_tokens, columns)

    def _allocate(self, config: ModelConfig) -> None:
        heads, hidden = config.num_attention_heads, config.hidden_size
        self._hidden, self._x = self._buffer(hidden), self._buffer(hidden)
        self._q_a = self._buffer(config.q_lora_rank or 1)
        self._q = self._buffer(heads * config.qk_head_dim)
        self._latent = self._buffer(config.latent_dim)
        self._mixed = self._buffer(heads * config.v_head_dim)
        self._attention_out = self._buffer(hidden)
        self._mlp_out, self._shared_out = self._buffer(hidden), self._buffer(hidden)
        self._router_logits = self._buffer(max(config.num_experts, 1))
        top_k = max(config.num_experts_per_tok, 1)
        self._topk_ids = torch.empty(self._max_tokens, top_k, dtype=torch.int32)
        self._topk_weights = self._buffer(top_k)

    def _norm(self, norm: RMSNorm, deltas: list[Tensor], *, only_logits_rows: bool = False) -> None:
        self._native.rms_norm(
            self._hidden, deltas, norm.weight, norm.eps, self._x, only_logits_rows
        )

    def _record_attention(self, attention: MLA, cache: Tensor) -> None:
        config, native = self._config, self._native
        kv_a, q_proj = attention.kv_a_proj, attention.q_proj
        latent = (kv_a.packed.weights, kv_a.bias, self._x, self._latent)
        if attention.q_a_proj is None:
            native.linear([(q_proj.packed.weights, q_proj.bias, self._x, self._q), latent])
        else:
            q_a, norm = attention.q_a_proj, attention.q_a_norm
            native.linear([(q_a.packed.weights, q_a.bias, self._x, self._q_a), latent])
            native.rms_norm(self._q_a, [], norm.weight, norm.eps, self._q_a, False)
            native.linear([(q_proj.packed.weights, q_proj.bias, self._q_a, self._q)])
        native.rope_and_store(
            self._q,
            config.num_attention_heads,
            self._latent,
            config.kv_lora_rank,
            attention.kv_a_norm.weight,
            attention.kv_a_norm.eps,
            self._cos_sin,
            config.rope_interleave,
            cache,
        )
        up = attention.up
        native.attention(
            up.w_uk_transposed.weights,
            up.w_uk.weights,
            up.w_uv.weights,
            self._q,
            cache,
            self._mixed,
            config.softmax_scale,
        )
        o_proj = attention.o_proj
        native.linear([(o_proj.packed.weights, o_proj.bias, self._mixed, self._attention_out)])

    def _record_mlp(self, mlp: MoE | GatedMLP | GpuGatedMLP) -> list[Tensor]:
        """Returns the buffers whose sum the block adds to the hidden state."""
        if isinstance(mlp, MoE):
            return self._record_moe(mlp)
        assert isinstance(mlp, GatedMLP)
        self._experts((mlp.packed.weights, *self._everyone, self._x, self._mlp_out))
        return [self._mlp_out]

    def _experts(self, *groups: tuple[ExpertWeights, Tensor, Tensor, Tensor, Tensor]) -> None:
        self._native.experts(list(groups))
        self._num_groups += len(groups)

    def _record_moe(self, moe: MoE) -> list[Tensor]:
        config, router = self._config, moe.router
        self._native.router(
            router.weight,
            router.bias,
            self._x,
            self._router_logits,
            self._topk_ids,
            self._topk_weights,
            config.scoring_func,
            group_rank(config),
            config.n_group,
            config.topk_group,
            config.norm_topk_prob,
            config.routed_scaling_factor,
        )
        chosen = (self._topk_ids, self._topk_weights)
        assert isinstance(moe.experts, CpuExperts)
        routed = (moe.experts.weights, *chosen, self._x, self._mlp_out)
        self._routed_groups.append(self._num_groups)
        if moe.shared_experts is None:
            self._experts(routed)
            return [self._mlp_out]
        shared = moe.shared_experts.packed
        self._experts(routed, (shared.weights, *self._everyone, self._x, self._shared_out))
        return [self._mlp_out, self._shared_out]
