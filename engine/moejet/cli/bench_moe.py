"""`moejet bench moe`: one layer of routed experts, beside what memory and arithmetic allow.

Routing is random and uniform, with distinct experts for each token. A case rotates over more packed
weights than the caches hold. Its answer is compared with float64 first; a wrong one is not timed.
Columns: ms are the median call and the 20th to 80th percentile; "experts" were hit by a call; "of
DRAM" is the rate of their bytes beside plain reads of memory, "of peak" the rate of multiply-adds
beside the ceiling of the arithmetic in use (AMX, VNNI or multiply-add units), both measured between
the calls; "x roofline" is the time over the longer of the two times that these ceilings allow.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING

from moejet.cli import options
from moejet.cli.environment import describe_environment, moment, summary
from moejet.cli.plot import add_plot_option, check_plot, measured
from moejet.cli.results import add_json_option
from moejet.cli.table import Column, Row, percent, write_table
from moejet.cli.terminal import note
from moejet.config import EXPERT_FORMATS, GGUF_FORMATS
from moejet.presets import PRESETS

if TYPE_CHECKING:
    from moejet._C import ThreadPool
    from moejet.ceilings import Meter
    from moejet.experts.cpu_experts import CpuExperts
    from moejet.testing.moe_bench import LayerShape

_TOKENS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 1024, 4096]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moejet bench moe`."""
    parser.epilog = __doc__
    parser.add_argument(
        "--shape",
        type=options.names_of(PRESETS),
        default=["deepseek-v3"],
        metavar="S,..",
        help=f"sizes of a published model: {', '.join(PRESETS)}",
    )
    parser.add_argument(
        "--experts",
        type=options.count,
        metavar="N",
        help="of a layer (default: the model's, if they fit)",
    )
    parser.add_argument(
        "--format",
        type=options.names_of((*EXPERT_FORMATS, *GGUF_FORMATS)),
        default=list(EXPERT_FORMATS),
        metavar="F,..",
        help=f"of {', '.join(EXPERT_FORMATS)} (default: these), {', '.join(GGUF_FORMATS)}",
    )
    parser.add_argument(
        "--tokens", type=options.counts, default=_TOKENS, metavar="N,..", help="in one call"
    )
    parser.add_argument(
        "--layers", type=options.count, metavar="L", help="to rotate over (default: by --gigabytes)"
    )
    parser.add_argument(
        "--gigabytes",
        type=options.positive,
        default=8.0,
        metavar="X",
        help="packed weights to rotate over, if they fit into memory (default 8)",
    )
    parser.add_argument(
        "--seconds",
        type=options.positive,
        default=2.0,
        metavar="X",
        help="for each case (default 2)",
    )
    options.add_threads_option(parser, "-t")
    options.add_isa_option(parser)
    options.add_arithmetic_option(parser)
    add_json_option(parser)
    add_plot_option(parser, "the roofline of this run with the measured points")


def execute(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if 0 in args.tokens:
        raise ValueError("--tokens 0 must be a positive number of tokens")
    check_plot(args.plot)
    options.quiet_openmp()
    from moejet.testing.moe_bench import WrongAnswerError

    try:
        with (
            ExitStack() as stack,
            measured(_measure_all(args, stack), args.json, args.plot) as (rows, _),
        ):
            if args.json == "-":
                list(rows)
            elif last := write_table(_COLUMNS, rows):
                note(summary(last))
    except WrongAnswerError as error:
        print(f"moejet: error: {error}", file=sys.stderr)
        return 1
    return 0


def _measure_all(args: argparse.Namespace, stack: ExitStack) -> Iterator[Row]:
    from moejet.ceilings import Meter
    from moejet.experts.cpu_experts import create_pool
    from moejet.extension import resolve_isa

    isa = resolve_isa(args.isa or "auto")
    pool = create_pool(args.num_threads)
    stack.callback(pool.close)
    meter = Meter(pool, isa=isa)
    # The meter takes its memory before the weights are fitted into the rest.
    common = {"bench": "moe", **describe_environment(meter), "isa": isa}
    for shape_name in args.shape:
        for weight_format in args.format:
            shape, layers = _make_layers(args, shape_name, weight_format, pool, isa)
            subject = {
                "shape": shape_name,
                "hidden_size": shape.hidden_size,
                "intermediate_size": shape.intermediate_size,
                "num_experts": shape.num_experts,
                "num_experts_per_tok": shape.top_k,
                "format": weight_format,
                "arithmetic": layers[0].arithmetic,
                "layers": len(layers),
                "weight_bytes": sum(layer.nbytes for layer in layers),
            }
            for num_tokens in args.tokens:
                row = _measure(layers, shape, num_tokens, meter, args.seconds)
                yield {**common, **moment(), **subject, "tokens": num_tokens, **row}
            layers.clear()  # before the next ones are made


def _make_layers(
    args: argparse.Namespace, shape_name: str, weight_format: str, pool: "ThreadPool", isa: str
) -> "tuple[LayerShape, list[CpuExperts]]":
    """The shape to measure and its packed random weights."""
    from moejet.experts.cpu_experts import CpuExperts
    from moejet.testing.moe_bench import LayerShape, fitting_experts, plan_rotation

    shape = LayerShape.of(PRESETS[shape_name], args.experts)
    sizes = (shape.hidden_size, shape.intermediate_size)

    def make(num_experts: int) -> CpuExperts:
        return CpuExperts(
            num_experts,
            *sizes,
            format=weight_format,
            pool=pool,
            isa=isa,
            arithmetic=args.arithmetic or "bf16",
        )

    expert_bytes = make(1).nbytes
    if args.experts is None:
        fitting = fitting_experts(expert_bytes, shape.num_experts)
        shape = LayerShape.of(PRESETS[shape_name], fitting)
    count = plan_rotation(
        expert_bytes, shape.num_experts, layers=args.layers, wanted_bytes=1e9 * args.gigabytes
    )
    layers = [make(shape.num_experts) for _ in range(count)]
    for seed, layer in enumerate(layers):
        layer.fill_random(seed)
    return shape, layers


def _measure(
    layers: "list[CpuExperts]", shape: "LayerShape", num_tokens: int, meter: "Meter", seconds: float
) -> Row:
    import torch

    from moejet.testing.moe_bench import check, derive, time_case

    torch.set_num_threads(meter.threads)  # for float64
    error = check(layers[0], shape, num_tokens)
    torch.set_num_threads(1)
    figures = time_case(layers, shape, num_tokens, meter=meter, seconds=seconds)
    expert_bytes = layers[0].nbytes // shape.num_experts
    derived = derive(figures, expert_bytes, shape.operations(num_tokens))
    return {**figures, **derived, "relative_error": error}


_COLUMNS: list[Column] = [
    ("shape", 16, lambda row: str(row["shape"])),
    ("format", 8, lambda row: str(row["format"])),
    ("isa", 11, lambda row: str(row["isa"])),
    ("tokens", 6, lambda row: str(row["tokens"])),
    ("experts", 7, lambda row: f"{row['unique_experts']:.1f}"),
    ("ms", 8, lambda row: f"{row['ms_p50']:.3f}"),
    ("p20-p80", 17, lambda row: f"{row['ms_p20']:.3f}-{row['ms_p80']:.3f}"),
    ("GB/s", 6, lambda row: f"{row['gbps']:.1f}"),
    ("of DRAM", 7, lambda row: percent(row["fraction_of_dram"])),
    ("TFLOP/s", 7, lambda row: f"{row['tflops']:.3f}"),
    ("of peak", 7, lambda row: percent(row["fraction_of_peak"])),
    ("roofline ms", 11, lambda row: f"{row['roofline_ms']:.3f}"),
    ("x roofline", 10, lambda row: f"{row['over_roofline']:.2f}"),
    ("error", 8, lambda row: f"{row['relative_error']:.2g}"),
]
