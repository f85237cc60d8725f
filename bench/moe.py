"""Routed experts on the CPU: time, memory rate and arithmetic rate of one MoE layer.

    python bench/moe.py [--shapes v2-lite,v3] [--formats int4_g32,...] [--tokens 1,4,...] [--isa auto]

Every case rotates over at least `--gigabytes` of packed weights, so that decode reads memory and not
a cache. Beside every case the plain read rate of the same memory is measured: the ceiling of
decode, and what tells a busy machine from a slow kernel. A wrong answer is not timed. One table line
and one JSON line (prefix "json") per case.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from moejet import _C, topology
from moejet.experts.cpu_experts import create_pool
from moejet.testing.moe_layers import (
    FORMATS,
    Layer,
    activations,
    relative_error,
    routing,
    tolerance,
)


@dataclass(frozen=True)
class Shape:
    name: str
    hidden: int
    inter: int
    experts: int
    top_k: int


SHAPES = {
    "v2-lite": Shape("v2-lite", 2048, 1408, 64, 6),
    "v3": Shape("v3", 7168, 2048, 256, 8),
}


def make_layers(
    shape: Shape, format: str, num_bytes: float, pool: _C.ThreadPool
) -> list[_C.ExpertWeights]:
    """Enough layers for num_bytes; one with fewer experts where a whole layer is larger than that."""
    expert_bytes = _C.ExpertWeights(1, shape.hidden, shape.inter, format).expert_nbytes
    experts = min(shape.experts, int(num_bytes / expert_bytes))
    count = max(1, round(num_bytes / (experts * expert_bytes)))
    layers = []
    for seed in range(count):
        layers.append(_C.ExpertWeights(experts, shape.hidden, shape.inter, format))
        layers[-1].fill_random(seed, pool)
    return layers


def check(layer: _C.ExpertWeights, pool: _C.ThreadPool, isa: str, tokens: int) -> None:
    """Compares all tokens on two experts with float64."""
    experts = (0, layer.num_experts - 1)
    ids, mix = routing(tokens, 2, 2)
    truth = Layer(layer, [], [])
    for e in experts:
        gate, up, down = (torch.from_numpy(w).double() for w in layer.dequantize(e))
        truth.dequantized.append((gate, up, down))
    x = activations(tokens, layer.hidden_size)
    out = torch.empty_like(x)
    _C.moe_forward(layer, x, torch.tensor(experts)[ids], mix, out, pool, isa)
    error, limit = relative_error(out, truth.truth(x, ids, mix)), tolerance(layer.format, isa, ids)
    if not error < limit:
        sys.exit(f"wrong answer: {layer.format} {isa} {tokens=} {error=:.3g} {limit=:.3g}")


def read_rate(layers: list[_C.ExpertWeights], pool: _C.ThreadPool) -> float:
    start = time.perf_counter()
    for layer in layers:
        layer.checksum(pool)
    return sum(layer.nbytes for layer in layers) / (time.perf_counter() - start)


def expert_orders(layer: _C.ExpertWeights, tokens: int, top_k: int, seed: int) -> Tensor:
    """Routing of one call: uniform, except that single tokens walk through all experts in turn."""
    if tokens == 1:
        first = seed * top_k
        return torch.arange(first, first + top_k).remainder(layer.num_experts).unsqueeze(0)
    return routing(tokens, layer.num_experts, top_k, seed)[0]


def measure(
    shape: Shape,
    layers: list[_C.ExpertWeights],
    tokens: int,
    pool: _C.ThreadPool,
    isa: str,
    seconds: float,
) -> dict[str, float]:
    x = activations(tokens, shape.hidden).bfloat16()
    out = torch.empty_like(x)
    mix = torch.rand(tokens, shape.top_k, generator=torch.Generator().manual_seed(0))
    total = sum(layer.nbytes for layer in layers)
    times: list[float] = []
    bytes_read: list[int] = []
    reads = [read_rate(layers, pool)]
    calls, deadline = 0, time.perf_counter() + seconds
    # At least one whole rotation, then until the time is up.
    while sum(bytes_read) < total or (time.perf_counter() < deadline and calls < 2000):
        layer = layers[calls % len(layers)]
        ids = expert_orders(layer, tokens, shape.top_k, calls // len(layers))
        start = time.perf_counter()
        _C.moe_forward(layer, x, ids, mix, out, pool, isa)
        times.append(time.perf_counter() - start)
        bytes_read.append(len(set(ids.flatten().tolist())) * layer.expert_nbytes)
        calls += 1
    reads.append(read_rate(layers, pool))
    p50 = statistics.median(times)
    deciles = statistics.quantiles(times, n=10) if len(times) > 1 else [p50] * 9
    rate = statistics.median(bytes_read) / p50
    ceiling = max(reads)
    operations = 6.0 * tokens * shape.top_k * shape.hidden * shape.inter
    return {
        "ms_p50": p50 * 1e3,
        "ms_p10": deciles[0] * 1e3,
        "ms_p90": deciles[-1] * 1e3,
        "gbps": rate / 1e9,
        "read_gbps": ceiling / 1e9,
        "read_fraction": rate / ceiling,
        "tops": operations / p50 / 1e12,
        "calls": calls,
    }


def provenance() -> dict[str, object]:
    def git(*arguments: str) -> str | None:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    status = git("status", "--porcelain")
    return {
        "commit": git("rev-parse", "--short", "HEAD"),
        "dirty": None if status is None else bool(status),
        "cpu": topology.cpu_model(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--tokens", default="1,4,16,64,256")
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--gigabytes", type=float, default=4.0, help="packed weights to rotate over"
    )
    parser.add_argument("--seconds", type=float, default=2.0, help="time per case")
    options = parser.parse_args()
    isa = _C.resolve_isa(options.isa)
    pool = create_pool(options.threads)
    torch.set_num_threads(1)
    common = provenance() | {"bench": "moe", "isa": isa, "threads": pool.num_threads}
    print(
        f"{common['cpu']}, {isa}, {pool.num_threads} threads; read = plain read of the same memory"
    )
    header = ("shape", "format", "tokens", "ms p50", "p10-p90", "GB/s", "read", "of read", "TOP/s")
    print("{:8} {:9} {:>6} {:>9} {:>16} {:>6} {:>6} {:>8} {:>7}".format(*header))
    for shape in (SHAPES[name] for name in options.shapes.split(",")):
        for format in options.formats.split(","):
            layers = make_layers(shape, format, options.gigabytes * 1e9, pool)
            for tokens in (int(t) for t in options.tokens.split(",")):
                check(layers[0], pool, isa, tokens)
                r = measure(shape, layers, tokens, pool, isa, options.seconds)
                print(
                    f"{shape.name:8} {format:9} {tokens:6} {r['ms_p50']:9.3f} "
                    f"{r['ms_p10']:7.3f}-{r['ms_p90']:<8.3f} {r['gbps']:6.1f} "
                    f"{r['read_gbps']:6.1f} {r['read_fraction']:8.0%} {r['tops']:7.3f}",
                    flush=True,
                )
                case = {"shape": shape.name, "format": format, "tokens": tokens}
                case |= {"experts": layers[0].num_experts, "layers": len(layers)}
                print("json " + json.dumps(common | case | r), flush=True)
            del layers
    pool.close()


if __name__ == "__main__":
    main()
