"""A layer's experts as the CPU packs them and as the GPU holds them, of the same weights of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moejet.config import GGUF_FORMATS
from moejet.experts.cpu_experts import CpuExperts
from moejet.experts.resident_experts import ResidentExperts
from moejet.testing.gguf_files import random_blocks
from moejet.weights.packed_layout import PackedLayout
from moejet.weights.stored import FP8_BLOCK, INT4_GROUP, StoredWeight

if TYPE_CHECKING:
    from moejet._C import ThreadPool


def stored_weight(format: str, rows: int, cols: int, *, seed: int) -> StoredWeight:
    """A random matrix as a checkpoint holds it whose own format this is."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, cols, generator=generator) * cols**-0.5
    if format in GGUF_FORMATS:
        kind = format.upper()
        blocks = torch.from_numpy(random_blocks((rows, cols), kind, cols**-0.5, seed))
        return StoredWeight((rows, cols), blocks, "gguf", ggml_type=kind)
    if format == "fp8":
        shape = -(-rows // FP8_BLOCK), -(-cols // FP8_BLOCK)
        codes = (values * 100).to(torch.float8_e4m3fn).view(torch.uint8)
        scale = torch.rand(shape, generator=generator) / 100
        return StoredWeight((rows, cols), codes, "fp8", scale)
    if format == "int4_g32" and cols % INT4_GROUP == 0:
        codes = torch.randint(256, (rows, cols // 2), generator=generator).to(torch.uint8)
        scale = torch.randn(rows, cols // INT4_GROUP, generator=generator).bfloat16()
        return StoredWeight((rows, cols), codes, "int4", scale)
    return StoredWeight.plain(values)


@dataclass(frozen=True, slots=True)
class PackedExperts:
    """All experts of a layer, in RAM (cpu) and as the GPU would have them (resident), expert e in slot e."""

    cpu: CpuExperts
    resident: ResidentExperts

    @classmethod
    def make(
        cls,
        format: str,
        down_format: str | None = None,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        pool: ThreadPool,
        device: torch.device | None = None,
    ) -> PackedExperts:
        down_format = down_format or format
        shape = (num_experts, hidden_size, intermediate_size)
        cpu = CpuExperts(*shape, format=format, down_format=down_format, pool=pool, isa="avx2")
        place = device or torch.device("cpu")
        resident = ResidentExperts(
            range(num_experts), *shape, format=format, down_format=down_format, device=place
        )
        for expert in range(num_experts):
            for number, name in enumerate(("gate", "up", "down")):
                rows, cols = intermediate_size, hidden_size
                if name == "down":
                    rows, cols = cols, rows
                kind = down_format if name == "down" else format
                weight = stored_weight(kind, rows, cols, seed=3 * expert + number)
                cpu.set_stored(expert, name, weight)
                resident.set_stored(expert, name, weight)
        return cls(cpu, resident)

    @property
    def layout(self) -> PackedLayout:
        return self.cpu.packed_layout

    def packed(self, experts: list[int]) -> Tensor:
        """Their bytes as `ops.unpack_experts` takes them."""
        parts = [self.cpu.packed_slices(expert) for expert in experts]
        return torch.cat([of_node for node in zip(*parts, strict=True) for of_node in node])
