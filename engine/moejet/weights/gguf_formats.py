"""Which packed formats keep the bits of a GGUF file, matrix by matrix, or come nearest to them.

Types with kernels of their own keep their bits, other quantised ones become int8, unquantised ones bf16. Where one
format must serve several matrices (gate and up) or two must take the same activations (those and down), and the file's
do not agree, int8 stands in.

Attention holds W_UK in both directions, and blocks run along one: kv_b_proj keeps the bits of W_UK [N, C], k_b_proj
those of its transpose [C, N]. The other direction is requantised to int8.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from moejet.config import GGUF_FORMATS, ModelConfig
from moejet.weights.checkpoint import TensorInfo

_ATTENTION = ("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj")
_UNQUANTISED = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class GgufFormats:
    """experts: (gate and up, down) of every MoE layer · dense: (name, format) of every dense matrix, by the names of
    `moejet.layers`: gate stands for gate and up, kv_b_proj has its parts w_uk, w_uk_transposed and w_uv
    converted_experts, converted_dense: ggml types that become int8.
    """

    experts: tuple[tuple[str, str], ...]
    dense: tuple[tuple[str, str], ...]
    converted_experts: tuple[str, ...]
    converted_dense: tuple[str, ...]

    @classmethod
    def of(cls, tensors: Mapping[str, TensorInfo], config: ModelConfig) -> GgufFormats:
        """tensors: by Hugging Face name, experts one by one."""
        experts, dense = _Chooser(tensors), _Chooser(tensors)
        moe_layers = range(config.first_k_dense_replace, config.num_hidden_layers)
        return cls(
            tuple(experts.mlp(f"model.layers.{layer}.mlp.experts.0") for layer in moe_layers),
            tuple(_dense_formats(dense, tensors, config)),
            tuple(sorted(experts.converted)),
            tuple(sorted(dense.converted)),
        )


class _Chooser:
    """Chooses formats and notes the types that are not kept."""

    def __init__(self, tensors: Mapping[str, TensorInfo]):
        self.tensors = tensors
        self.converted: set[str] = set()

    def one(self, *names: str) -> str:
        """The format of these matrices; those that are not there do not count."""
        kinds = self._kinds(names)
        formats = {_own_format(kind) for kind in kinds}
        return formats.pop() if len(formats) == 1 and "int8" not in formats else self._int8(names)

    def mlp(self, prefix: str) -> tuple[str, str]:
        """Of gate and up, and of down."""
        inner = (f"{prefix}.gate_proj", f"{prefix}.up_proj")
        outer = (f"{prefix}.down_proj",)
        gate_up, down = self.one(*inner), self.one(*outer)
        if gate_up == "bf16" != down:
            gate_up = self._int8(inner)
        elif down == "bf16" != gate_up:
            down = self._int8(outer)
        return gate_up, down

    def other_direction(self, name: str, format: str) -> str:
        """Of the transpose of a matrix in this format."""
        return self._int8((name,), " (one direction of W_UK)") if format in GGUF_FORMATS else format

    def _int8(self, names: tuple[str, ...], note: str = "") -> str:
        self.converted |= {kind + note for kind in self._kinds(names)}
        return "int8"

    def _kinds(self, names: tuple[str, ...]) -> set[str]:
        found = (self.tensors.get(f"{name}.weight") for name in names)
        return {info.dtype.removeprefix("GGUF:") for info in found if info is not None}


def _own_format(kind: str) -> str:
    if kind in _UNQUANTISED:
        return "bf16"
    return kind.lower() if kind.lower() in GGUF_FORMATS else "int8"


def _dense_formats(
    choose: _Chooser, tensors: Mapping[str, TensorInfo], config: ModelConfig
) -> Iterator[tuple[str, str]]:
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}"
        for name in (f"{prefix}.self_attn.{matrix}" for matrix in _ATTENTION):
            if f"{name}.weight" in tensors:
                yield name, choose.one(name)
        yield from _latent_up(choose, tensors, f"{prefix}.self_attn")
        mlp = f"{prefix}.mlp"
        if config.is_moe_layer(layer):
            mlp += ".shared_experts"
        if f"{mlp}.down_proj.weight" in tensors:
            gate_up, down = choose.mlp(mlp)
            yield f"{mlp}.gate_proj", gate_up
            yield f"{mlp}.down_proj", down
    yield "lm_head", choose.one("model.embed_tokens" if config.tie_word_embeddings else "lm_head")


def _latent_up(
    choose: _Chooser, tensors: Mapping[str, TensorInfo], attention: str
) -> Iterator[tuple[str, str]]:
    name = f"{attention}.kv_b_proj"
    if f"{name}.weight" in tensors:
        w_uk = w_uv = choose.one(name)
        transposed = choose.other_direction(name, w_uk)
    else:
        transposed, w_uv = choose.one(f"{attention}.k_b_proj"), choose.one(f"{attention}.v_b_proj")
        w_uk = choose.other_direction(f"{attention}.k_b_proj", transposed)
    yield from ((f"{name}.w_uk", w_uk), (f"{name}.w_uk_transposed", transposed))
    yield f"{name}.w_uv", w_uv
