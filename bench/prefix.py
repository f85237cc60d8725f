"""Time to the first token of a long prompt: computed, found in memory, and read from disk after a restart.

    python bench/prefix.py [--tokens 8192] [--shape deepseek-v2-lite:layers=4] [--repeats 3] [--json FILE]

Every start is a process of its own. Before the one that reads from disk, the store's files leave the page cache. The
last tokens of the prompt, fewer than block_size, are computed in every case. Then: generation in the last process, with
blocks being written behind and without, which take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from moejet.cli.environment import describe_environment, summary
from moejet.cli.results import add_json_option, line_writer

SHAPES = ("deepseek-v2-lite:layers=4", "tiny-reasoner")
GENERATED = 128


def open_llm(shape: str, directory: str, num_tokens: int) -> Any:
    from moejet.cli import options

    options.quiet_openmp()
    from moejet import LLM

    engine = {
        "max_context": num_tokens + 2 * GENERATED,
        "cache_tokens": 3 * num_tokens,
        "prefix_disk_gib": 4.0,
        "prefix_dir": directory,
    }
    if shape == "tiny-reasoner":
        # Its shape; its own context is shorter than the prompt.
        from dataclasses import replace
        from importlib.resources import files

        from moejet.config import ModelConfig

        config = ModelConfig.from_hf(Path(str(files("moejet"))) / "assets" / "tiny_reasoner")
        return LLM.synthetic(replace(config, max_position_embeddings=1 << 20), **engine)
    return LLM.synthetic(shape, **engine)


def first_token_s(llm: Any, prompt: list[int]) -> tuple[float, int]:
    """Seconds to the first token, and how many tokens of the prompt were not computed."""
    from moejet import SamplingParams

    start = time.perf_counter()
    stream = llm.stream(prompt, SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
    [delta] = stream
    elapsed = time.perf_counter() - start
    return elapsed, delta.output.timings.cached_tokens


def decode_ms(llm: Any, prompt: list[int]) -> float:
    """Milliseconds per generated token behind a short prompt."""
    from moejet import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=GENERATED, ignore_eos=True)
    [result] = llm.generate([prompt], params)
    return 1000 * result.timings.decode_s / (GENERATED - 1)


def run_phase(args: argparse.Namespace) -> dict[str, Any]:
    """One process: "cold" computes and writes; "disk" reads, then finds in memory, then generates."""
    rng = random.Random(0)
    prompts = [[rng.randrange(50) for _ in range(args.tokens)] for _ in range(args.repeats)]
    with open_llm(args.shape, args.directory, args.tokens) as llm:
        first_token_s(llm, [1] * 64)  # pages and threads
        result: dict[str, Any] = {"first": [first_token_s(llm, p) for p in prompts]}
        if args.phase == "cold":
            return result
        result["memory"] = [first_token_s(llm, p) for p in prompts[-1:] * args.repeats]
        store = llm.engine.scheduler.store
        result["token_bytes"] = llm.cost.latent_bytes
        result["decode"] = {"with": [], "without": []}
        for i in range(2 * args.repeats):
            llm.engine.scheduler.store = None if i % 2 else store
            name = "without" if i % 2 else "with"
            short = [rng.randrange(50) for _ in range(300)]
            result["decode"][name].append(decode_ms(llm, short))
        return result


def start(shape: str, directory: str, phase: str, args: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--phase", phase, "--directory", directory]
    command += ["--shape", shape, "--tokens", str(args.tokens), "--repeats", str(args.repeats)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    parsed: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return parsed


def drop_from_page_cache(directory: str) -> int:
    """Returns the size of all files."""
    total = 0
    for file in Path(directory).glob("*/*.blocks"):
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        total += os.fstat(fd).st_size
        os.close(fd)
    return total


def measure(shape: str, args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=args.directory) as directory:
        cold = start(shape, directory, "cold", args)
        size = drop_from_page_cache(directory)
        warm = start(shape, directory, "disk", args)
    assert not any(cached for _, cached in cold["first"]), "the store was not empty"
    assert all(cached > args.tokens - 33 for _, cached in warm["first"]), "not read from disk"
    seconds = {
        "cold": statistics.median(s for s, _ in cold["first"]),
        "memory": statistics.median(s for s, _ in warm["memory"]),
        "disk": statistics.median(s for s, _ in warm["first"]),
    }
    return {
        "bench": "prefix",
        "shape": shape,
        "tokens": args.tokens,
        "latent_bytes": warm["token_bytes"] * args.tokens,
        "store_bytes": size,
        **{f"{name}_s": value for name, value in seconds.items()},
        "memory_ratio": seconds["cold"] / seconds["memory"],
        "disk_ratio": seconds["cold"] / seconds["disk"],
        "decode_ms": statistics.median(warm["decode"]["without"]),
        "decode_writing_ms": statistics.median(warm["decode"]["with"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--shape", default=None, help=f"default: {' and '.join(SHAPES)}")
    parser.add_argument("--directory", default=None, help="on the disk to measure")
    add_json_option(parser)
    parser.add_argument("--phase", choices=("cold", "disk"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.phase:
        print(json.dumps(run_phase(args)))
        return
    environment = describe_environment()
    print(summary(environment))
    print(f"{'shape':<28}{'cold s':>9}{'memory s':>10}{'disk s':>9}{'memory x':>10}{'disk x':>8}")
    for shape in [args.shape] if args.shape else SHAPES:
        row = measure(shape, args)
        print(
            f"{shape:<28}{row['cold_s']:9.3f}{row['memory_s']:10.4f}{row['disk_s']:9.4f}"
            f"{row['memory_ratio']:10.0f}{row['disk_ratio']:8.0f}\n"
            f"  {row['latent_bytes'] / 1e6:.0f} MB of latents, {row['store_bytes'] / 1e6:.0f} MB stored; "
            f"per generated token {row['decode_ms']:.3f} ms, {row['decode_writing_ms']:.3f} ms while writing",
            flush=True,
        )
        with line_writer(args.json) as write:
            write({**environment, **row})


if __name__ == "__main__":
    main()
