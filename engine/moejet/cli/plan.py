"""`moejet plan`: where every gigabyte goes, whether it fits, and the speed to expect, before anything is loaded.

Exit code 0: it fits; 1: it does not.
"""

import argparse
import json
import sys
from dataclasses import replace
from typing import Any

from moejet.cli import options
from moejet.cli.terminal import style
from moejet.config import DEVICES, EngineConfig, ModelConfig
from moejet.plan import GIB, Machine, Plan, make_plan

_DEPTHS = (0, 4096, 32768)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moejet plan`."""
    parser.epilog = (
        "MODEL may also be the name of a preset (deepseek-v3, kimi-k2, ...): then nothing is read.\n"
        "exit code: 0 if the model fits, 1 if not\n"
    )
    parser.add_argument(
        "model", metavar="MODEL", help="alias, directory, GGUF file, hub id, preset"
    )
    parser.add_argument("--ram", type=_gib, metavar="GIB", help="plan for this much RAM")
    parser.add_argument(
        "--device",
        choices=DEVICES[:3],
        default="auto",
        help="without --vram: plan for this machine's GPU and what is free of it, or for the CPU alone (default auto: "
        "the GPU if models would run on it)",
    )
    parser.add_argument(
        "--vram",
        type=_gib,
        metavar="GIB",
        help="plan for a GPU with this much memory to use, here or elsewhere",
    )
    parser.add_argument(
        "--gpu-experts",
        type=int,
        metavar="N",
        help="routed experts of all layers on the GPU (default: as many as fit)",
    )
    options.add_expert_cache_option(parser)
    parser.add_argument(
        "--context", dest="max_context", type=int, metavar="N", help="tokens of the longest request"
    )
    parser.add_argument(
        "--bandwidth",
        type=options.positive,
        metavar="GBPS",
        help="memory read rate, instead of measuring",
    )
    parser.add_argument(
        "--no-measure", action="store_true", help="predict no speed from measurements"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options.add_format_options(parser)
    parser.add_argument("--revision", help="branch, tag or commit of a hub id")
    options.add_isa_option(parser)
    options.add_threads_option(parser)


def execute(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    from moejet.loading import plan_cache
    from moejet.resolve import resolve_config

    given = options.engine_options(args)
    config = EngineConfig.create(model=args.model, **given)
    model_config = resolve_config(args.model, args.revision)
    _, num_blocks = plan_cache(config, model_config)
    gpu = _gpu(args, config, model_config)
    for option, wanted in (
        ("--gpu-experts", args.gpu_experts),
        ("--expert-cache", args.expert_cache or None),
    ):
        if wanted is not None and gpu is None:
            raise ValueError(f"{option} {wanted} needs a GPU: give its memory as --vram")
    machine = _machine(args, config, model_config, None if gpu is None else gpu[1])
    plan = make_plan(
        model_config,
        config,
        machine=machine,
        cache_tokens=num_blocks * config.block_size,
        depths=[d for d in _DEPTHS if d < model_config.max_position_embeddings],
    )
    name = None if gpu is None else gpu[0]
    if args.json:
        print(json.dumps(plan.as_dict() | {"gpu": name}, indent=2))
    else:
        print(render(plan, describe_device(plan, model_config, name)))
    return 0 if plan.fits else 1


def _gpu(
    args: argparse.Namespace, config: EngineConfig, model_config: ModelConfig
) -> tuple[str, int] | None:
    """Name and bytes to use of the GPU that is planned for; None for the CPU alone."""
    if args.vram is not None:
        return "a GPU", args.vram
    from moejet.gpu_loading import choose_device, vram_budget

    # How many experts live there is checked by the plan.
    asked = replace(config.for_model(model_config), gpu_experts=None)
    if choose_device(asked, model_config) != "cuda":
        return None
    import torch

    return torch.cuda.get_device_name(), vram_budget(asked, "cuda")


def describe_device(plan: Plan, model_config: ModelConfig, gpu: str | None) -> str:
    """Where a step would be computed, in one line."""
    experts = model_config.num_moe_layers * model_config.num_experts
    if gpu is None or plan.machine.vram_bytes is None:
        return "device: the CPU alone"
    budget = f"{gpu}, {plan.machine.vram_bytes / GIB:.1f} GiB to use"
    if plan.gpu_experts == experts:
        return f"device: {budget}, with all routed experts; nothing is left to the CPU"
    if plan.gpu_experts == 0:
        return f"device: {budget}; all {experts} routed experts on the CPU"
    share = plan.gpu_experts / experts
    return (
        f"device: {budget}, with {plan.gpu_experts} of {experts} routed experts ({share:.0%}); the CPU computes the "
        "others at the same time"
    )


def render(plan: Plan, device: str) -> str:
    """The plan for people. device: the line that says where it runs."""
    lines = [
        style(plan.model, "bold", sys.stdout)
        + f": experts {plan.expert_format}, other weights {plan.dense_format}, cache for "
        f"{plan.cache_tokens} tokens",
        device,
    ]
    for place, available in (("VRAM", plan.machine.vram_bytes), ("RAM", plan.machine.ram_bytes)):
        parts = [part for part in plan.parts if part.place == place]
        if not parts:
            continue
        lines += ["", place]
        lines += [f"  {part.num_bytes / GIB:10.2f} GiB  {part.name}" for part in parts]
        of = "" if available is None else f" of {available / GIB:.2f}"
        lines.append(f"  {plan.bytes_in(place) / GIB:10.2f} GiB{of} in all")
    speeds = [s for s in plan.speeds if s.decode is not None]
    if speeds:
        read = plan.machine.read_gbps
        bound = "" if plan.machine.vram_bytes is None else ", if the GPU keeps up with the CPU"
        lines += ["", f"expected of one request (memory reads {read:.1f} GB/s{bound})"]
        for speed in speeds:
            prefill = "" if speed.prefill is None else f", prompts {speed.prefill:.0f} tokens/s"
            lines.append(
                f"  at depth {speed.depth:6}  generation {speed.decode:.2f} tokens/s{prefill}"
            )
    lines += ["", "it fits" if plan.fits else "it does not fit: " + "; ".join(plan.advice)]
    return "\n".join(lines)


def _machine(
    args: argparse.Namespace, config: EngineConfig, model_config: ModelConfig, vram: int | None
) -> Machine:
    from moejet import topology

    ram = topology.available_bytes() if args.ram is None else args.ram
    read, expert, attention = args.bandwidth, None, None
    if not args.no_measure:
        measured = measure(config.for_model(model_config))
        read = read or measured["read"]
        expert, attention = measured["experts"], measured["attention"]
    return Machine(ram, vram, read, expert, attention)


def measure(config: EngineConfig) -> dict[str, Any]:
    """Read rate (GB/s) and arithmetic ceilings (10^12 operations per second) of this machine, in about two seconds."""
    from moejet.ceilings import Meter, arithmetic_of, bounding_ceiling
    from moejet.experts.cpu_experts import create_pool
    from moejet.extension import resolve_isa

    isa = resolve_isa(config.isa)
    pool = create_pool(config.num_threads)
    try:
        meter = Meter(pool, isa=isa)
        result: dict[str, Any] = {"read": meter.read().value, "experts": None, "attention": None}
        arithmetic = arithmetic_of(isa, config.expert_format, config.arithmetic)
        for name, kind in (("experts", arithmetic), ("attention", "bf16")):
            ceiling = bounding_ceiling(isa, kind)
            if ceiling is not None:
                result[name] = meter.arithmetic(ceiling).value
        return result
    finally:
        pool.close()


def _gib(text: str) -> int:
    return round(options.positive(text) * GIB)
