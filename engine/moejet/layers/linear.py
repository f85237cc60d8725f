"""Dense projections, embedding and norm.

Matrices live packed and are computed by our kernels; activations between operations are fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from moejet.ops.fused_add_rms_norm import fused_add_rms_norm
from moejet.ops.gpu_matrices import GpuMatrices
from moejet.ops.linear import linear
from moejet.ops.rms_norm import rms_norm
from moejet.weights.packed_state import Packed
from moejet.weights.spec import TensorSpec
from moejet.weights.stored import StoredWeight

if TYPE_CHECKING:
    from moejet.config import ModelConfig

_CPU = torch.device("cpu")


class Dense(Protocol):
    """How a model's dense matrices are held, and where: `layers.dense.DenseWeights`, `layers.gpu.GpuDenseWeights`."""

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

    def attention(self, config: ModelConfig) -> Any:
        """MLA or GpuMLA."""


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
