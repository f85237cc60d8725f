"""Random MoE layers and their truth: float64 on the dequantised weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moejet import _C

FORMATS = ("int4_g32", "int8", "fp8", "bf16", "fp32")


@dataclass
class Layer:
    """Packed experts, and what they stand for: (gate [I, D], up [I, D], down [D, I]) of each."""

    weights: _C.ExpertWeights
    dequantized: list[tuple[Tensor, Tensor, Tensor]]
    source: list[tuple[Tensor, Tensor, Tensor]]

    @classmethod
    def random(
        cls, format: str, *, experts: int = 4, hidden: int, inter: int, arithmetic: str = "bf16"
    ) -> Layer:
        """Gaussian weights that keep activations near unit size."""
        generator = torch.Generator().manual_seed(hidden * 1000 + inter)
        weights = _C.ExpertWeights(experts, hidden, inter, format, arithmetic=arithmetic)
        source, dequantized = [], []
        for e in range(experts):
            gate = torch.randn(inter, hidden, generator=generator) / hidden**0.5
            up = torch.randn(inter, hidden, generator=generator) / hidden**0.5
            down = torch.randn(hidden, inter, generator=generator) / inter**0.5
            weights.set_expert(e, gate, up, down)
            source.append((gate, up, down))
            g, u, d = (torch.from_numpy(w).double() for w in weights.dequantize(e))
            dequantized.append((g, u, d))
        return cls(weights, dequantized, source)

    def truth(self, x: Tensor, ids: Tensor, mix: Tensor) -> Tensor:
        """The layer in float64 on the dequantised weights: [T, D]."""
        out = torch.zeros(x.shape, dtype=torch.float64)
        for e, (gate, up, down) in enumerate(self.dequantized):
            for k in range(ids.shape[1]):
                rows = (ids[:, k] == e).nonzero().flatten()
                xe = x[rows].double()
                h = torch.nn.functional.silu(xe @ gate.T) * (xe @ up.T)
                out[rows] += mix[rows, k, None].double() * (h @ down.T)
        return out


def routing(tokens: int, experts: int, top_k: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(ids [T, K] int64, weights [T, K]): distinct experts, uniform weights."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(experts, generator=generator)[:top_k] for _ in range(tokens)])
    return ids, torch.rand(tokens, top_k, generator=generator)


def activations(tokens: int, hidden: int, seed: int = 0) -> Tensor:
    """Gaussian activations [T, D]."""
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed + 1))


def run(layer: Layer, x: Tensor, ids: Tensor, mix: Tensor, pool: _C.ThreadPool, isa: str) -> Tensor:
    """moe_forward into a fresh fp32 output."""
    out = torch.full((x.shape[0], x.shape[1]), float("nan"))
    used = _C.moe_forward(layer.weights, x, ids, mix, out, pool, isa)
    if used != isa:
        raise AssertionError(f"asked for {isa}, the kernels used {used}")
    return out


def check_bad_values(
    layer: Layer, hidden: int, tokens: int, poison: float, pool: _C.ThreadPool, isa: str
) -> None:
    """Asserts that an infinity, a NaN or a huge value (3e38) in two tokens leaves the others as they were.

    Infinities and NaN leave nothing finite in their own token.
    """
    x, (ids, mix) = activations(tokens, hidden), routing(tokens, 4, 2)
    clean = run(layer, x, ids, mix, pool, isa)
    x[11, 33] = poison
    x[29, hidden - 1] = poison
    result = run(layer, x, ids, mix, pool, isa)
    others = torch.ones(tokens, dtype=torch.bool)
    others[[11, 29]] = False
    if not torch.equal(result[others], clean[others]):
        raise AssertionError(f"{poison} in two tokens changed others")
    if abs(poison) != 3e38 and result[~others].isfinite().any():
        raise AssertionError(f"finite values in a token with {poison}")


def relative_error(result: Tensor, truth: Tensor) -> float:
    """|result - truth| / |truth|, over all elements."""
    return float((result.double() - truth).norm() / truth.norm())


def tolerance(format: str, isa: str, ids: Tensor, arithmetic: str = "bf16") -> float:
    """Largest relative error of a layer with Gaussian inputs against the truth.

    Vector kernels: fp32 sums (bf16, fp8, fp32), or x and h rounded to 1/127 of the largest of 32
    values, which costs 1.2 %, and more on a few short tokens. Tiles: x, h and dequantised weights
    rounded to bf16. Experts with few rows stay on the vector kernels, so a layer can mix both.
    int8 arithmetic on tiles: x and h rounded to 1/127 of the largest of 128 values costs 1.6 %, and
    requantised int4 weights make it 2.0 %; up to a fifth more with few tokens.
    """
    counts = torch.bincount(ids[ids >= 0].flatten().long())
    rows = _C.min_tile_rows(format, isa, arithmetic)
    tiled = (counts[counts > 0] >= rows) & (rows > 0)
    if format in ("bf16", "fp8", "fp32"):
        return 5e-3 if tiled.any() else 3e-6
    if tiled.any() and arithmetic == "int8":
        return 2e-2 if format == "int8" else 2.4e-2
    if tiled.all():
        return 5e-3
    return 1.5e-2 if ids.shape[0] >= 16 else 2e-2
