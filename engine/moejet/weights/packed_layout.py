"""Where the matrices of an expert lie among its packed bytes (csrc/pack.h has the layout, csrc/nodes.h the slices)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

PANEL_ROWS = 16
_EXPERT_ALIGNMENT = 4096


@dataclass(frozen=True, slots=True)
class PackedBlock:
    """Of one panel of 16 rows: inputs, and the bytes that they take."""

    inputs: int
    nbytes: int

    def pair_bytes(self, inputs: int) -> int:
        """Of two panels over so many inputs."""
        return 2 * -(-inputs // self.inputs) * self.nbytes


BLOCKS = {
    "int4_g32": PackedBlock(64, 576),
    "int8": PackedBlock(128, 2112),
    "bf16": PackedBlock(32, 1024),
    "fp8": PackedBlock(128, 2080),
    "fp32": PackedBlock(32, 2048),
    "q4_0": PackedBlock(64, 576),
    "q8_0": PackedBlock(64, 1088),
    "q4_k": PackedBlock(256, 2304),
    "q5_k": PackedBlock(256, 2816),
    "q6_k": PackedBlock(256, 3392),
}


@dataclass(frozen=True, slots=True)
class PackedSlice:
    """What one memory node has of every expert: these pairs of gate and up, after them these of down, and padding.

    Pairs are numbered as in the whole matrix, (first, end).
    """

    nbytes: int
    gate_up: tuple[int, int]
    down: tuple[int, int]


@dataclass(frozen=True)
class PackedLayout:
    """Of the experts of a layer: gate and up [I, D] in `format`, down [D, I] in `down_format`."""

    hidden_size: int
    intermediate_size: int
    format: str
    down_format: str
    num_nodes: int = 1

    @cached_property
    def slices(self) -> tuple[PackedSlice, ...]:
        """One for each memory node."""
        units = -(-self.intermediate_size // 32), -(-self.hidden_size // 32)
        made = []
        for node in range(self.num_nodes):
            first, end = ([u * n // self.num_nodes for u in units] for n in (node, node + 1))
            gate_up, down = (2 * first[0], 2 * end[0]), (first[1], end[1])
            nbytes = (gate_up[1] - gate_up[0]) * self.gate_up_pair_bytes
            nbytes += (down[1] - down[0]) * self.down_pair_bytes
            made.append(
                PackedSlice(-(-nbytes // _EXPERT_ALIGNMENT) * _EXPERT_ALIGNMENT, gate_up, down)
            )
        return tuple(made)

    @property
    def gate_up_pair_bytes(self) -> int:
        """A pair: 16 rows of gate and the same of up."""
        return BLOCKS[self.format].pair_bytes(self.hidden_size)

    @property
    def down_pair_bytes(self) -> int:
        """A pair: 32 rows."""
        return BLOCKS[self.down_format].pair_bytes(self.intermediate_size)

    @property
    def expert_bytes(self) -> int:
        """On all nodes together."""
        return sum(part.nbytes for part in self.slices)
