"""`moejet bench`: tokens per second for prompts (pp) and generation (tg), as a table or as data.

`pp512` reads a prompt of 512 tokens, `tg128` generates 128 tokens one at a time; `@d1024` means
that 1024 tokens are in the context already. One warm-up run is thrown away, then each test runs
several times. Tokenisation and sampling are not part of the measurement.
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
from moejet.cli.environment import describe_environment, summary
from moejet.cli.table import Column, Row, percent, write_table
from moejet.cli.terminal import note
from moejet.config import DENSE_FORMATS, EXPERT_FORMATS
from moejet.presets import PRESETS

if TYPE_CHECKING:
    from moejet.experts.cpu_experts import CpuExperts
    from moejet.llm import LLM

_GB = 1e9
_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Case:
    """One measurement: `kind` "pp" or "tg" over num_tokens, after `depth` tokens of context."""

    kind: str
    num_tokens: int
    depth: int

    @property
    def name(self) -> str:
        """The name in the table, such as pp512 or tg128@d1024."""
        return f"{self.kind}{self.num_tokens}" + (f"@d{self.depth}" if self.depth else "")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moejet bench`."""
    parser.epilog = f"{__doc__ or ''}\npresets for --synthetic: {', '.join(PRESETS)}\n"
    source = parser.add_mutually_exclusive_group()
    source.add_argument("-m", "--model", metavar="MODEL", help="directory or hub id")
    source.add_argument(
        "--synthetic",
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
    parser.add_argument("-r", type=int, default=3, metavar="N", help="repetitions (default 3)")
    parser.add_argument(
        "-t", "--threads", type=options.counts, metavar="N,..", help="CPU thread counts to compare"
    )
    parser.add_argument(
        "--format",
        type=options.names_of(EXPERT_FORMATS),
        metavar="F,..",
        help=f"of {', '.join(EXPERT_FORMATS)}",
    )
    parser.add_argument("--dense-format", choices=DENSE_FORMATS, help="type of all other weights")
    options.add_isa_option(parser)
    parser.add_argument("-o", "--output", choices=("md", "csv", "json", "jsonl"), default="md")


def execute(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    tests = plan_tests(args.p, args.n, args.d)
    if args.r < 1:
        raise ValueError(f"-r {args.r} must be at least 1")
    if args.threads is not None and 0 in args.threads:
        raise ValueError("-t 0 must be a positive number of threads")
    WRITERS[args.output](_measure_all(args, tests))
    return 0


def plan_tests(prompts: list[int], answers: list[int], depths: list[int]) -> list[Case]:
    """All tests in the order of the table; a size of 0 leaves its kind out."""
    tests = [
        Case(kind, count, depth)
        for depth in depths
        for kind, counts in (("pp", prompts), ("tg", answers))
        for count in counts
        if count
    ]
    if not tests:
        raise ValueError("-p 0 with -n 0 leaves nothing to measure: give one of them a size")
    return tests


def open_llm(args: argparse.Namespace, engine_options: dict[str, Any]) -> "LLM":
    """Load the model to measure, or make a synthetic one."""
    if args.synthetic is None:
        return options.open_llm(args.model or options.DEFAULT_MODEL, engine_options)
    return options.engine_class().synthetic(args.synthetic, **engine_options)


def _measure_all(args: argparse.Namespace, tests: list[Case]) -> Iterator[Row]:
    from moejet.ceilings import Meter

    environment = describe_environment()
    context = max(test.depth + test.num_tokens for test in tests) + 1
    for weight_format in args.format or [None]:
        for num_threads in args.threads or [None]:
            given = {
                "expert_format": weight_format,
                "num_threads": num_threads,
                "dense_format": args.dense_format,
                "isa": args.isa,
                "max_context": context,
            }
            with open_llm(args, {k: v for k, v in given.items() if v is not None}) as llm:
                subject = _describe_model(args, llm)
                read_gbps = Meter(_experts_of(llm).pool).read().value
                yield from measure(
                    llm, tests, args.r, {**environment, **subject, "read_gbps": read_gbps}
                )


def measure(llm: "LLM", tests: list[Case], repetitions: int, common: Row) -> Iterator[Row]:
    """One row per test: `common` and the test's figures. The first run of a test is a warm-up."""
    sizes = llm.weight_bytes()
    for test in tests:
        run = llm.bench_prefill if test.kind == "pp" else llm.bench_decode
        run(test.num_tokens, test.depth)
        samples_s = [run(test.num_tokens, test.depth) for _ in range(repetitions)]
        rates = [test.num_tokens / s for s in samples_s]
        row = {
            **common,
            "test": test.name,
            "num_tokens": test.num_tokens,
            "depth": test.depth,
            "tokens_per_s": statistics.fmean(rates),
            "tokens_per_s_sd": statistics.stdev(rates) if len(rates) > 1 else None,
            "samples_s": samples_s,
            "size_bytes": sizes["total"],
            "bytes_per_token": None,
            "gbps": None,
            "fraction_of_read_rate": None,
        }
        if test.kind == "tg":
            # The context grows from depth to depth + num_tokens while it is read once per token.
            mean_context = test.depth + test.num_tokens / 2
            per_token = sizes["active_per_token"] + sizes["latent_per_token"] * mean_context
            row["bytes_per_token"] = round(per_token)
            row["gbps"] = per_token * row["tokens_per_s"] / _GB
            if common.get("read_gbps"):
                row["fraction_of_read_rate"] = row["gbps"] / common["read_gbps"]
        yield row


def _experts_of(llm: "LLM") -> "CpuExperts":
    moe_layers = llm.engine.runner.model.moe_layers
    if not moe_layers:
        raise ValueError(f"{llm.config.model} has dense layers only: raise layers=N")
    return moe_layers[0].experts


def _describe_model(args: argparse.Namespace, llm: "LLM") -> Row:
    experts = _experts_of(llm)
    return {
        "model": args.synthetic or args.model or options.DEFAULT_MODEL,
        "synthetic": args.synthetic is not None,
        "model_type": llm.model_config.model_type,
        "format": llm.config.expert_format,
        "dense": llm.config.dense_format,
        "threads": experts.pool.num_threads,
        "isa": experts.isa,
    }


_COLUMNS: list[Column] = [
    ("model", 24, lambda row: str(row["model"])),
    ("size GiB", 8, lambda row: f"{row['size_bytes'] / _GIB:.3f}"),
    ("format", 8, lambda row: str(row["format"])),
    ("dense", 5, lambda row: str(row["dense"])),
    ("threads", 7, lambda row: str(row["threads"])),
    ("isa", 6, lambda row: str(row["isa"])),
    ("test", 12, lambda row: str(row["test"])),
    ("t/s", 18, lambda row: _rate(row)),
    ("GB/s", 6, lambda row: "" if row["gbps"] is None else f"{row['gbps']:.2f}"),
    ("of read rate", 12, lambda row: percent(row["fraction_of_read_rate"])),
]


def _rate(row: Row) -> str:
    mean, sd = row["tokens_per_s"], row["tokens_per_s_sd"]
    digits = 2 if mean < 1000 else 0
    return f"{mean:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def _write_md(rows: Iterator[Row]) -> None:
    """Rows as they are measured; what was measured where comes after the table."""
    row = write_table(_COLUMNS, rows)
    if row is not None:
        note(f"memory reads {row['read_gbps']:.1f} GB/s · {summary(row)}")


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
