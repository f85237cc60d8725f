"""Mixture-of-experts block: router, routed experts on the CPU, shared experts."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moejet.config import ModelConfig
from moejet.experts.cpu_experts import CpuExperts
from moejet.layers.linear import DenseWeights, GatedMLP
from moejet.ops.router_logits import router_logits
from moejet.ops.router_topk import router_topk
from moejet.weights.packed_cache import Packed
from moejet.weights.spec import TensorSpec

if TYPE_CHECKING:
    from moejet._C import ThreadPool


class Router:
    """fp32 gate: logits [T, E] to (topk_ids, topk_weights)."""

    def __init__(self, config: ModelConfig, pool: ThreadPool | None = None):
        self.config = config
        self.pool = pool
        self.weight = torch.empty(config.num_experts, config.hidden_size)
        self.bias: Tensor | None = None
        if config.topk_method == "noaux_tc":
            self.bias = torch.empty(config.num_experts)

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

    def __init__(self, config: ModelConfig, experts: CpuExperts, *, dense: DenseWeights):
        self.config = config
        self.router = Router(config, experts.pool)
        self.experts = experts
        self.shared_experts: GatedMLP | None = None
        if config.num_shared_experts:
            width = config.num_shared_experts * config.moe_intermediate_size
            self.shared_experts = GatedMLP(
                config.hidden_size, width, dense=dense.within("shared_experts")
            )

    def __call__(self, x: Tensor) -> Tensor:
        topk_ids, topk_weights = self.router(x)
        routed = self.experts.forward(x, topk_ids, topk_weights)
        return routed if self.shared_experts is None else routed + self.shared_experts(x)

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
        own = self.router.state(f"{prefix}.gate") | {f"{prefix}.experts": self.experts}
        if self.shared_experts is not None:
            own |= self.shared_experts.state(f"{prefix}.shared_experts")
        return own
