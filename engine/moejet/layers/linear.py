"""Dense projections, gated MLP, embedding and norm.

Matrices live packed (`DenseWeights.format`) and are computed by our kernels; activations between operations are fp32.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from moejet.experts.cpu_experts import CpuExperts
from moejet.ops.fused_add_rms_norm import fused_add_rms_norm
from moejet.ops.gpu_matrices import GpuMatrices
from moejet.ops.linear import PackedMatrices, linear
from moejet.ops.rms_norm import rms_norm
from moejet.weights.packed_state import Packed
from moejet.weights.spec import TensorSpec
from moejet.weights.stored import StoredWeight

if TYPE_CHECKING:
    from moejet._C import ThreadPool
    from moejet.config import ModelConfig
    from moejet.layers.mla import MLA

_CPU = torch.device("cpu")


class Dense(Protocol):
    """How a model's dense matrices are held, and where: `DenseWeights`, or `layers.gpu.GpuDenseWeights`."""

    @property
    def format(self) -> str: ...
    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype:
        """Of activations inside the layers."""

    def within(self, part: str) -> Dense:
        """The same for a part of the model, in which names are relative to it."""

    def matrices(self, name: str, num: int, rows: int, cols: int) -> Any:
        """PackedMatrices or GpuMatrices."""

    def gated_mlp(self, hidden_size: int, intermediate_size: int) -> Any:
        """GatedMLP or GpuGatedMLP."""

    def attention(self, config: ModelConfig) -> MLA: ...


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
        from moejet.layers.mla import MLA

        return MLA(config, dense=self)

    @property
    def device(self) -> torch.device:
        return _CPU

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32


class Linear:
    """y = x W^T + b with W [out, in]; x [T, in] to y [T, out], both fp32; on a GPU of x's dtype."""

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        dense: Dense,
        bias: bool = False,
    ):
        self.shape = (out_features, in_features)
        self.bias = torch.empty(out_features, device=dense.device) if bias else None
        self.packed = dense.matrices(name, 1, out_features, in_features)

    def __call__(self, x: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        """out_dtype: on a GPU, another one than x's."""
        if isinstance(self.packed, GpuMatrices):
            return self.packed.apply(x, self.bias, out_dtype=out_dtype)
        out = linear(x, self.packed)
        return out if self.bias is None else out + self.bias

    def load(self, weight: Tensor) -> None:
        self.packed.set(0, weight)

    def load_stored(self, weight: StoredWeight) -> None:
        self.packed.set_stored(0, weight)

    def tensor_specs(self, prefix: str) -> dict[str, TensorSpec]:
        spec = TensorSpec(self.shape, self.load, load_stored=self.load_stored)
        specs = {f"{prefix}.weight": spec}
        if self.bias is not None:
            specs[f"{prefix}.bias"] = TensorSpec.copy_into(self.bias)
        return specs

    def state(self, prefix: str) -> dict[str, Tensor | Packed]:
        """What holds the weights once they are loaded, by name: tensors and packed weights."""
        own: dict[str, Tensor | Packed] = self.packed.state(prefix)
        return own if self.bias is None else {**own, f"{prefix}.bias": self.bias}


class RMSNorm:
    """Root-mean-square norm of `dim` values, computed in fp32; results have the dtype of `dense`."""

    def __init__(self, dim: int, eps: float, *, dense: Dense):
        self.weight = torch.empty(dim, device=dense.device)
        self.eps = eps
        self.dtype = dense.dtype

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, out_dtype=self.dtype)

    def after(self, delta: Tensor | None, hidden: Tensor) -> Tensor:
        """hidden += delta in place, then its norm."""
        if delta is None:
            return self(hidden)
        return fused_add_rms_norm(delta, hidden, self.weight, self.eps, out_dtype=self.dtype)

    def tensor_specs(self, prefix: str) -> dict[str, TensorSpec]:
        return {f"{prefix}.weight": TensorSpec.copy_into(self.weight)}

    def state(self, prefix: str) -> dict[str, Tensor | Packed]:
        return {prefix: self.weight}


class Embedding:
    """Token embedding [V, D], bf16 or fp32; rows come out as fp32 hidden states."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype):
        self.weight = torch.empty(vocab_size, hidden_size, dtype=dtype)

    def __call__(self, token_ids: Tensor) -> Tensor:
        return self.weight[token_ids].float()

    def tensor_specs(self, prefix: str) -> dict[str, TensorSpec]:
        return {f"{prefix}.weight": TensorSpec.copy_into(self.weight)}

    def state(self, prefix: str) -> dict[str, Tensor | Packed]:
        return {prefix: self.weight}


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
