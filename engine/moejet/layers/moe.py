"""Mixture-of-experts block: router, routed experts, shared experts."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moejet.config import ModelConfig
from moejet.experts.cpu_experts import CpuExperts
from moejet.experts.hybrid_experts import HybridExperts
from moejet.layers.linear import Dense
from moejet.ops.router_logits import router_logits
from moejet.ops.router_topk import router_topk
from moejet.weights.packed_state import Packed
from moejet.weights.spec import TensorSpec

if TYPE_CHECKING:
    from moejet._C import ThreadPool


class Router:
    """fp32 gate: logits [T, E] to (topk_ids, topk_weights)."""

    def __init__(
        self, config: ModelConfig, pool: ThreadPool | None = None, *, device: torch.device
    ):
        self.config = config
        self.pool = pool
        self.weight = torch.empty(config.num_experts, config.hidden_size, device=device)
        self.bias: Tensor | None = None
        if config.topk_method == "noaux_tc":
            self.bias = torch.empty(config.num_experts, device=device)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return router_topk(router_logits(x, self.weight, self.pool), self.bias, self.config)

    def tensor_specs(self, prefix: str) -> dict[str, TensorSpec]:
        specs = {f"{prefix}.weight": TensorSpec.copy_into(self.weight)}
        if self.bias is not None:
            specs[f"{prefix}.e_score_correction_bias"] = TensorSpec.copy_into(self.bias)
        return specs

    def state(self, prefix: str) -> dict[str, Tensor | Packed]:
        own: dict[str, Tensor | Packed] = {prefix: self.weight}
        return own if self.bias is None else {**own, f"{prefix}.bias": self.bias}


class MoE:
    """shared(x) + sum over the chosen experts of weight * expert(x)."""

    def __init__(self, config: ModelConfig, experts: CpuExperts | HybridExperts, *, dense: Dense):
        self.config = config
        self.router = Router(config, experts.pool, device=dense.device)
        self.experts = experts
        self.shared_experts: Any = None
        if config.num_shared_experts:
            width = config.num_shared_experts * config.moe_intermediate_size
            self.shared_experts = dense.within("shared_experts").gated_mlp(
                config.hidden_size, width
            )

    def __call__(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        """x [T, D]. padding [T] bool: rows that stand for nothing, whose result nobody reads."""
        topk_ids, topk_weights = self.router(x)
        if padding is not None:
            topk_ids = topk_ids.masked_fill(padding[:, None], -1)
        if isinstance(self.experts, CpuExperts):
            routed = self.experts.forward(x, topk_ids, topk_weights)
            return routed if self.shared_experts is None else routed + self.shared_experts(x)
        self.experts.submit(x, topk_ids, topk_weights)
        shared = None if self.shared_experts is None else self.shared_experts(x)
        routed = self.experts.collect()
        return routed if shared is None else routed.add_(shared)

    def tensor_specs(self, prefix: str) -> dict[str, TensorSpec]:
        specs = self.router.tensor_specs(f"{prefix}.gate")
        if self.shared_experts is not None:
            specs |= self.shared_experts.tensor_specs(f"{prefix}.shared_experts")
        hidden, inter = self.config.hidden_size, self.config.moe_intermediate_size
        for expert in range(self.config.num_experts):
            for name, shape in (
                ("gate", (inter, hidden)),
                ("up", (inter, hidden)),
                ("down", (hidden, inter)),
            ):
                specs[f"{prefix}.experts.{expert}.{name}_proj.weight"] = TensorSpec(
                    shape,
                    partial(self.experts.set_projection, expert, name),
                    load_stored=partial(self.experts.set_stored, expert, name),
                )
        return specs

    def state(self, prefix: str) -> dict[str, Tensor | Packed]:
        """What holds the weights once they are loaded, by name."""
        own = self.router.state(f"{prefix}.gate") | self.experts.state(f"{prefix}.experts")
        if self.shared_experts is not None:
            own |= self.shared_experts.state(f"{prefix}.shared_experts")
        return own
