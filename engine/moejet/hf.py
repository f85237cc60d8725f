"""The CPU experts inside Hugging Face transformers, as one more experts implementation.

>>> import moejet.hf
>>> moejet.hf.register()
>>> model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moejet")

Works for every model family that uses transformers' experts interface, if its experts compute
down(silu(gate x) * (up x)) without biases; others are refused at their first call, by name.

A layer is packed when it is first called, or by `pack(model)`, and its parameters are freed at once:
memory grows by one layer at most. From then on its weights are no parameters any more:
- `model.to(device)` and `model.half()` move and convert the rest of the model only. With the rest on a
  GPU, activations are copied to the CPU and back.
- `state_dict()` and `save_pretrained()` give the original weights, bit by bit, where the packed form
  keeps them (expert_format "auto" for bf16, fp16 and fp32); else they raise RuntimeError. The same goes
  for `model.set_experts_implementation(...)`, which turns them into parameters again.
- `copy.deepcopy` shares the packed weights, which never change. Pickle refuses them.
There are no gradients: calls where autograd records raise RuntimeError.

Set OMP_WAIT_POLICY=passive before Python starts: torch's threads otherwise spin, for milliseconds after
each operation, on the cores that the experts' workers need.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, MutableMapping
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn

from moejet.config import EXPERT_FORMATS
from moejet.environment import openmp_spins
from moejet.hf_layer import Settings, is_experts, kind, pack_layer, packed_layer, pool_of
from moejet.validation import require_choice

logger = logging.getLogger(__name__)

__all__ = ["pack", "register", "unregister"]


_registered: dict[str, Settings] = {}


def register(
    name: str = "moejet", *, expert_format: str = "auto", num_threads: int | None = None
) -> None:
    """Makes `experts_implementation=name` known to transformers.

    expert_format: one of `config.EXPERT_FORMATS`, or "auto" for the narrowest one that keeps every value
    of the checkpoint (bf16 for bf16, fp8 for fp8 with 128 x 128 blocks, else fp32).
    num_threads: None takes MOEJET_NUM_THREADS, or else one per core.
    Registering a name again changes the layers packed from then on; several names may have
    different settings. ImportError if transformers is absent or too old.
    """
    require_choice("expert_format", expert_format, ("auto", *EXPERT_FORMATS))
    if name in ("", "eager") or (name not in _registered and any(name in i for i in _interfaces())):
        raise ValueError(f"name={name!r} belongs to transformers: choose another")
    settings = Settings(name, expert_format, num_threads)
    if num_threads is not None:
        pool_of(num_threads)  # a wrong number is reported here, not by the first layer
    forward = _forward_with(settings)
    for interface in _interfaces():
        interface[name] = forward
    _registered[name] = settings
    _check_selectable(name)
    _warn_of_spinning()


def unregister(name: str = "moejet") -> None:
    """Takes the name back. Models that use it must be given another implementation before their next call."""
    if _registered.pop(name, None) is None:
        raise ValueError(f"name={name!r} is not registered")
    for interface in _interfaces():
        del interface[name]


def pack(model: nn.Module) -> int:
    """Packs all layers that use a registered implementation now; returns the size of all packed weights in bytes.

    Useful before `model.to("cuda")`, so that the experts never go there. ValueError if the model
    has no such layer, or one that cannot be computed.
    """
    total = 0
    for path, module in model.named_modules():
        packed = packed_layer(module)
        if packed is None and is_experts(module):
            settings = _registered.get(module.config._experts_implementation)
            if settings is not None:
                packed = pack_layer(module, settings, f"{path} ({kind(module)})")
        total += packed.experts.nbytes if packed else 0
    if total == 0:
        raise ValueError(
            "no layer of this model uses moejet's experts: call moejet.hf.register() and load it "
            'with experts_implementation="moejet"'
        )
    return total


def _interfaces() -> tuple[MutableMapping[str, Callable[..., Tensor]], ...]:
    """transformers' registries of experts implementations: plain ones and fp8."""
    try:
        from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
    except ImportError as error:
        raise _too_old() from error
    return ALL_EXPERTS_FUNCTIONS, ALL_FP8_EXPERTS_FUNCTIONS


def _check_selectable(name: str) -> None:
    """Some versions have the registry, but accept only their own names when a model is loaded."""
    from transformers import PreTrainedModel

    base: Any = PreTrainedModel
    try:
        base.get_correct_experts_implementation(None, name)
    except ValueError as error:
        unregister(name)
        raise _too_old() from error


def _too_old() -> ImportError:
    try:
        found = f"transformers {metadata.version('transformers')} is installed"
    except metadata.PackageNotFoundError:
        found = "transformers is not installed"
    return ImportError(
        f"moejet.hf needs transformers 5.7 or newer, {found}: pip install 'moejet[hf]'"
    )


@cache
def _warn_of_spinning() -> None:
    if torch.get_num_threads() > 1 and openmp_spins():
        logger.warning(
            "torch's idle threads spin on the cores that the experts need, which can cost most of the "
            "speed: set OMP_WAIT_POLICY=passive before Python starts, or torch.set_num_threads(1)"
        )


def _forward_with(settings: Settings) -> Callable[..., Tensor]:
    def moejet_experts_forward(
        self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
    ) -> Tensor:
        if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
            raise RuntimeError(
                f"{kind(self)}: moejet's experts compute no gradients: call the model under "
                "torch.no_grad(), as generate() does, or choose another experts_implementation"
            )
        packed = packed_layer(self) or pack_layer(self, settings, kind(self))
        return packed.forward(
            hidden_states,
            top_k_index,
            top_k_weights,
            is_expert_parallel=getattr(self, "_is_expert_parallel", False),
        )

    disable: Callable[[Callable[..., Tensor]], Callable[..., Tensor]] = torch.compiler.disable
    return disable(moejet_experts_forward)
