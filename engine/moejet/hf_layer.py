"""One layer of a transformers model whose experts moejet computes: packed weights in place of its parameters."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moejet.experts.cpu_experts import CpuExperts, create_pool

if TYPE_CHECKING:
    from moejet._C import ThreadPool

_ATTRIBUTE = "_moejet_packed"
_MATRICES = ("gate_up_proj", "down_proj")
_FP8_BLOCK = 128
# The narrowest format that keeps every value.
_LOSSLESS = {
    torch.float32: "fp32",
    torch.float16: "fp32",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8",
}
# One pool for all layers that ask for the same number of threads; it ends with the last of them.
_pools: WeakValueDictionary[int | None, ThreadPool] = WeakValueDictionary()
_packing = threading.RLock()


@dataclass(frozen=True, slots=True)
class Settings:
    name: str
    expert_format: str
    num_threads: int | None


def pool_of(num_threads: int | None) -> ThreadPool:
    with _packing:
        pool = _pools.get(num_threads)
        if pool is None:
            pool = _pools[num_threads] = create_pool(num_threads)
        return pool


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """A layer's packed weights and what it takes to turn them into its parameters again."""

    experts: CpuExperts
    settings: Settings
    dtype: torch.dtype
    is_interleaved: bool
    is_transposed: bool
    requires_grad: bool

    def forward(
        self, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, *, is_expert_parallel: bool
    ) -> Tensor:
        """x [..., D], topk_ids and topk_weights [..., K] on any device; returns [..., D] like x.

        With expert parallelism, ids from E on belong to other ranks.
        """
        rows = x.detach().reshape(-1, x.shape[-1]).cpu().contiguous()
        if rows.dtype == torch.float16:
            rows = rows.float()
        ids = topk_ids.reshape(-1, topk_ids.shape[-1]).cpu().contiguous()
        if is_expert_parallel:
            ids = ids.masked_fill(ids >= self.experts.weights.num_experts, -1)
        mix = topk_weights.detach().reshape(ids.shape).to("cpu", torch.float32).contiguous()
        return self.experts.forward(rows, ids, mix).to(x.device, x.dtype).reshape(x.shape)

    def parameters(self) -> dict[str, Tensor]:
        """The layer's tensors as they were before packing. RuntimeError if the format has rounded them."""
        kept = {"fp32": set(_LOSSLESS) - {torch.float8_e4m3fn}, "bf16": {torch.bfloat16}}
        if self.dtype not in kept.get(self.experts.format, ()):
            raise RuntimeError(
                f"the experts are packed as {self.experts.format}, their original {self.dtype} "
                "weights are gone: save the checkpoint or change the implementation before the "
                "first call, or register with expert_format='auto' (not for fp8 checkpoints)"
            )
        weights = self.experts.weights
        num, hidden, inner = weights.num_experts, weights.hidden_size, weights.intermediate_size
        gate_up = torch.empty(num, 2 * inner, hidden, dtype=self.dtype)
        down = torch.empty(num, hidden, inner, dtype=self.dtype)
        for e in range(num):
            parts = _halves(gate_up[e], self.is_interleaved)
            for target, w in zip((*parts, down[e]), self.experts.dequantize(e), strict=True):
                target.copy_(w)
        if self.is_transposed:
            gate_up, down = (w.transpose(1, 2).contiguous() for w in (gate_up, down))
        return dict(zip(_MATRICES, (gate_up, down), strict=True))

    def __deepcopy__(self, memo: dict[int, Any]) -> PackedLayer:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "packed experts cannot be pickled: use save_pretrained(), or pickle before the first call"
        )


def packed_layer(module: nn.Module) -> PackedLayer | None:
    packed: PackedLayer | None = module.__dict__.get(_ATTRIBUTE)
    return packed


def kind(module: nn.Module) -> str:
    return type(module).__name__


def is_experts(module: nn.Module) -> bool:
    down = module._parameters.get("down_proj")
    config = getattr(module, "config", None)
    return down is not None and down.dim() == 3 and hasattr(config, "_experts_implementation")


def _halves(gate_up: Tensor, is_interleaved: bool) -> tuple[Tensor, Tensor]:
    """(gate, up) of [2 I, D]."""
    if is_interleaved:
        return gate_up[0::2], gate_up[1::2]
    gate, up = gate_up.chunk(2)
    return gate, up


def pack_layer(module: Any, settings: Settings, label: str) -> PackedLayer:
    """Packs the layer's weights and frees its parameters. Until the last of them is packed, nothing changes."""
    with _packing, torch.no_grad():
        if (packed := packed_layer(module)) is not None:
            return packed
        reason = _why_not(module)
        if reason is not None:
            raise ValueError(
                f"{label}: moejet cannot compute these experts: {reason} ({_arithmetic(module)}); "
                "choose another experts_implementation"
            )
        packed = PackedLayer(
            _pack_weights(module, settings),
            settings,
            module.down_proj.dtype,
            _gate_layout(module) == "interleaved",
            getattr(module, "is_transposed", False),
            module.down_proj.requires_grad,
        )
        if _ATTRIBUTE not in module.__dict__:
            module.register_forward_pre_hook(_restore_for_others)
            module.register_state_dict_post_hook(_add_to_state_dict)
            module.register_load_state_dict_pre_hook(_refuse_to_load)
        setattr(module, _ATTRIBUTE, packed)
        for name in _freed(module):
            setattr(module, name, None)
        return packed


def _freed(module: nn.Module) -> Iterator[str]:
    for name in _MATRICES:
        yield name
        if f"{name}_scale_inv" in module._parameters:
            yield f"{name}_scale_inv"


def _pack_weights(module: Any, settings: Settings) -> CpuExperts:
    gate_up, down = module.gate_up_proj, module.down_proj
    is_transposed = getattr(module, "is_transposed", False)
    is_interleaved = _gate_layout(module) == "interleaved"
    num, hidden, inner = down.shape if not is_transposed else down.transpose(1, 2).shape
    format = settings.expert_format
    experts = CpuExperts(
        num,
        hidden,
        inner,
        format=_LOSSLESS[down.dtype] if format == "auto" else format,
        pool=pool_of(settings.num_threads),
    )
    has_scales = down.dtype == torch.float8_e4m3fn
    for e in range(num):
        stacked = gate_up[e].T if is_transposed else gate_up[e]
        matrices = (*_halves(stacked, is_interleaved), down[e].T if is_transposed else down[e])
        scales: tuple[Tensor | None, ...] = (None, None, None)
        if has_scales:
            scales = (*module.gate_up_proj_scale_inv[e].chunk(2), module.down_proj_scale_inv[e])
        for projection, w, scale in zip(("gate", "up", "down"), matrices, scales, strict=True):
            if scale is not None:
                scale = scale.to("cpu", torch.float32).contiguous()
            experts.set_projection(e, projection, w.cpu().contiguous(), scale)
    return experts


def _why_not(module: Any) -> str | None:
    """What keeps moejet from computing these experts, or None."""
    for flag, wanted, text in (
        ("has_gate", True, "they have no gate"),
        ("has_bias", False, "they have biases"),
        ("has_post_expert_norm", False, "a norm follows each expert"),
    ):
        if getattr(module, flag, wanted) != wanted:
            return text
    if getattr(getattr(module, "_hf_hook", None), "offload", False):
        return "accelerate loads their weights anew at every call (leave device_map out)"
    gate_up: Any = getattr(module, _MATRICES[0], None)
    down: Any = getattr(module, _MATRICES[1], None)
    for name, w in zip(_MATRICES, (gate_up, down), strict=True):
        if type(w) not in (nn.Parameter, Tensor) or w.dim() != 3:
            return f"{name} is a {type(w).__name__} where a plain tensor [E, rows, cols] is needed"
        if w.dtype not in _LOSSLESS:
            return f"{name} has dtype {w.dtype}, not one of {', '.join(map(str, _LOSSLESS))}"
        if w.is_meta:
            return f"{name} has not been loaded (device meta)"
    rows, cols = (2, 1) if getattr(module, "is_transposed", False) else (1, 2)
    num, hidden, inner = down.shape[0], down.shape[rows], down.shape[cols]
    stacked = (gate_up.shape[0], gate_up.shape[rows], gate_up.shape[cols])
    if stacked != (num, 2 * inner, hidden) or gate_up.dtype != down.dtype:
        return f"gate_up_proj {list(gate_up.shape)} does not fit down_proj {list(down.shape)}"
    if _gate_layout(module) is None:
        return "they do not compute silu(gate) * up"
    return _why_not_fp8(module) if down.dtype == torch.float8_e4m3fn else None


def _why_not_fp8(module: Any) -> str | None:
    if tuple(module.block_size or ()) != (_FP8_BLOCK, _FP8_BLOCK):
        return f"fp8 scales are for blocks {module.block_size}, not 128 x 128"
    if module.activation_scheme != "dynamic":
        return f"fp8 activations have activation_scheme={module.activation_scheme!r}, not 'dynamic'"
    inner = module.down_proj.shape[2]
    if inner % _FP8_BLOCK:
        return f"an fp8 block would span gate and up ({inner} rows each, not a multiple of 128)"
    return None


def _arithmetic(module: Any) -> str:
    gate = getattr(getattr(module, "_apply_gate", None), "__qualname__", "none")
    act = getattr(module, "act_fn", None)
    return f"gate {gate}, activation {'inside' if act is None else kind(act)}"


def _gate_layout(module: Any) -> str | None:
    """How gate and up lie in gate_up's rows, or None if the layer's gate is not silu(gate) * up.

    The gate is a method that a model may replace, so it is judged by what it computes: values of
    both signs from 1e-3 to 1e6 show other activations, clamps and shifts.
    """
    inner = module.down_proj.shape[1 if getattr(module, "is_transposed", False) else 2]
    generator = torch.Generator().manual_seed(0)
    size = 10 ** (torch.rand(64, 2 * inner, generator=generator) * 9 - 3)
    probe = size * (torch.randint(0, 2, size.shape, generator=generator) * 2 - 1)
    result = module._apply_gate(probe.to(module.down_proj.device)).float().cpu()
    if result.shape != (64, inner):
        return None
    for layout in ("concatenated", "interleaved"):
        gate, up = _halves(probe.T, layout == "interleaved")
        expected = (F.silu(gate) * up).T
        if torch.allclose(result, expected, rtol=1e-4, atol=1e-6):
            return layout
    return None


def _restore_for_others(module: Any, args: tuple[Any, ...]) -> None:
    """Before a call: if another implementation has been chosen, the weights become parameters again."""
    packed = packed_layer(module)
    if packed is None or module.config._experts_implementation == packed.settings.name:
        return
    with _packing, torch.inference_mode(False):  # whose tensors could never be trained
        for name, w in packed.parameters().items():
            setattr(module, name, nn.Parameter(w, packed.requires_grad))
        setattr(module, _ATTRIBUTE, None)


def _add_to_state_dict(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any]
) -> None:
    packed = packed_layer(module)
    if packed is not None:
        state_dict.update({prefix + name: w for name, w in packed.parameters().items()})


def _refuse_to_load(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, *rest: object
) -> None:
    if packed_layer(module) is not None and any(prefix + name in state_dict for name in _MATRICES):
        raise RuntimeError(
            f"{prefix[:-1]}: these experts are packed already: load the weights before the first "
            "call, or into a new model"
        )
