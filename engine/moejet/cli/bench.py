"""`moejet bench`: tokens per second for prompts (pp) and generation (tg), as a table or as data.

`pp512` reads a prompt of 512 tokens, `tg128` generates 128 tokens one at a time; `@d1024` means
that 1024 tokens are in the context already (random ones: times do not depend on the values), `xb16`
that 16 sequences are generated at once, whose rates add up. One warm-up run is thrown away, then
each test runs several times. Tokenisation and sampling are not part of the measurement.

"GB/s" counts the weights and the context that a step must read, for several sequences the experts
that they hit on average; "of read" compares that with plain reads of memory. "TFLOP/s" counts the
matrix products, attention included; "of peak" compares them with the ceiling of the arithmetic of
the expert kernels. Both ceilings are measured before and after each test. "overhead" is the time
per generated token that an engine step spends outside the forward pass, sampling included.

With a GPU a second table says where a step's time goes: "GPU" is the span of a step on the GPU's stream, "alone" the
same while the CPU answers at once, "CPU" the time in expert kernels with its share of the step and of memory reads,
"overlap" the part of it in which the GPU does not wait, "hand-over" the cost of a layer that computes nothing, then the
bytes over the bus and the experts asked for that were found on the GPU.
"""

import argparse
import csv
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moejet.cli import options
from moejet.cli.bench_hybrid import HybridBench, write_report
from moejet.cli.environment import describe_environment, moment, summary
from moejet.cli.plot import add_plot_option, check_plot, measured
from moejet.cli.results import add_json_option
from moejet.cli.table import Column, Row, keep, percent, write_table
from moejet.cli.terminal import note
from moejet.config import DENSE_FORMATS, EXPERT_FORMATS
from moejet.presets import PRESETS

if TYPE_CHECKING:
    from moejet.ceilings import Meter
    from moejet.llm import LLM
    from moejet.model_cost import ModelCost
    from moejet.runner import Runner

_GB = 1e9
_GIB = 1 << 30
_BLOCK_SIZE = 32  # tokens of a cache block
_CEILING_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement: `kind` "pp" or "tg" over num_tokens, after `depth` tokens of context.

    batch: sequences generated at once, each num_tokens long; prompts are read alone.
    """

    kind: str
    num_tokens: int
    depth: int
    batch: int = 1

    @property
    def name(self) -> str:
        """The name in the table, such as pp512 or tg128@d1024xb16."""
        depth = f"@d{self.depth}" if self.depth else ""
        batch = f"xb{self.batch}" if self.batch > 1 else ""
        return f"{self.kind}{self.num_tokens}{depth}{batch}"


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moejet bench`."""
    parser.epilog = f"{__doc__ or ''}\npresets for --synthetic: {', '.join(PRESETS)}\n"
    source = parser.add_mutually_exclusive_group()
    source.add_argument("-m", "--model", metavar="MODEL", help="directory, GGUF file or hub id")
    source.add_argument(
        "--synthetic",
        type=options.preset,
        metavar="PRESET[:layers=N]",
        help="shapes of a published model with random weights; layers=N keeps only N layers",
    )
    parser.add_argument(
        "-p", type=options.counts, default=[512], metavar="N,..", help="prompt sizes"
    )
    parser.add_argument(
        "-n", type=options.counts, default=[128], metavar="N,..", help="answer sizes"
    )
    parser.add_argument(
        "-d", type=options.counts, default=[0], metavar="N,..", help="context depths"
    )
    parser.add_argument(
        "-b", type=options.counts, default=[1], metavar="N,..", help="sequences generated at once"
    )
    parser.add_argument(
        "-r", type=options.count, default=3, metavar="N", help="repetitions (default 3)"
    )
    parser.add_argument(
        "-t", "--threads", type=options.counts, metavar="N,..", help="CPU thread counts to compare"
    )
    parser.add_argument(
        "--format",
        type=options.names_of(("auto", "native", *EXPERT_FORMATS)),
        metavar="F,..",
        help=f"of auto, native, {', '.join(EXPERT_FORMATS)}",
    )
    parser.add_argument(
        "--dense-format",
        choices=("auto", "native", *DENSE_FORMATS),
        help="type of all other weights",
    )
    options.add_cache_option(parser)
    options.add_isa_option(parser)
    options.add_arithmetic_option(parser)
    options.add_device_options(parser)
    parser.add_argument("-o", "--output", choices=("md", "csv", "json", "jsonl"), default="md")
    add_json_option(parser)
    add_plot_option(parser, "tokens per second over the context's depth")


def execute(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if 0 in args.b:
        raise ValueError("-b 0 must be a positive number of sequences")
    tests = plan_tests(args.p, args.n, args.d, args.b)
    if args.threads is not None and 0 in args.threads:
        raise ValueError("-t 0 must be a positive number of threads")
    check_plot(args.plot)
    with measured(_measure_all(args, tests), args.json, args.plot) as (rows, _):
        if args.json == "-":
            list(rows)
        else:
            WRITERS[args.output](rows)
    return 0


def plan_tests(
    prompts: list[int], answers: list[int], depths: list[int], batches: list[int]
) -> list[Case]:
    """All tests in the order of the table; a size of 0 leaves its kind out."""
    tests: list[Case] = []
    for depth in depths:
        tests += [Case("pp", count, depth) for count in prompts if count]
        tests += [Case("tg", count, depth, b) for count in answers if count for b in batches]
    if not tests:
        raise ValueError("-p 0 with -n 0 leaves nothing to measure: give one of them a size")
    return tests


def cache_options(tests: list[Case]) -> dict[str, int]:
    """Engine options for a latent cache that holds the largest test, and not more."""
    context = max(test.depth + test.num_tokens for test in tests) + 1
    batch = max(test.batch for test in tests)
    if batch == 1:
        return {"max_context": context}
    # Sequences begin with a block of their own.
    longest = max(test.batch * (test.depth + test.num_tokens + _BLOCK_SIZE) for test in tests)
    return {
        "max_context": context,
        "cache_tokens": max(context, longest),
        "max_num_requests": batch,
        "block_size": _BLOCK_SIZE,
    }


def open_llm(args: argparse.Namespace, engine_options: dict[str, Any]) -> "LLM":
    """Load the model to measure, or make a synthetic one."""
    if args.synthetic is None:
        return options.open_llm(args.model or options.DEFAULT_MODEL, engine_options)
    return options.engine_class().synthetic(args.synthetic, **engine_options)


def _measure_all(args: argparse.Namespace, tests: list[Case]) -> Iterator[Row]:
    from moejet.ceilings import Meter

    for weight_format in args.format or [None]:
        for num_threads in args.threads or [None]:
            given = {
                "expert_format": weight_format,
                "num_threads": num_threads,
                "dense_format": args.dense_format,
                "cache_dtype": args.cache_dtype,
                "isa": args.isa,
                "arithmetic": args.arithmetic,
                "device": args.device,
                "vram_gib": args.vram_gib,
                "gpu_experts": args.gpu_experts,
                "expert_cache": args.expert_cache,
                **cache_options(tests),
            }
            with open_llm(args, {k: v for k, v in given.items() if v is not None}) as llm:
                runner = _runner_of(llm)
                meter = Meter(runner.pool, isa=runner.isa)
                common = {"bench": "model", **describe_environment(meter)}
                common |= _describe_model(args, llm)
                hybrid = None if llm.config.device == "cpu" else HybridBench(llm)
                yield from measure(llm, tests, args.r, common, meter, hybrid)


def measure(
    llm: "LLM",
    tests: list[Case],
    repetitions: int,
    common: Row,
    meter: "Meter",
    hybrid: HybridBench | None = None,
) -> Iterator[Row]:
    """One row per test: `common` and the test's figures. The first run of a test is a warm-up.

    hybrid: for a model on a GPU, whose steps are looked into.
    """
    from moejet.ceilings import arithmetic_of, bounding_ceiling

    isa = common["isa"]
    bound = bounding_ceiling(isa, arithmetic_of(isa, common["format"], common["arithmetic"]))
    overhead_s: dict[int, float] = {}

    def ceilings() -> tuple[float | None, float | None]:
        peak = None if bound is None else meter.arithmetic(bound, _CEILING_SECONDS).value
        return meter.read(_CEILING_SECONDS).value, peak

    for test in tests:
        if test.kind == "tg" and test.batch not in overhead_s:
            overhead_s[test.batch] = llm.bench_overhead(test.batch)
        _run(llm, test)
        before = ceilings()
        samples_s = [_run(llm, test) for _ in range(repetitions)]
        read_gbps, peak = map(_larger, before, ceilings())
        steps = None if hybrid is None else hybrid.figures(test, repetitions, read_gbps)
        yield {
            **common,
            **moment(),
            "test": test.name,
            "num_tokens": test.num_tokens,
            "depth": test.depth,
            "batch": test.batch,
            **derive(llm.cost, test, samples_s, read_gbps, peak),
            "ceiling": bound,
            "overhead_ms": 1e3 * overhead_s[test.batch] if test.kind == "tg" else None,
            "hybrid": steps,
        }


def derive(
    cost: "ModelCost",
    test: Case,
    samples_s: list[float],
    read_gbps: float | None,
    peak_tflops: float | None,
) -> Row:
    """The figures of a test; bytes are those of generated tokens only."""
    rates = [test.batch * test.num_tokens / s for s in samples_s]
    num_bytes = None
    if test.kind == "tg":
        # The context grows from depth to depth + num_tokens while it is read once per step.
        context = test.depth + test.num_tokens / 2
        num_bytes = cost.decode_bytes(context, test.batch) / test.batch
        operations = cost.decode_operations(context)
    else:
        operations = cost.prefill_operations(test.num_tokens, test.depth) / test.num_tokens
    mean = statistics.fmean(rates)
    gbps = None if num_bytes is None else num_bytes * mean / _GB
    tflops = operations * mean / 1e12
    return {
        "tokens_per_s": mean,
        "tokens_per_s_sd": statistics.stdev(rates) if len(rates) > 1 else None,
        "samples_s": samples_s,
        "size_bytes": round(cost.weight_bytes),
        "bytes_per_token": None if num_bytes is None else round(num_bytes),
        "operations_per_token": round(operations),
        "gbps": gbps,
        "tflops": tflops,
        "read_gbps": read_gbps,
        "ceiling_tflops": peak_tflops,
        "fraction_of_read_rate": gbps / read_gbps if gbps and read_gbps else None,
        "fraction_of_peak": tflops / peak_tflops if peak_tflops else None,
    }


def _run(llm: "LLM", test: Case) -> float:
    if test.kind == "pp":
        return llm.bench_prefill(test.num_tokens, test.depth)
    return llm.bench_decode(test.num_tokens, test.depth, test.batch)


def _larger(before: float | None, after: float | None) -> float | None:
    """What the machine could do: other programs can only lower a ceiling while it is measured."""
    return max(before or 0.0, after or 0.0) or None


def _runner_of(llm: "LLM") -> "Runner":
    runner = llm.engine.runner
    if not runner.model.moe_layers:
        raise ValueError(f"{llm.config.model} has dense layers only: raise layers=N")
    return runner


def _describe_model(args: argparse.Namespace, llm: "LLM") -> Row:
    runner = _runner_of(llm)
    return {
        "model": args.synthetic or args.model or options.DEFAULT_MODEL,
        "synthetic": args.synthetic is not None,
        "model_type": llm.model_config.model_type,
        "format": llm.config.expert_format,
        "dense": llm.config.dense_format,
        "cache": llm.config.cache_dtype,
        "device": llm.config.device,
        "isa": runner.isa,
        "arithmetic": llm.config.arithmetic,
    }


_COLUMNS: list[Column] = [
    ("model", 26, lambda row: str(row["model"])),
    ("size GiB", 8, lambda row: f"{row['size_bytes'] / _GIB:.3f}"),
    ("format", 8, lambda row: str(row["format"])),
    ("dense", 5, lambda row: str(row["dense"])),
    ("threads", 7, lambda row: str(row["threads"])),
    ("isa", 11, lambda row: str(row["isa"])),
    ("test", 14, lambda row: str(row["test"])),
    ("t/s", 18, lambda row: _rate(row)),
    ("GB/s", 6, lambda row: "" if row["gbps"] is None else f"{row['gbps']:.2f}"),
    ("of read", 7, lambda row: percent(row["fraction_of_read_rate"])),
    ("TFLOP/s", 7, lambda row: f"{row['tflops']:.3f}"),
    ("of peak", 7, lambda row: percent(row["fraction_of_peak"])),
    ("overhead ms", 11, lambda row: _number(row["overhead_ms"])),
]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _rate(row: Row) -> str:
    mean, sd = row["tokens_per_s"], row["tokens_per_s_sd"]
    digits = 2 if mean < 1000 else 0
    return f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def _write_md(rows: Iterator[Row]) -> None:
    """Rows as they are measured; what was measured where comes after the table."""
    kept: list[Row] = []
    row = write_table(_COLUMNS, keep(rows, kept))
    if row is not None:
        peak = (
            f" · {row['ceiling']} {row['ceiling_tflops']:.2f} T/s" if row["ceiling_tflops"] else ""
        )
        note(f"memory reads {row['read_gbps']:.1f} GB/s{peak} · {summary(row)}")
    write_report(kept)


def _write_csv(rows: Iterator[Row]) -> None:
    writer: csv.DictWriter[str] | None = None
    for row in rows:
        flat = {k: json.dumps(v) if isinstance(v, dict | list) else v for k, v in row.items()}
        if writer is None:
            writer = csv.DictWriter(sys.stdout, list(flat))
            writer.writeheader()
        writer.writerow(flat)
        sys.stdout.flush()


def _write_json(rows: Iterator[Row]) -> None:
    print(json.dumps(list(rows), indent=2))


def _write_jsonl(rows: Iterator[Row]) -> None:
    for row in rows:
        print(json.dumps(row), flush=True)


WRITERS: dict[str, Callable[[Iterator[Row]], None]] = {
    "md": _write_md,
    "csv": _write_csv,
    "json": _write_json,
    "jsonl": _write_jsonl,
}
