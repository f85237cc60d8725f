"""Experts that arrive on the GPU as the CPU has them packed: the same weights, in the GPU's layout.

Codes and scales of int4_g32, int8, fp8 and bf16 change places and nothing else. What a GPU has in another format than
the CPU (`gpu_matrices.gpu_format`: blocks of GGUF files, fp32, and int4_g32 where its groups do not divide the inputs)
is dequantised to fp32 and quantised to int8 as `weights.gpu_weights.quantize` does it. So a slot holds, bit for bit,
what `ResidentExperts` makes of the same checkpoint, except for int4_g32 that becomes int8: there the GPU's own experts
are made of the checkpoint's weights, and these of the CPU's int4. An int4 scale of 2^18 or more, which loading to the
GPU refuses, is not noticed here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moejet.environment import use_reference
from moejet.weights.gpu_weights import GpuWeights, pack_nibbles, quantize
from moejet.weights.packed_layout import BLOCKS, PANEL_ROWS, PackedLayout
from moejet.weights.stored import FP8_BLOCK


def unpack_experts(
    packed: Tensor, slots: Tensor, layout: PackedLayout, gate_up: GpuWeights, down: GpuWeights
) -> None:
    """Sets n slots to the experts whose packed bytes these are.

    packed [at least n * layout.expert_bytes] uint8, 64-byte aligned: for each memory node in turn, its slices of the n
    experts one after another · slots [n] int32, all different, on the same device · gate_up (S, 2, I, D) and down
    (S, D, I), contiguous, in the packed format or int8
    """
    _check(packed, slots, layout, gate_up, down)
    if slots.shape[0] == 0:
        return
    if not packed.is_cuda or use_reference():
        unpack_experts_ref(packed, slots, layout, gate_up, down)
        return
    from moejet.kernels.unpack_experts import unpack_experts as launch

    launch(packed, slots, layout, gate_up, down)


def unpack_experts_ref(
    packed: Tensor, slots: Tensor, layout: PackedLayout, gate_up: GpuWeights, down: GpuWeights
) -> None:
    """Torch reference of `unpack_experts`."""
    count, chosen = slots.shape[0], slots.long()
    pairs: tuple[list[Tensor], list[Tensor]] = ([], [])
    begin = 0
    for part in layout.slices:
        slices = packed[begin : begin + count * part.nbytes].view(count, part.nbytes)
        begin += slices.numel()
        at = 0
        for found, (first, end), size in (
            (pairs[0], part.gate_up, layout.gate_up_pair_bytes),
            (pairs[1], part.down, layout.down_pair_bytes),
        ):
            stop = at + (end - first) * size
            found.append(slices[:, at:stop].reshape(count, end - first, size))
            at = stop
    for of_nodes, format, target, alternate in (
        (pairs[0], layout.format, gate_up, True),
        (pairs[1], layout.down_format, down, False),
    ):
        shape = (count, *target.shape[1:])
        found_weights = _unpacked(torch.cat(of_nodes, 1), format, target.format, shape, alternate)
        target.codes[chosen] = found_weights.codes
        if target.scales is not None and found_weights.scales is not None:
            target.scales[chosen] = found_weights.scales


def _unpacked(
    pairs: Tensor, format: str, target: str, shape: tuple[int, ...], alternate: bool
) -> GpuWeights:
    """Pairs [n, P, bytes] as matrices of that shape. alternate: the panels of a pair belong to two matrices."""
    block = BLOCKS[format]
    rows, cols = shape[-2:]

    def matrices(parts: Tensor) -> Tensor:
        """[n, P, blocks, 2, 16, ..] of every panel block's rows to [.., rows, values of all blocks]."""
        order = (0, 3, 1, 4, 2) if alternate else (0, 1, 3, 4, 2)
        whole = parts.permute(*order, *range(5, parts.dim()))
        return whole.reshape(*shape[:-2], -1, whole.shape[4:].numel())[..., :rows, :]

    panels = pairs.reshape(*pairs.shape[:2], -1, 2, block.nbytes)
    if format == "fp8":
        codes, scales = _fp8(pairs, panels)
        blocks = matrices(scales)[..., ::FP8_BLOCK, :]
        return GpuWeights(target, shape, matrices(codes)[..., :cols], blocks)
    if format == "int8":
        codes = _lanes(panels[..., :2048], torch.int8)
        scales = _words(panels[..., 2048:], torch.float32).unsqueeze(-1)
        return GpuWeights(target, shape, matrices(codes)[..., :cols], matrices(scales))
    if format == "int4_g32":
        values, factors = _int4(panels)
        values, factors = matrices(values)[..., :cols], matrices(factors)
        if target == "int4_g32":
            return GpuWeights(target, shape, pack_nibbles(values), factors[..., : cols // 32])
        wide = factors.float().repeat_interleave(32, -1)[..., :cols]
        return quantize((values.float() - 8.0) * wide, target)
    if format == "bf16":
        codes = _lanes(panels, torch.bfloat16)
        return GpuWeights(target, shape, matrices(codes)[..., :cols])
    values = _lanes(panels, torch.float32) if format == "fp32" else _gguf(panels, format)
    return quantize(matrices(values)[..., :cols].contiguous(), target)


def _split(part: Tensor, *sizes: int) -> Tensor:
    """The last dimension as these."""
    return part.reshape(*part.shape[:-1], *sizes)


def _words(part: Tensor, dtype: torch.dtype) -> Tensor:
    return part.contiguous().view(dtype)


def _lanes(vectors: Tensor, dtype: torch.dtype) -> Tensor:
    """Vectors of 64 bytes [.., 64 v], each 32-bit lane of which belongs to a row, to [.., 16, values]."""
    lanes = _split(vectors, -1, PANEL_ROWS, 4).transpose(-3, -2)
    return _words(lanes.flatten(-2), dtype)


def _fp8(pairs: Tensor, panels: Tensor) -> tuple[Tensor, Tensor]:
    """(codes [n, P, blocks, 2, 16, 128], scales [n, P, blocks, 2, 16, 1])."""
    blocks = pairs.reshape(*panels.shape[:3], -1)
    data, codes = blocks[..., :64], blocks[..., 64:]
    words = _split(_lanes(_split(codes, 2, -1), torch.uint8), -1, 4)
    scales = _split(_words(data, torch.float32), 2, 8)[..., :1, None]
    return words[..., [0, 2, 1, 3]].flatten(-2), scales.expand(*words.shape[:5], 1)


def _int4(panels: Tensor) -> tuple[Tensor, Tensor]:
    """(codes 0..15 [.., 16, 64], bf16 scales [.., 16, 2])."""
    both = _lanes(panels[..., :512], torch.uint8)
    scales = _split(_words(panels[..., 512:], torch.bfloat16), PANEL_ROWS, 2)
    return torch.cat((both & 15, both >> 4), -1), scales


def _gguf(panels: Tensor, format: str) -> Tensor:
    """The values [.., 16, inputs] of panel blocks of GGUF's formats; csrc/gguf_blocks.h explains their order."""
    halves_at = {"q4_0": 512, "q8_0": 1024}.get(format, 0)
    halves = _words(panels[..., halves_at : halves_at + 64], torch.float16).float()
    halves = _split(halves, 2, PANEL_ROWS).transpose(-1, -2)  # [.., 16, 2]
    if format in ("q4_0", "q8_0"):
        codes = _lanes(panels[..., :halves_at], torch.uint8)
        if format == "q8_0":
            groups = _split(codes, 8, 2, 4).transpose(-3, -2).flatten(-2)
            values = groups.contiguous().view(torch.int8).float()
        else:
            values = torch.stack((codes & 15, codes >> 4), -2).float() - 8.0
        return (values * halves.unsqueeze(-1)).flatten(-2)
    words = _lanes(panels[..., 64:], torch.uint8)
    codes, scales, mins = (_q6_k if format == "q6_k" else _q45_k)(words, format)
    values = halves[..., :1, None] * scales.unsqueeze(-1) * codes
    if mins is not None:
        values = values - (halves[..., 1:, None] * mins.unsqueeze(-1))
    return values.flatten(-2)


def _q45_k(words: Tensor, format: str) -> tuple[Tensor, Tensor, Tensor]:
    """(codes [.., 16, 8, 32], scales, mins [.., 16, 8]) of bytes [.., 16, b] behind d and dmin."""
    packed, rest = words[..., :12], words[..., 12:]
    low, high, both = torch.split(packed, 4, -1)
    scales = torch.cat((low & 63, (both & 15) | (low >> 6 << 4)), -1)
    mins = torch.cat((high & 63, both >> 4 | (high >> 6 << 4)), -1)
    planes = None
    if format == "q5_k":
        mixed = _split(rest[..., :64], 8, 2, 4)
        planes = mixed[..., 0, :].flatten(-2)
        rest = torch.cat((mixed[..., 1, :].flatten(-2), rest[..., 64:]), -1)
    chunks = _split(rest, 4, 32)
    codes = torch.stack((chunks & 15, chunks >> 4), -2).flatten(-3, -2)
    if planes is not None:
        bits = [(planes >> group & 1) << 4 for group in range(8)]
        codes = codes | torch.stack(bits, -2)
    return codes.float(), scales.float(), mins.float()


def _q6_k(words: Tensor, _: str) -> tuple[Tensor, Tensor, None]:
    """(codes [.., 16, 16, 16], scales [.., 16, 16], None)."""
    scales = words[..., :16].contiguous().view(torch.int8).float()
    found = []
    for half in _split(words[..., 16:], 2, 96).unbind(-2):
        mixed = _split(half[..., :64], 8, 2, 4)
        even, planes = (mixed[..., i, :].flatten(-2) for i in (0, 1))
        odd = half[..., 64:]
        for group, nibbles in enumerate((even & 15, odd & 15, even >> 4, odd >> 4)):
            found.append(nibbles | (planes >> (2 * group) & 3) << 4)
    codes = torch.cat(found, -1).float() - 32.0
    return _split(codes, 16, 16), scales, None


def _check(
    packed: Tensor, slots: Tensor, layout: PackedLayout, gate_up: GpuWeights, down: GpuWeights
) -> None:
    hidden, inner = layout.hidden_size, layout.intermediate_size
    assert gate_up.shape[1:] == (2, inner, hidden), f"{gate_up.shape=} {layout=}"
    assert down.shape[1:] == (hidden, inner), f"{down.shape=} {layout=}"
    for target, format in ((gate_up, layout.format), (down, layout.down_format)):
        same = target.format == format
        assert same or (target.format == "int8" and format not in ("bf16", "fp8")), (
            f"{format} to {target.format}"
        )
        assert target.codes.is_contiguous()
        assert target.scales is None or target.scales.is_contiguous()
    assert packed.dtype == torch.uint8, f"{packed.dtype=}"
    assert packed.numel() >= slots.shape[0] * layout.expert_bytes, f"{packed.shape=} {layout=}"
    assert slots.dtype == torch.int32, f"{slots.dtype=}"
