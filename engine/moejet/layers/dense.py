"""A model's dense matrices in this machine's memory, and the layers that compute with them on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moejet.config import ModelConfig
from moejet.experts.cpu_experts import CpuExperts
from moejet.layers.mla import MLA
from moejet.ops.linear import PackedMatrices
from moejet.weights.packed_state import Packed
from moejet.weights.spec import TensorSpec

if TYPE_CHECKING:
    from moejet._C import ThreadPool

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class DenseWeights:
    """How a model's dense matrices are held: packed in `format`, computed by the pool's workers.

    arithmetic: see `CpuExperts` · own: formats of the matrices that have another, by name · prefix: where the names
    that are asked for begin, see `within`.
    """

    format: str
    pool: ThreadPool
    isa: str = "auto"
    arithmetic: str = "bf16"
    own: Mapping[str, str] = field(default_factory=dict)
    prefix: str = ""

    def within(self, part: str) -> DenseWeights:
        """The same for a part of the model, in which names are relative to it."""
        return replace(self, prefix=f"{self.prefix}{part}.")

    def format_of(self, name: str) -> str:
        return self.own.get(self.prefix + name, self.format)

    def matrices(self, name: str, num: int, rows: int, cols: int) -> PackedMatrices:
        return PackedMatrices(
            num,
            rows,
            cols,
            format=self.format_of(name),
            pool=self.pool,
            isa=self.isa,
            arithmetic=self.arithmetic,
        )

    def gated_mlp(self, hidden_size: int, intermediate_size: int) -> GatedMLP:
        return GatedMLP(hidden_size, intermediate_size, dense=self)

    def attention(self, config: ModelConfig) -> MLA:
        return MLA(config, dense=self)

    @property
    def device(self) -> torch.device:
        return _CPU

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32


class GatedMLP:
    """down(silu(gate(x)) * up(x)): dense layers and shared experts. x [T, D] fp32 to [T, D].

    It is the expert kernel with one expert that every token goes to: one call for all three matrices. Gate and up have
    one format, named after gate.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, *, dense: DenseWeights):
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.packed = CpuExperts(
            1,
            hidden_size,
            intermediate_size,
            format=dense.format_of("gate_proj"),
            down_format=dense.format_of("down_proj"),
            pool=dense.pool,
            isa=dense.isa,
            arithmetic=dense.arithmetic,
        )

    def __call__(self, x: Tensor) -> Tensor:
        num_tokens = x.shape[0]
        everyone = torch.zeros(num_tokens, 1, dtype=torch.int32)
        return self.packed.forward(x, everyone, torch.ones(num_tokens, 1))

    def tensor_specs(self, prefix: str) -> dict[str, TensorSpec]:
        inner = (self.intermediate_size, self.hidden_size)
        return {
            f"{prefix}.{name}_proj.weight": TensorSpec(
                shape,
                partial(self.packed.set_projection, 0, name),
                load_stored=partial(self.packed.set_stored, 0, name),
            )
            for name, shape in (("gate", inner), ("up", inner), ("down", inner[::-1]))
        }

    def state(self, prefix: str) -> dict[str, Tensor | Packed]:
        return {prefix: self.packed}
