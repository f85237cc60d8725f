"""Models on a GPU and a CPU together, end to end: a process for every case, every figure at once in a file.

    python bench/gpu_hybrid [--results FILE] [--only CASE,..] [--minutes 15] [--again]
    python bench/gpu_hybrid --device simulated --tiny        # the same code without a GPU, in a minute

Cases that ended well are not run again for the same commit (`--again`: all are). A case that hangs or dies loses its
own figures only; one that would not end within --minutes is left for the next call. Exit code 0: all of them ended well
(or need an option that this version does not have).
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

from cases import CASES, FULL, TINY, Case
from measure import KINDS, summary

from moejet.cli.environment import describe_environment, moment
from moejet.cli.results import line_writer

Row = dict[str, Any]
RESULTS = Path(__file__).parents[1] / "results" / "gpu_hybrid.jsonl"


def run_child(case: Case, device: str, tiny: bool, out: TextIO) -> None:
    """Measures in this process; one JSON line for each figure."""

    def give(measure: str, figures: Row) -> None:
        print(json.dumps({"measure": measure, **figures}), file=out, flush=True)

    KINDS[case.kind](case, TINY if tiny else FULL, device, tiny, give)


class Runner:
    """Runs cases as processes and appends what they say to a file."""

    def __init__(self, results: Path, device: str, tiny: bool, command: list[str] | None = None):
        self._results, self._device, self._tiny = results, device, tiny
        self._command = command or [sys.executable, str(Path(__file__).parent)]
        self._facts = {"bench": "gpu_hybrid", **describe_environment(), **_describe_gpu(device)}
        self._facts |= {"device": device, "tiny": tiny}

    def has_ended_well(self, case: Case) -> bool:
        """In an earlier run of this commit, over the same device."""
        if not self._results.is_file():
            return False
        mine = {key: self._facts[key] for key in ("commit", "dirty", "device", "tiny")}
        mine |= {"case": case.name, "measure": "end", "status": "ok"}
        rows = [json.loads(line) for line in self._results.read_text().splitlines()]
        return any(all(row.get(key) == value for key, value in mine.items()) for row in rows)

    def run(self, case: Case, timeout_s: float) -> str:
        """ "ok", "timeout", or the exit code with the last words of the process."""
        start = time.monotonic()
        command = [*self._command, "--child", case.name, "--device", self._device]
        command += ["--tiny"] * self._tiny
        path = os.pathsep.join(p for p in sys.path if p)
        with subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        ) as process:
            said, errors = _lines(process.stdout), _lines(process.stderr)
            status = self._follow(case, process, said, start + timeout_s)
            last = ""  # read here: leaving the block closes the pipe
            while (line := errors.get()) is not None:
                last = line.strip() or last
        if status != "ok" and last:
            status = f"{status}: {last}"
        self._append(
            case, {"measure": "end", "status": status, "seconds": time.monotonic() - start}
        )
        return status

    def skip(self, case: Case, why: str) -> None:
        self._append(case, {"measure": "end", "status": why})

    def _follow(
        self,
        case: Case,
        process: subprocess.Popen[str],
        said: queue.Queue[str | None],
        deadline: float,
    ) -> str:
        while True:
            try:
                line = said.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                process.kill()
                return "timeout"
            if line is None:
                code = process.wait()
                return "ok" if code == 0 else f"exit code {code}"
            if line.startswith("{"):
                self._append(case, json.loads(line))

    def _append(self, case: Case, figures: Row) -> None:
        print(f"{case.name}: {figures['measure']}: {summary(figures)}", flush=True)
        described = {"case": case.name, "shape": case.shape, "options": case.options}
        self._results.parent.mkdir(parents=True, exist_ok=True)
        with line_writer(self._results) as write:
            write({**self._facts, **moment(), **described, **figures})


def _lines(stream: TextIO | None) -> queue.Queue[str | None]:
    """Lines of a pipe as they come, then None."""
    assert stream is not None
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        try:
            for line in stream:
                lines.put(line)
        finally:
            lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    return lines


def _describe_gpu(device: str) -> Row:
    if device != "cuda":
        return {"gpu": None}
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("torch sees no CUDA device: --device simulated --tiny runs without one")
    return {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cuda", "simulated"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, few steps")
    parser.add_argument("--only", type=lambda text: text.split(","), metavar="CASE,..")
    parser.add_argument("--minutes", type=float, default=15.0, metavar="X", help="of all cases")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    parser.add_argument("--again", action="store_true", help="also what has ended well before")
    parser.add_argument("--list", action="store_true", help="name the cases and end")
    parser.add_argument("--child", metavar="CASE", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    by_name = {case.name: case for case in CASES}
    if args.child:
        run_child(by_name[args.child], args.device, args.tiny, sys.stdout)
        return 0
    if args.list:
        for case in CASES:
            print(json.dumps(asdict(case)))
        return 0
    for name in args.only or ():
        if name not in by_name:
            parser.error(f"--only {name!r} is none of {', '.join(by_name)}")
    runner = Runner(args.results, args.device, args.tiny)
    chosen = [case for case in CASES if not args.only or case.name in args.only]
    return run_all(runner, chosen, args.minutes, again=args.again)


def run_all(runner: Runner, cases: list[Case], minutes: float, *, again: bool) -> int:
    deadline = time.monotonic() + 60.0 * minutes
    failed = []
    for case in cases:
        left = deadline - time.monotonic()
        if not again and runner.has_ended_well(case):
            print(f"{case.name}: done before")
        elif case.missing:
            runner.skip(case, f"not in this version: {', '.join(case.missing)}")
        elif left < case.expected_s:
            runner.skip(case, f"no time: {left:.0f} s of {case.expected_s:.0f} are left")
            failed.append(case.name)
        elif runner.run(case, min(case.timeout_s, left)) != "ok":
            failed.append(case.name)
    if failed:
        print(f"not done: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
