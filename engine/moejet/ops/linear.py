"""Dense projections with packed weights on the CPU: G matrices of one shape, applied side by side.

out[t, g] = W_g x[t, g], or W_g x[t] where all matrices read the same input.

G = 1 is an ordinary linear layer; MLA's absorbed projections are one matrix per head. Packing and arithmetic are those
of the experts: integer formats quantise activations to int8 per 32 inputs (on AMX: bf16 tiles, or int8 ones with
arithmetic="int8"), the others multiply fp32 activations (fp8 and bf16: bf16 tiles on AMX).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, from_numpy

from moejet.environment import use_reference
from moejet.extension import load_extension, report_placement, resolve_isa
from moejet.weights.stored import StoredWeight

if TYPE_CHECKING:
    from moejet._C import ThreadPool


def fp8_bytes(w: Tensor, scale_inv: Tensor | None) -> Tensor:
    """w, or its bytes if it is float8_e4m3fn with scales: not every torch exports that type."""
    return w.view(torch.uint8) if scale_inv is not None and w.dtype == torch.float8_e4m3fn else w


def packing_arguments(weight: StoredWeight, target: str) -> tuple[Tensor, dict[str, Any]]:
    """(w, further arguments) with which the extension packs a stored weight in the format `target`.

    fp8 stays as it is in the format fp8, int4 with bf16 scales in the format int4_g32, GGUF's blocks in their own;
    other formats quantise the values. int4 with wider scales and GGUF's blocks are dequantised here for that.
    """
    scale = weight.scale
    if weight.encoding == "gguf" and weight.ggml_type is not None:
        own = weight.ggml_type.lower()
        if own == target:
            return weight.data.view(weight.shape[0], -1), {"source_format": own}
    if weight.encoding == "fp8" and scale is not None:
        return weight.data, {"scale_inv": scale.contiguous()}
    if weight.encoding == "int4" and scale is not None and scale.dtype == torch.bfloat16:
        return weight.data, {"group_scales": scale.contiguous()}
    return weight.dequantize(), {}


class PackedMatrices:
    """G packed matrices [rows, cols]; those never set are zero."""

    def __init__(
        self,
        num: int,
        rows: int,
        cols: int,
        *,
        format: str,
        pool: ThreadPool,
        isa: str = "auto",
        arithmetic: str = "bf16",
    ):
        self._C = load_extension()
        self.isa = resolve_isa(isa)
        self.pool = pool
        self.weights = self._C.LinearWeights(num, rows, cols, format, pool.memory_nodes, arithmetic)
        report_placement(self.weights)

    @property
    def nbytes(self) -> int:
        """Size of the packed weights, padding included."""
        return int(self.weights.nbytes)

    def state(self, prefix: str) -> dict[str, PackedMatrices]:
        """What holds the weights, by name."""
        return {prefix: self}

    def set(
        self,
        matrix: int,
        w: Tensor,
        scale_inv: Tensor | None = None,
        *,
        source_format: str | None = None,
    ) -> None:
        """Quantises and packs w [rows, cols], fp32, bf16, fp16, or float8_e4m3fn with its block scales.

        scale_inv, source_format: as for `CpuExperts.set_projection`.
        """
        w = fp8_bytes(w, scale_inv)
        self.weights.set(
            matrix, w, self.pool, self.isa, scale_inv=scale_inv, source_format=source_format
        )

    def set_stored(self, matrix: int, weight: StoredWeight) -> None:
        """Packs a quantised weight of a checkpoint, losslessly where `format` allows; see `packing_arguments`."""
        w, arguments = packing_arguments(weight, str(self.weights.format))
        self.weights.set(matrix, w, self.pool, self.isa, **arguments)

    def dequantize(self, matrix: int) -> Tensor:
        """The values that the kernels compute with, fp32 [rows, cols]."""
        return from_numpy(self.weights.dequantize(matrix))


def linear(x: Tensor, matrices: PackedMatrices) -> Tensor:
    """Applies the matrices to x [T, cols] (shared) or [T, G, cols], fp32 or bf16, last dimension adjacent.

    Returns fp32 [T, rows] for one matrix and 2-D x, else [T, G, rows].
    """
    if use_reference():
        return linear_ref(x, matrices)
    if x.dim() not in (2, 3):
        raise ValueError(f"x has shape {list(x.shape)}, expected [T, cols] or [T, G, cols]")
    weights = matrices.weights
    shape: tuple[int, ...] = (x.shape[0], weights.num_matrices, weights.rows)
    if weights.num_matrices == 1 and x.dim() == 2:
        shape = (x.shape[0], weights.rows)
    out = torch.empty(shape, dtype=torch.float32)
    used = matrices._C.linear_forward(weights, x, out, matrices.pool, matrices.isa)
    assert used == matrices.isa, f"{used=} {matrices.isa=}"
    return out


def linear_ref(x: Tensor, matrices: PackedMatrices) -> Tensor:
    """Torch reference of `linear` in float64, on the dequantised weights."""
    count = matrices.weights.num_matrices
    stacked = torch.stack([matrices.dequantize(g) for g in range(count)]).double()
    if x.dim() == 2:
        out = torch.einsum("tc,grc->tgr", x.double(), stacked).float()
        return out.squeeze(1) if count == 1 else out
    return torch.einsum("tgc,grc->tgr", x.double(), stacked).float()
