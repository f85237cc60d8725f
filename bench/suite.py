"""The README's table of figures, measured on this machine: ceilings, kernels and models, one after another.

    python bench/suite.py [--results FILE] [--minutes 15] [--quick] [--small]
    python bench/suite.py --table FILE          # the table of a file that is there

Appends result lines to FILE (build/bench.jsonl) and writes the table of this run beside it, as Markdown. Ends within
--minutes: a case that would begin later or lasts longer is left out and named. Each case is a process of its own; every
line has the ceilings measured beside it, the load, commit and versions. On two idle cores it takes about 7 minutes and
16 GB of free memory, --small (a smaller layer, a slice of the model) 2 GB, --quick about one minute and 2 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moejet import topology
from moejet.cli.results import line_writer, read_results
from moejet.cli.table import percent

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
PRINT = ("--json", "-")
LARGE_BYTES = (
    16 << 30
)  # free memory for a layer in bf16 of V3's sizes, and for the whole V2-Lite in int4


@dataclass(frozen=True, slots=True)
class Case:
    """A command that prints result lines, and the seconds that it takes on two cores."""

    name: str
    arguments: tuple[str, ...]
    expected_s: float


def cases(quick: bool, large: bool) -> list[Case]:
    """In the order of the table. large: what takes LARGE_BYTES."""
    if large and not quick:
        layer = ("moe", "--shape", "deepseek-v3", "--experts", "96")
        model = ("--synthetic", "deepseek-v2-lite")
    else:
        layer = ("moe", "--shape", "deepseek-v2-lite", "--gigabytes", "1.2")
        model = ("--synthetic", "deepseek-v2-lite:layers=4")
    if quick:
        kernels = ("--format", "int4_g32,bf16", "--tokens", "1,64", "--seconds", "0.5")
        depths = ("-p", "128", "-n", "16", "-d", "0,4096", "-r", "2")
        return [
            Case("ceilings", ("ceilings", "--seconds", "0.1", *PRINT), 10),
            Case("layer", (*layer, *kernels, *PRINT), 15),
            Case("model", (*model, *depths, *PRINT), 25),
        ]
    kernels = ("--format", "int4_g32,int8,fp8,bf16", "--tokens", "1,4,16,64")
    depths = ("-p", "512", "-n", "32", "-d", "0,512,4096,16384")
    return [
        Case("ceilings", ("ceilings", *PRINT), 20),
        Case("layer", (*layer, *kernels, *PRINT), 160),
        Case("model", (*model, *depths, *PRINT), 180),
        Case("batch", (*model, "-p", "0", "-n", "16", "-d", "512", "-b", "16", *PRINT), 40),
        Case("tiny reasoner", ("-p", "256", "-n", "128", *PRINT), 15),
    ]


def run(case: Case, timeout_s: float) -> Iterator[Row]:
    """The lines of a case as they come. RuntimeError: it failed or took too long."""
    path = os.pathsep.join([str(ROOT / "engine"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "moejet", "bench", *case.arguments]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    ) as process:
        timer = threading.Timer(timeout_s, process.kill)
        timer.start()
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith("{") and line.endswith("}\n"):
                    yield json.loads(line)
        finally:
            timer.cancel()
    if process.returncode:
        late = process.returncode == -signal.SIGKILL
        why = f"stopped after {timeout_s:.0f} s" if late else f"exit code {process.returncode}"
        raise RuntimeError(f"{case.name}: {why}")


def measure(chosen: Sequence[Case], minutes: float, results: Path) -> tuple[list[Row], list[str]]:
    """The lines of all cases, each in the file at once, and what is missing."""
    deadline = time.monotonic() + 60 * minutes
    rows: list[Row] = []
    missing = []
    for case in chosen:
        left = deadline - time.monotonic()
        if left < min(case.expected_s, 5):
            missing.append(f"{case.name}: no time left")
            continue
        print(f"{case.name}: about {case.expected_s:.0f} s", file=sys.stderr, flush=True)
        try:
            with line_writer(results) as write:
                for row in run(case, left):
                    write(row)
                    rows.append(row)
        except RuntimeError as error:
            missing.append(str(error))
    return rows, missing


def latest(rows: Sequence[Row]) -> list[Row]:
    """Of several lines of one case the last. Cases are told apart by what the table shows of them."""
    names = ("bench", "shape", "model", "format", "dense", "tokens", "test", "threads")
    return list({tuple(row.get(name) for name in names): row for row in rows}.values())


def table(rows: Sequence[Row]) -> str:
    """Markdown: layers of experts, then models, then what bounded them and where that was."""
    rows = latest(rows)
    texts = []
    layers = [row for row in rows if row["bench"] == "moe"]
    if layers:
        texts.append(_layers(layers))
    models = [row for row in rows if row["bench"] == "model"]
    if models:
        texts.append(_models(models))
    texts += [_machine(rows)]
    return "\n\n".join(texts) + "\n"


def _layers(rows: Sequence[Row]) -> str:
    [shape, *others] = dict.fromkeys(row["shape"] for row in rows)
    assert not others, "one shape has one table"
    first = rows[0]
    head = (
        f"| one layer of {shape} ({first['num_experts']} experts, {first['num_experts_per_tok']} per token) "
        "| tokens | ms | GB/s (of reads) | TFLOP/s (of peak) | x roofline |"
    )
    lines = [head, "|---|---|---|---|---|---|"]
    for row in rows:
        lines.append(
            f"| `{row['format']}` | {row['tokens']} | {row['ms_p50']:.2f} "
            f"| {row['gbps']:.1f} ({percent(row['fraction_of_dram'])}) "
            f"| {row['tflops']:.3f} ({percent(row['fraction_of_peak'])}) | {row['over_roofline']:.2f} |"
        )
    return "\n".join(lines)


def _models(rows: Sequence[Row]) -> str:
    lines = [
        "| model | formats | test | tokens/s | of memory reads | of peak | overhead ms/token |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        spread = row["tokens_per_s_sd"]
        rate = f"{row['tokens_per_s']:.1f}" + (f" ± {spread:.1f}" if spread is not None else "")
        overhead = "" if row["overhead_ms"] is None else f"{row['overhead_ms']:.2f}"
        lines.append(
            f"| {row['model']} | `{row['format']}`, `{row['dense']}` | `{row['test']}` | {rate} "
            f"| {percent(row['fraction_of_read_rate'])} | {percent(row['fraction_of_peak'])} | {overhead} |"
        )
    return "\n".join(lines)


def _machine(rows: Sequence[Row]) -> str:
    """Where and when that was, and what memory and arithmetic did meanwhile. Older lines do not say all of it."""
    first = rows[0]
    reads = [v for row in rows if (v := row.get("read_gbps", row.get("memory_read_gbps")))]
    ceilings: dict[str, list[float]] = {"memory reads, GB/s": reads}
    for row in rows:
        if row.get("ceiling_tflops"):
            ceilings.setdefault(f"{row['ceiling']}, T/s", []).append(row["ceiling_tflops"])
    ceilings["load"] = [row["load_average"][0] for row in rows if row.get("load_average")]
    spans = [f"{name}: {min(v):.3g} to {max(v):.3g}" for name, v in ceilings.items() if v]
    isas = f" ({', '.join(first['instruction_sets'])})" if "instruction_sets" in first else ""
    names = (f"{str(row['commit'])[:10]}{' with changes' * bool(row['dirty'])}" for row in rows)
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return (
        f"{first['cpu']}, {first['threads']} threads{isas}, {first['time'][:10]}. While this ran: "
        f"{'; '.join(spans)}. Commit {', '.join(dict.fromkeys(names))}; {versions}."
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "build/bench.jsonl", metavar="FILE")
    parser.add_argument("--minutes", type=float, default=15.0, metavar="X", help="at most")
    parser.add_argument("--quick", action="store_true", help="few cases, a minute")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="measure nothing, show this file"
    )
    parser.add_argument(
        "--small", action="store_true", help="what 2 GB can hold (default where 16 are not free)"
    )
    args = parser.parse_args(arguments)
    if args.table is not None:
        print(table(read_results(args.table)), end="")
        return 0
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes} must be above 0")
    available = topology.available_bytes()
    large = not args.small and (available is None or available >= LARGE_BYTES)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    chosen = cases(args.quick, large)
    print(f"about {sum(case.expected_s for case in chosen) / 60:.0f} minutes", file=sys.stderr)
    rows, missing = measure(chosen, args.minutes, args.results)
    if rows:
        text = table(rows)
        args.results.with_suffix(".md").write_text(text, encoding="utf-8")
        print(text)
        print(f"{args.results}, {args.results.with_suffix('.md')}", file=sys.stderr)
    for what in missing:
        print(f"missing: {what}", file=sys.stderr)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
