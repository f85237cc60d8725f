"""Dense projections, embedding and norm: a weight, its checkpoint name, one call into ops."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from moejet.ops.rms_norm import rms_norm
from moejet.ops.silu_mul import silu_mul
from moejet.weights.spec import TensorSpec


class Linear:
    """y = x W^T + b with W [out, in] in `dtype`; x is cast to it."""

    def __init__(
        self, in_features: int, out_features: int, *, dtype: torch.dtype, bias: bool = False
    ):
        self.weight = torch.empty(out_features, in_features, dtype=dtype)
        self.bias = torch.empty(out_features, dtype=dtype) if bias else None

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.weight.dtype), self.weight, self.bias)

    def tensor_specs(self, prefix: str) -> dict[str, TensorSpec]:
        specs = {f"{prefix}.weight": TensorSpec.copy_into(self.weight)}
        if self.bias is not None:
            specs[f"{prefix}.bias"] = TensorSpec.copy_into(self.bias)
        return specs


class RMSNorm:
    """Root-mean-square norm of `dim` values; the weight stays fp32."""

    def __init__(self, dim: int, eps: float, *, out_dtype: torch.dtype):
        self.weight = torch.empty(dim, dtype=torch.float32)
        self.eps = eps
        self.out_dtype = out_dtype

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps, out_dtype=self.out_dtype)

    def tensor_specs(self, prefix: str) -> dict[str, TensorSpec]:
        return {f"{prefix}.weight": TensorSpec.copy_into(self.weight)}


class Embedding:
    """Token embedding [V, D]; rows come out as fp32 hidden states."""

    def __init__(self, vocab_size: int, hidden_size: int, *, dtype: torch.dtype):
        self.weight = torch.empty(vocab_size, hidden_size, dtype=dtype)

    def __call__(self, token_ids: Tensor) -> Tensor:
        return self.weight[token_ids].float()

    def tensor_specs(self, prefix: str) -> dict[str, TensorSpec]:
        return {f"{prefix}.weight": TensorSpec.copy_into(self.weight)}


class GatedMLP:
    """down(silu(gate(x)) * up(x)): dense layers and shared experts. gate and up are one matrix [2I, D]."""

    def __init__(self, hidden_size: int, intermediate_size: int, *, dtype: torch.dtype):
        self.intermediate_size = intermediate_size
        self.gate_up = Linear(hidden_size, 2 * intermediate_size, dtype=dtype)
        self.down = Linear(intermediate_size, hidden_size, dtype=dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self.down(silu_mul(self.gate_up(x)))

    def tensor_specs(self, prefix: str) -> dict[str, TensorSpec]:
        weight, split = self.gate_up.weight, self.intermediate_size
        return {
            f"{prefix}.gate_proj.weight": TensorSpec.copy_into(weight[:split]),
            f"{prefix}.up_proj.weight": TensorSpec.copy_into(weight[split:]),
            f"{prefix}.down_proj.weight": TensorSpec.copy_into(self.down.weight),
        }
