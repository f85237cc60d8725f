"""`moejet bench gpu`: each GPU kernel beside the card's copy bandwidth and matrix rate, and beside torch.

Columns: ms are the median and the 20th to 80th percentile of one launch from a CUDA graph with cold
caches; "of copy" is the rate of the bytes that must move over that of a copy measured in this run,
"of matmul" the rate of operations over torch's bf16 product; "x peer" is the peer's time over ours.
Answers are compared with the peer's first; a wrong one is not timed and makes the exit code 1.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from moejet.cli import options
from moejet.cli.environment import describe_environment, moment, summary
from moejet.cli.plot import add_plot_option, check_plot, measured
from moejet.cli.results import add_json_option
from moejet.cli.table import Column, Row, percent, write_table
from moejet.cli.terminal import note
from moejet.validation import short


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moejet bench gpu`."""
    parser.epilog = __doc__
    parser.add_argument(
        "--kernel", type=lambda text: text.split(","), metavar="K,..", help="only these kernels"
    )
    parser.add_argument(
        "--vram",
        type=options.positive,
        metavar="GIB",
        help="use at most so much of the GPU's memory",
    )
    add_json_option(parser)
    add_plot_option(parser, "the roofline of this run with the measured points")


def execute(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    check_plot(args.plot)
    options.quiet_openmp()
    import torch

    from moejet.testing.gpu_bench.case import KERNELS

    kernels = args.kernel or list(KERNELS)
    for kernel in kernels:
        if kernel not in KERNELS:
            given = f"--kernel={short(','.join(kernels))} holds {short(kernel)}"
            raise ValueError(f"{given}, which is not one of {', '.join(KERNELS)}")
    if not torch.cuda.is_available():
        raise ValueError(
            "moejet bench gpu needs a CUDA device, and torch finds none here "
            f"(torch {torch.__version__}); `moejet bench moe` measures the CPU's kernels"
        )
    if args.vram is not None:
        _limit_memory(args.vram)
    environment = describe_environment()
    with measured(_measure_all(kernels, environment), args.json, args.plot) as (rows, kept):
        if args.json == "-":
            list(rows)
        else:
            write_table(_COLUMNS, rows)
            note(summary(environment))
    wrong = sum(row["ms_p50"] is None for row in kept)
    if wrong:
        print(f"moejet: error: {wrong} cases gave a wrong answer", file=sys.stderr)
    return 1 if wrong else 0


def _limit_memory(vram_gib: float) -> None:
    import torch

    total = torch.cuda.get_device_properties(0).total_memory
    if not 0 < vram_gib * 2**30 <= total:
        raise ValueError(
            f"--vram {vram_gib} must be above 0 and at most the {total / 2**30:.1f} GiB of this GPU"
        )
    torch.cuda.set_per_process_memory_fraction(vram_gib * 2**30 / total)


def _measure_all(kernels: list[str], environment: dict[str, Any]) -> Iterator[Row]:
    import torch
    import triton

    from moejet.kernels.card import card_of
    from moejet.testing.gpu_bench.case import cases_of, copy_bandwidth, matmul_rate

    card = card_of(torch.device("cuda", torch.cuda.current_device()))
    facts: Row = {
        "bench": "gpu",
        **environment,
        "gpu": torch.cuda.get_device_name(),
        "capability": card.capability,
        "num_sms": card.num_sms,
        "copy_gbps": copy_bandwidth() / 1e9,
        "matmul_tflops": matmul_rate() / 1e12,
    }
    facts["versions"] = {**environment["versions"], "triton": triton.__version__}
    note(
        f"{facts['gpu']}: copy {facts['copy_gbps']:.0f} GB/s, "
        f"bf16 product {facts['matmul_tflops']:.0f} TFLOP/s"
    )
    for kernel in kernels:
        for case in cases_of(kernel, card):
            yield {**facts, **moment(), "kernel": kernel, "case": case.name, **_measure(case)}
            torch.cuda.empty_cache()


def _measure(case: Any) -> Row:
    from moejet.testing.gpu_bench.case import (
        MAX_DIFFERENCE,
        copy_bandwidth,
        difference,
        matmul_rate,
        time_ms,
    )

    run, peer = case.build()
    error = None if peer is None else difference(run(), peer())
    row: Row = {"bytes": case.bytes, "flops": case.flops, "difference": error}
    names = ("ms_p50", "ms_p20", "ms_p80", "gbps", "tflops", "of_copy", "of_matmul", "x_peer")
    if error is not None and not error <= MAX_DIFFERENCE:
        return {**row, **dict.fromkeys(names)}
    median, low, high = time_ms(run)
    seconds = median / 1e3
    peer_ms = None if peer is None else time_ms(peer)[0]
    values = (
        median,
        low,
        high,
        case.bytes / seconds / 1e9,
        case.flops / seconds / 1e12,
        case.bytes / seconds / copy_bandwidth(),
        case.flops / seconds / matmul_rate(),
        None if peer_ms is None else peer_ms / median,
    )
    return {**row, **dict(zip(names, values, strict=True))}


def _number(row: Row, key: str, digits: int) -> str:
    return "" if row[key] is None else f"{row[key]:.{digits}f}"


_COLUMNS: list[Column] = [
    ("kernel", 14, lambda row: str(row["kernel"])),
    ("case", 30, lambda row: str(row["case"])),
    ("ms", 9, lambda row: "wrong" if row["ms_p50"] is None else _number(row, "ms_p50", 4)),
    ("p20-p80", 17, lambda row: f"{_number(row, 'ms_p20', 4)}-{_number(row, 'ms_p80', 4)}"),
    ("GB/s", 6, lambda row: _number(row, "gbps", 0)),
    ("of copy", 7, lambda row: percent(row["of_copy"])),
    ("TFLOP/s", 7, lambda row: _number(row, "tflops", 1)),
    ("of matmul", 9, lambda row: percent(row["of_matmul"])),
    ("x peer", 6, lambda row: _number(row, "x_peer", 2)),
    ("differs", 8, lambda row: "" if row["difference"] is None else f"{row['difference']:.2g}"),
]
