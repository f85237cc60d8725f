"""What is measured: one case per process, with the time that it may take."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from moejet import topology
from moejet.config import EngineConfig, ModelConfig
from moejet.model_cost import ModelCost
from moejet.presets import PRESETS
from moejet.testing.checkpoints import hf_config

SLICED = "deepseek-v3"
# Of the sliced model: the layers before its experts begin, and one with experts.
_MAX_MOE_LAYERS = 8
# Of the memory that is free, what routed experts may take; the rest is for the process and a margin.
_RAM_SHARE, _RAM_REST = 0.7, 6 << 30


@dataclass(frozen=True)
class Case:
    """kind: a function of `measure` · resident: share of the routed experts that live on the GPU.

    expected_s, timeout_s: of the whole process, first compilation of kernels included where `compiles`.
    """

    name: str
    kind: str
    shape: str
    resident: float = 0.0
    options: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[int, ...] = ()
    expected_s: float = 60.0
    timeout_s: float = 240.0

    @property
    def missing(self) -> list[str]:
        """Options that it needs and this version does not have; 0 switches something off that is not there."""
        known = {f.name for f in fields(EngineConfig)}
        return [name for name, value in self.options.items() if value and name not in known]

    def engine_options(self, tiny: bool) -> dict[str, Any]:
        """Those of its options that this version has; tiny: prompts of a few tokens are long."""
        known = {f.name for f in fields(EngineConfig)}
        options = {name: value for name, value in self.options.items() if name in known}
        return {name: min(value, 16) for name, value in options.items()} if tiny else options


_OFF = {"stream_prefill_tokens": 0}
# A long prompt in one step: its experts cross the bus once.
_ON = {"stream_prefill_tokens": 256, "max_batch_tokens": 8192}
_LITE = "deepseek-v2-lite"
# In the order of their worth: the first compiles most kernels.
CASES = (
    Case("lite-half", "model", _LITE, 0.5, _OFF, (512,), 150, 300),
    Case("lite-none", "model", _LITE, 0.0, _OFF, (512, 8192), 110, 240),
    Case("v3-slice", "slices", SLICED, 0.0, _OFF, (512,), 120, 300),
    Case("lite-all", "model", _LITE, 1.0, {}, (512, 8192), 45, 180),
    Case("lite-none-streamed", "model", _LITE, 0.0, _ON, (512, 8192), 60, 180),
    Case("v3-slice-streamed", "slices", SLICED, 0.0, _ON, (512, 8192), 90, 240),
    Case("lite-half-streamed", "model", _LITE, 0.5, _ON, (8192,), 60, 180),
    Case("kill", "kill", f"{_LITE}:layers=4", 0.5, {}, (), 30, 120),
    Case("soak", "soak", _LITE, 0.5, {}, (), 70, 240),
    Case("lite-cached", "model", _LITE, 0.0, {"expert_cache": 832}, (512,), 60, 180),
)


@dataclass(frozen=True)
class Sizes:
    """Of the measurements."""

    decode_steps: int
    depth: int
    soak_steps: int
    soak_part: int
    batch: int
    context: int


FULL = Sizes(decode_steps=64, depth=1024, soak_steps=1000, soak_part=100, batch=8, context=9216)
TINY = Sizes(decode_steps=2, depth=8, soak_steps=6, soak_part=2, batch=2, context=160)


def shape_of(case: Case, tiny: bool) -> ModelConfig:
    """The whole model that a case is about."""
    name, _, option = case.shape.partition(":layers=")
    model = PRESETS[name]
    if tiny:
        family = "deepseek_v2" if name == _LITE else "deepseek_v3"
        model = replace(ModelConfig.from_hf(hf_config(family)), num_hidden_layers=6)
    return replace(model, num_hidden_layers=int(option)) if option else model


def prompts_of(case: Case, tiny: bool) -> list[int]:
    return [min(count, 20 + count // 1024) for count in case.prompts] if tiny else [*case.prompts]


def slices_of(model: ModelConfig, available: int | None) -> tuple[int, int]:
    """Layers of the two slices: with one layer of routed experts, and with as many as RAM and patience hold."""
    first = model.first_k_dense_replace + 1
    cost = ModelCost.of(model, EngineConfig(model="slice"))
    layer = model.num_experts * cost.expert_bytes
    free = (48 << 30) if available is None else available
    fitting = int((_RAM_SHARE * free - _RAM_REST) // layer)
    most = min(model.num_moe_layers, _MAX_MOE_LAYERS, max(fitting, 2))
    return first, model.first_k_dense_replace + most


def available_ram() -> int | None:
    return topology.available_bytes()
