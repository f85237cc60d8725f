"""What n samples of one prompt cost when they share their steps, over a single one.

    python bench/parallel_samples.py [--shape deepseek-v2-lite[:layers=N]] [-n 16] [--tokens 64] [--json FILE]

A shape with random weights samples one prompt, once alone and once n times in common steps, in turns. Prints a JSON
line: time, expert bytes and distinct experts of both and their ratios, beside what the formula of
`moejet.reasoning.cost` predicts. Random weights route almost uniformly and independently, as the formula assumes; a
trained model's samples of one prompt have more in common, so they read less.

The prompt's step is not counted. Memory: 9 GB for the whole shape in int4; layers=3 takes 2 GB.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass
from typing import Any

from moejet import LLM, SamplingParams
from moejet.cli.environment import describe_environment
from moejet.cli.results import add_json_option, line_writer
from moejet.reasoning.cost import expected_distinct_experts, relative_cost


@dataclass(frozen=True)
class Turn:
    """One run: seconds, steps, and experts read by all layers."""

    seconds: float
    steps: int
    positions: int
    expert_loads: int
    expert_bytes: int


def take_turn(llm: LLM, prompt: list[int], samples: int, num_tokens: int, seed: int) -> Turn:
    params = SamplingParams(
        temperature=1.0, seed=seed, n=samples, max_tokens=num_tokens + 1, ignore_eos=True
    )
    with llm.exclusive() as engine:
        engine.add_request(prompt, params)
        engine.step()
        before, start = engine.counters, time.perf_counter()
        while engine.has_work:
            engine.step()
        seconds, after = time.perf_counter() - start, engine.counters
    return Turn(
        seconds,
        after.steps - before.steps,
        after.decode_tokens + after.prefill_tokens - before.decode_tokens - before.prefill_tokens,
        after.expert_loads - before.expert_loads,
        after.expert_bytes - before.expert_bytes,
    )


def summary(llm: LLM, samples: int, turns: list[Turn]) -> dict[str, Any]:
    """Medians of the turns; distinct experts of a layer and step, counted and expected."""
    model = llm.model_config
    layer_steps = sum(turn.steps for turn in turns) * model.num_moe_layers
    return {
        "samples": samples,
        "seconds": statistics.median(turn.seconds for turn in turns),
        "seconds_all": [round(turn.seconds, 3) for turn in turns],
        "steps": turns[0].steps,
        "positions": turns[0].positions,
        "expert_bytes": statistics.mean(turn.expert_bytes for turn in turns),
        "distinct_experts": sum(turn.expert_loads for turn in turns) / layer_steps,
        "distinct_expected": expected_distinct_experts(
            model.num_experts, model.num_experts_per_tok, samples
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="deepseek-v2-lite")
    parser.add_argument("--format", default="int4_g32")
    parser.add_argument("-n", "--samples", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=64, metavar="TOKENS")
    parser.add_argument("--tokens", type=int, default=64, help="of each sample")
    parser.add_argument("--repeat", type=int, default=3)
    add_json_option(parser, "-")
    args = parser.parse_args()
    llm = LLM.synthetic(
        args.shape,
        expert_format=args.format,
        max_context=args.prompt + args.tokens + 2,
        prefix_caching=False,
    )
    turns: dict[int, list[Turn]] = {1: [], args.samples: []}
    rng = random.Random(0)
    prompt = [rng.randrange(1000) for _ in range(args.prompt)]
    with llm:
        take_turn(llm, prompt, args.samples, 4, 0)  # first calls allocate
        for seed in range(1, args.repeat + 1):
            for samples in turns:
                turns[samples].append(take_turn(llm, prompt, samples, args.tokens, seed))
        one, many = (summary(llm, samples, taken) for samples, taken in turns.items())
        threads = llm.engine.runner.pool.num_threads
    k = llm.model_config.num_experts_per_tok
    row = {
        "bench": "parallel_samples",
        **describe_environment(),
        "threads": threads,
        "shape": args.shape,
        "format": args.format,
        "prompt": args.prompt,
        "tokens": args.tokens,
        "routing": "random weights: nearly uniform",
        "one": one,
        "many": many,
        "time_ratio": many["seconds"] / one["seconds"],
        "bytes_ratio": many["expert_bytes"] / one["expert_bytes"],
        "bytes_ratio_expected": many["distinct_expected"] / k,
        "relative_cost": many["seconds"] / one["seconds"] / args.samples,
        "relative_cost_expected": relative_cost(many["distinct_expected"], k, args.samples),
    }
    with line_writer(args.json) as write:
        write(row)


if __name__ == "__main__":
    main()
