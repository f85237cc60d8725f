"""The README's table of figures, measured on this machine: ceilings, kernels and models, one after another.

    python bench/suite.py [--results FILE] [--minutes 12] [--quick]
    python bench/suite.py --table FILE          # the table of a file that is there

Appends result lines to FILE (build/bench.jsonl) and writes the table of this run beside it, as Markdown. Ends within
--minutes: a case that would begin later or lasts longer is left out and named. Each case is a process of its own; every
line has the ceilings measured beside it, the load, commit and versions. Takes about 5 minutes on two cores and 12 GB of
free memory, of which a smaller machine measures a slice of the model; --quick takes about one minute and 1 GB.
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
from moejet.cli.bench_kinds import KINDS
from moejet.cli.results import line_writer, read_results
from moejet.cli.table import percent

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parents[1]
MODEL, SLICE = "deepseek-v2-lite", "deepseek-v2-lite:layers=4"
MODEL_BYTES = (
    12 << 30
)  # of int4_g32 experts, a cache of 16,896 tokens, and what reads of memory need


@dataclass(frozen=True, slots=True)
class Case:
    """A command that prints result lines, and the seconds that it takes on two cores."""

    name: str
    arguments: tuple[str, ...]
    expected_s: float


def cases(quick: bool, model: str) -> list[Case]:
    """In the order of the table."""
    layer = ("moe", "--shape", "deepseek-v2-lite", "--gigabytes", "1.2", "--json", "-")
    if quick:
        moe = ("--format", "int4_g32,bf16", "--tokens", "1,64,512", "--seconds", "0.5")
        depths = ("-p", "128", "-n", "16", "-d", "0,1024,4096", "-r", "2", "--json", "-")
        return [
            Case("ceilings", ("ceilings", "--seconds", "0.1", "--json", "-"), 10),
            Case("layer", (*layer, *moe), 15),
            Case("slice", ("--synthetic", SLICE, *depths), 25),
        ]
    moe = ("--format", "int4_g32,int8,fp8,bf16", "--tokens", "1,4,16,64,256,1024", "--seconds", "2")
    depths = ("-p", "512", "-n", "32", "-d", "0,1024,4096,16384", "--json", "-")
    return [
        Case("ceilings", ("ceilings", "--json", "-"), 20),
        Case("layer", (*layer, *moe), 100),
        Case("model", ("--synthetic", model, *depths), 150),
        Case("batch", ("--synthetic", model, "-p", "0", "-n", "16", "-b", "16", "--json", "-"), 60),
        Case("tiny reasoner", ("-p", "256", "-n", "128", "--json", "-"), 15),
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
    """Of several lines of one case the last."""
    found = {}
    for row in rows:
        found[row["bench"], *(str(row.get(key)) for key in KINDS[row["bench"]].keys)] = row
    return list(found.values())


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
    first = rows[0]
    reads = [row.get("read_gbps", row["memory_read_gbps"]) for row in rows]
    loads = [row["load_average"][0] for row in rows if row["load_average"]]
    parts = [
        f"{first['cpu']}, {first['threads']} threads ({', '.join(first['instruction_sets'])})",
        f"memory reads {min(reads):.1f} to {max(reads):.1f} GB/s while this ran",
    ]
    peaks: dict[str, list[float]] = {}
    for row in rows:
        if row.get("ceiling") and row.get("ceiling_tflops"):
            peaks.setdefault(row["ceiling"], []).append(row["ceiling_tflops"])
    parts += [f"{name} {min(v):.2f} to {max(v):.2f} T/s" for name, v in peaks.items()]
    if loads:
        parts.append(f"load {min(loads):.1f} to {max(loads):.1f}")
    commits = dict.fromkeys(
        f"{str(row['commit'])[:10]}{' with changes' * bool(row['dirty'])}" for row in rows
    )
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    return f"{'; '.join(parts)}; {first['time'][:10]}, commit {', '.join(commits)}; {versions}."


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "build/bench.jsonl", metavar="FILE")
    parser.add_argument("--minutes", type=float, default=12.0, metavar="X", help="at most")
    parser.add_argument("--quick", action="store_true", help="few cases, a minute")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="measure nothing, show this file"
    )
    parser.add_argument(
        "--model", metavar="PRESET[:layers=N]", help="default: what fits into memory"
    )
    args = parser.parse_args(arguments)
    if args.table is not None:
        print(table(read_results(args.table)), end="")
        return 0
    if not args.minutes > 0:
        parser.error(f"--minutes {args.minutes} must be above 0")
    available = topology.available_bytes()
    fits = available is None or available >= MODEL_BYTES
    args.results.parent.mkdir(parents=True, exist_ok=True)
    chosen = cases(args.quick, args.model or (MODEL if fits else SLICE))
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
