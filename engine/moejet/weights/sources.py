"""Which stored tensors make up which weight: a matrix in fp8 or int4 is two tensors or more.

`assemble` pairs codes with their scales under the name by which the model knows the weight, and checks their
shapes and dtypes against each other. It reads no data.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field

from moejet.weights.checkpoint import TORCH_DTYPES, TensorInfo
from moejet.weights.gguf_types import layout_of
from moejet.weights.stored import FP8_BLOCK, INT4_GROUP, Encoding

# Multimodal checkpoints nest the language model; the longest prefix is tried first.
_PREFIXES = ("model.language_model.", "language_model.")
_SCALE_DTYPES = (*TORCH_DTYPES, "F8_E8M0")
# What quantisers write beside the codes; `weight_shape` repeats what the other shapes say.
_PARTS = re.compile(r"(?P<base>.*\.weight)_(?P<part>scale_inv|scale|shape|packed|zero_point|g_idx)")


@dataclass(frozen=True, slots=True)
class SourceWeight:
    """One weight of a checkpoint: where its data lies and, if it is quantised, its scales."""

    name: str
    info: TensorInfo
    shape: tuple[int, ...]
    encoding: Encoding = "plain"
    scale: TensorInfo | None = None

    @property
    def ggml_type(self) -> str | None:
        """Of the blocks, if it is encoded as "gguf"."""
        layout = layout_of(self.info.dtype)
        return None if layout is None else layout.name

    @property
    def num_bytes(self) -> int:
        return self.info.num_bytes + (self.scale.num_bytes if self.scale else 0)


@dataclass(slots=True)
class Sources:
    """The weights of a checkpoint in file order, and what cannot be understood."""

    weights: list[SourceWeight] = field(default_factory=list)
    unsupported: list[str] = field(default_factory=list)  # name and reason
    broken: set[str] = field(default_factory=set)  # names of weights among them
    orphans: list[str] = field(default_factory=list)  # scales without a weight


def assemble(tensors: Iterable[TensorInfo]) -> Sources:
    """Weights of the given tensors (in file order); names lose multimodal prefixes."""
    infos = [(plain_name(info.name), info) for info in tensors]
    parts: dict[str, dict[str, TensorInfo]] = {}
    for name, info in infos:
        match = _PARTS.fullmatch(name)
        if match:
            parts.setdefault(match["base"], {})[match["part"]] = info
    result = Sources()
    used: set[str] = set()
    for name, info in infos:
        match = _PARTS.fullmatch(name)
        base = match["base"] if match else name
        if match and match["part"] != "packed":
            continue
        mine = parts.get(base, {})
        try:
            weight = _assemble_one(base, info, mine, packed=match is not None)
        except ValueError as error:
            result.unsupported.append(f"{info.name} {error}")
            result.broken.add(base)
            used.add(base)
            continue
        if weight.encoding != "plain":
            used.add(base)
        result.weights.append(weight)
    result.orphans = [
        info.name for base, mine in parts.items() if base not in used for info in mine.values()
    ]
    return result


def _assemble_one(
    name: str, info: TensorInfo, parts: dict[str, TensorInfo], *, packed: bool
) -> SourceWeight:
    if packed:
        return _int4(name, info, parts)
    if info.dtype == "F8_E4M3" and name.endswith(".weight"):
        return _fp8(name, info, parts)
    if layout_of(info.dtype) is not None:
        return SourceWeight(name, info, info.shape, "gguf")
    if info.dtype not in TORCH_DTYPES:
        raise ValueError(
            f"is stored as {info.dtype}; supported: F32, F16, BF16, fp8 (F8_E4M3 with "
            "weight_scale_inv) and int4 (weight_packed)"
        )
    return SourceWeight(name, info, info.shape)


def _fp8(name: str, info: TensorInfo, parts: dict[str, TensorInfo]) -> SourceWeight:
    scale = parts.get("scale_inv")
    if scale is None:
        found = f"; it has {', '.join(sorted(parts))}" if parts else ""
        raise ValueError(f"is fp8 without weight_scale_inv (a scale per 128 x 128 block){found}")
    if len(info.shape) != 2:
        raise ValueError(f"is fp8 of shape {list(info.shape)}; supported: matrices")
    blocks = tuple(-(-size // FP8_BLOCK) for size in info.shape)
    _check_scale(scale, blocks, _SCALE_DTYPES)
    return SourceWeight(name, info, info.shape, "fp8", scale)


def _int4(name: str, info: TensorInfo, parts: dict[str, TensorInfo]) -> SourceWeight:
    for part, meaning in (("zero_point", "asymmetric"), ("g_idx", "reordered")):
        if part in parts:
            raise ValueError(f"is {meaning} int4 (weight_{part}); supported: symmetric, in order")
    if info.dtype != "I32" or len(info.shape) != 2:
        raise ValueError(
            f"is {info.dtype} {list(info.shape)}; supported: I32 matrices of eight 4-bit codes each"
        )
    rows, cols = info.shape[0], info.shape[1] * 8
    scale = parts.get("scale")
    if scale is None:
        raise ValueError("has no weight_scale")
    if cols % INT4_GROUP:
        raise ValueError(f"has {cols} columns, which is no multiple of the group of {INT4_GROUP}")
    _check_scale(scale, (rows, cols // INT4_GROUP), tuple(TORCH_DTYPES))
    return SourceWeight(name, info, (rows, cols), "int4", scale)


def _check_scale(scale: TensorInfo, shape: tuple[int, ...], dtypes: tuple[str, ...]) -> None:
    if scale.dtype not in dtypes:
        raise ValueError(f"has scales of dtype {scale.dtype}; supported: {', '.join(dtypes)}")
    if scale.shape != shape:
        raise ValueError(f"has scales of shape {list(scale.shape)}, not {list(shape)}")


def plain_name(name: str) -> str:
    """The name without the prefix under which multimodal checkpoints nest the language model."""
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            rest = name.removeprefix(prefix)
            return rest if rest.startswith(("model.", "lm_head.")) else f"model.{rest}"
    return name
