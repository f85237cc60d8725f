"""Resident memory against the plan: after loading, behind one full context, and with a full batch.

    python bench/memory.py [--shape deepseek-v2-lite:layers=3] [--context 4096] [--options '{"expert_format": "int8"}']
    python bench/memory.py --directory DIR ...

Without DIR the weights are random ones in memory. With DIR a checkpoint is written there (as bench/load.py does) and
started twice: packed from the checkpoint, then mapped from the packed cache. Every start is a process of its own that
reads /proc/self/status; the plan is that of `moejet plan`, for the same options and this cache. None of them has a real
vocabulary, so the plan's term for the tokenizer is left out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from load import write_checkpoint

from moejet import LLM, SamplingParams
from moejet.cli.environment import describe_environment
from moejet.cli.results import add_json_option, line_writer
from moejet.plan import Machine, make_plan, process_bytes
from moejet.presets import parse_preset


def resident_bytes() -> dict[str, int]:
    """Of this process: now, at its peak, and how much of it are pages of files."""
    names = {"VmRSS": "rss", "VmHWM": "peak", "RssFile": "files"}
    found = {}
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        if name in names:
            found[names[name]] = int(value.split()[0]) * 1024
    return found


def measure(model: str, context: int, options: dict[str, Any]) -> dict[str, Any]:
    """Starts the model here, fills its cache and its batch; the plan of the same configuration beside it."""
    options = {"max_context": context, "cache_tokens": context, **options}
    if Path(model).is_dir():
        llm = LLM(model, packed_cache="on", show_progress=False, **options)
    else:
        llm = LLM.synthetic(parse_preset(model), **options)
    result: dict[str, Any] = {"loaded": resident_bytes()}
    count = llm.config.max_num_requests
    params = SamplingParams(temperature=0.7, max_tokens=8, ignore_eos=True)
    llm.generate([[5 + i * 7919 % 1000 for i in range(context - 8)]], params)
    result["full_context"] = resident_bytes()
    length = context // count - 8
    llm.generate([[5 + (i * 7919 + j) % 1000 for i in range(length)] for j in range(count)], params)
    result["full_batch"] = resident_bytes()
    config = llm.engine.model_config
    plan = make_plan(config, llm.config, machine=Machine(), cache_tokens=context)
    without = process_bytes(config) - process_bytes(dataclasses.replace(config, vocab_size=1))
    result["parts"] = {part.name: part.num_bytes for part in plan.parts}
    result["plan_bytes"] = plan.bytes_in("RAM") - without
    llm.close()
    return result


def start(model: str, context: int, options: dict[str, Any]) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--child", "--shape", model, "--context", str(context)]
    command += ["--options", json.dumps(options)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    result: dict[str, Any] = json.loads(output)
    highest = max(result[name]["rss"] for name in ("loaded", "full_context", "full_batch"))
    return {**result, "fraction": highest / result["plan_bytes"]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", default="deepseek-v2-lite:layers=3")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--options", type=json.loads, default={}, help="engine options, as JSON")
    parser.add_argument("--directory", type=Path)
    parser.add_argument("--stored", choices=("fp8", "bf16"), default="fp8")
    add_json_option(parser)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        print(json.dumps(measure(args.shape, args.context, args.options)))
        return
    environment = describe_environment()
    starts = ["synthetic"]
    model = args.shape
    if args.directory is not None:
        root = args.directory / f"{args.shape.replace(':', '-').replace('=', '')}-{args.stored}"
        if not (root / "config.json").exists():
            write_checkpoint(root, parse_preset(args.shape), args.stored)
        starts, model = ["packed", "mapped"], str(root)
    with tempfile.TemporaryDirectory(dir=args.directory) as cache:
        os.environ["MOEJET_CACHE"] = cache
        for name in starts:
            found = start(model, args.context, args.options)
            with line_writer(args.json) as write:
                head = {"bench": "memory", **environment, "shape": args.shape, "start": name}
                write({**head, "context": args.context, "options": args.options, **found})
            sizes = (found[key]["rss"] / 1e9 for key in ("loaded", "full_context", "full_batch"))
            loaded, context, batch = sizes
            print(
                f"{name:10} plan {found['plan_bytes'] / 1e9:.3f} GB; resident {loaded:.3f} loaded, "
                f"{context:.3f} full context, {batch:.3f} full batch (peak "
                f"{found['full_batch']['peak'] / 1e9:.3f}): {found['fraction']:.1%} of the plan",
                flush=True,
            )


if __name__ == "__main__":
    main()
