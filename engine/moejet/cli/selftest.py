"""Runs every CPU kernel once on a small layer: `python -m moejet.cli.selftest` prints JSON.

`moejet doctor` starts this as a process of its own, because what it looks for (an illegal
instruction, a broken extension) would end the process that looks.
"""

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

HIDDEN, INTERMEDIATE, EXPERTS, TOP_K = 96, 80, 4, 2

# A few tokens take the kernels for generation, many those for prompts (AMX tiles among them).
TOKEN_COUNTS = (3, 96)

# Relative error of a whole layer: int8 activations cost 1 to 2 %, bf16 arithmetic less.
TOLERANCE = 0.03


def relative_error(isa: str, weight_format: str, num_tokens: int, arithmetic: str) -> float:
    """Error of moe_forward against float64 on the same dequantised weights, as |x - y| / |y|."""
    import numpy as np
    import torch

    from moejet import _C, topology

    pool = _C.ThreadPool([topology.allowed_cpus()[0]], pin=False)
    try:
        sizes = (EXPERTS, HIDDEN, INTERMEDIATE)
        weights = _C.ExpertWeights(*sizes, weight_format, arithmetic=arithmetic)
        generator = torch.Generator().manual_seed(0)
        for expert in range(EXPERTS):
            gate, up = (torch.randn(INTERMEDIATE, HIDDEN, generator=generator) for _ in range(2))
            down = torch.randn(HIDDEN, INTERMEDIATE, generator=generator)
            weights.set_expert(expert, gate * 0.1, up * 0.1, down * 0.1)
        x = torch.randn(num_tokens, HIDDEN, generator=generator)
        ids = torch.stack([torch.randperm(EXPERTS, generator=generator)[:TOP_K] for _ in x])
        mix = torch.rand(num_tokens, TOP_K, generator=generator)
        out = torch.zeros_like(x)
        used = _C.moe_forward(weights, x, ids, mix, out, pool, isa)
        if used != isa:
            raise RuntimeError(f"asked for {isa}, the kernels used {used}")
        truth = np.zeros((num_tokens, HIDDEN))
        for token in range(num_tokens):
            for slot in range(TOP_K):
                g, u, d = (
                    np.asarray(w, dtype=np.float64)
                    for w in weights.dequantize(int(ids[token, slot]))
                )
                row = x[token].numpy().astype(np.float64)
                hidden = g @ row
                hidden = hidden / (1 + np.exp(-hidden)) * (u @ row)
                truth[token] += float(mix[token, slot]) * (d @ hidden)
        return float(np.linalg.norm(out.numpy() - truth) / np.linalg.norm(truth))
    finally:
        pool.close()


def lines_of(arguments: Sequence[str], timeout_s: float = 120) -> tuple[list[dict[str, Any]], str]:
    """Runs Python in a process; the JSON lines that it printed and what went wrong ("" if nothing did)."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    printed, problem = "", ""
    try:
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env=environment,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        said = error.stdout or b""
        printed = said if isinstance(said, str) else said.decode(errors="replace")
        problem = f"still running after {timeout_s:.0f} s"
    except OSError as error:
        problem = str(error).strip().splitlines()[0]
    else:
        printed = done.stdout
        if done.returncode < 0:
            problem = f"killed by {signal.Signals(-done.returncode).name}"
        elif done.returncode:
            last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
            problem = last[0]
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")], problem


def main() -> None:
    """Print one JSON line per step, so that the reader knows the last step before a crash."""
    from moejet import _C
    from moejet.config import ARITHMETICS, EXPERT_FORMATS

    info: dict[str, Any] = _C.cpu_info()
    print(json.dumps({"cpu_info": info}), flush=True)
    for isa, state in info["isas"].items():
        if not state["usable"]:
            continue
        for weight_format in EXPERT_FORMATS:
            print(json.dumps({"start": [isa, weight_format]}), flush=True)
            tiles = ARITHMETICS if isa.startswith("amx") else ("bf16",)
            errors = [
                relative_error(isa, weight_format, count, arithmetic)
                for count in TOKEN_COUNTS
                for arithmetic in tiles
            ]
            # JSON has no NaN: null means that a result is not a number.
            shown = max(errors) if all(map(math.isfinite, errors)) else None
            print(json.dumps({"done": [isa, weight_format], "error": shown}), flush=True)


if __name__ == "__main__":
    main()
