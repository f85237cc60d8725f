"""What strategies gain on the tiny reasoner: accuracy, tokens and experts read, on held-out problems.

    python bench/reasoning.py --problems 300 --json bench/results/reasoning.jsonl

Every figure has a 95 % interval, and is compared with one pass on the same problems by McNemar's test and a paired
bootstrap. The votes share their samples: majority of 4 sees the first four of the sixteen. Nothing that selects sees
the right answer.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from moejet import LLM, SamplingParams
from moejet.cli.environment import describe_environment
from moejet.cli.results import add_json_option, line_writer
from moejet.policy import ForceContinuation, ThinkingBudget
from moejet.reasoning import (
    MCTS,
    Best,
    BetaStop,
    Candidate,
    Confidence,
    DeepConf,
    Majority,
    NextStep,
    ParticleFilter,
    Result,
    Run,
    Sample,
    Scored,
    Single,
    StepBeam,
    StepHead,
    Strategy,
    Task,
    VoteShare,
    Weighted,
    solve_many,
)
from moejet.reasoning.answers import AnswerKey, LastNumber, NumericEqual
from moejet.reasoning.metrics import bootstrap_interval, mcnemar, paired_bootstrap
from moejet.reasoning.select import Select
from moejet.testing.arithmetic import held_out_problems

HEAD = StepHead()
# As the best of many scores is mostly luck below the head's calibration error, about 0.01 (its README).
SURE = Best(StepHead("mean"), margin=0.01)
KEY = AnswerKey(extract=LastNumber(), equal=NumericEqual())


@dataclass(frozen=True)
class Chosen:
    """Selects among the first `count` of candidates that are there already, by the number of the problem."""

    candidates: dict[tuple[int, ...], tuple[Candidate, ...]]
    select: Select
    count: int

    def run(self, task: Task) -> Run[Result]:
        mine = self.candidates[task.prompt_token_ids][: self.count]
        result = yield from self.select.choose(task, mine)
        return result


@dataclass
class Figures:
    """Of one strategy: right or wrong for each problem, tokens of each."""

    name: str
    right: list[float]
    tokens: list[float]
    expert_loads: float
    seconds: float


class Bench:
    def __init__(self, llm: LLM, args: argparse.Namespace):
        self.llm, self.args = llm, args
        posed = held_out_problems(
            args.problems, seed=args.seed, min_steps=args.min_steps, max_steps=args.max_steps
        )
        self.truth = [str(problem.answer) for problem, _ in posed]
        self.prompts = [[{"role": "user", "content": text}] for _, text in posed]
        self.params = SamplingParams(temperature=args.temperature, max_tokens=args.max_tokens)
        self.figures: list[Figures] = []

    def measure(
        self, name: str, strategy: Strategy, params: SamplingParams | None = None
    ) -> list[Result]:
        start = time.monotonic()
        results = solve_many(
            self.llm,
            self.prompts,
            strategy,
            params=params or self.params,
            answers=KEY,
            concurrency=self.args.concurrency,
        )
        self.add(
            name,
            results,
            [r.usage.generated_tokens for r in results],
            sum(r.usage.expert_loads for r in results),
            time.monotonic() - start,
        )
        return results

    def add(
        self,
        name: str,
        results: Sequence[Result],
        tokens: Sequence[float],
        loads: float,
        seconds: float,
    ) -> None:
        right = [
            float(result.answer is not None and KEY.equal(result.answer, truth))
            for result, truth in zip(results, self.truth, strict=True)
        ]
        self.figures.append(Figures(name, right, list(tokens), loads, seconds))
        print(
            f"{name:34} {np.mean(right):.3f}  {np.mean(tokens):7.0f} tokens  {seconds:6.1f} s",
            flush=True,
        )


def forced(times: int, greedy: bool) -> Callable[[], ForceContinuation]:
    return lambda: ForceContinuation(times, greedy=greedy)


def thinking_lengths(results: Sequence[Result]) -> list[int]:
    return [result.candidate.num_thinking_tokens for result in results]


def run(bench: Bench) -> None:
    params, greedy = bench.params, replace(bench.params, temperature=0.0)
    only = bench.args.only

    def wanted(name: str) -> bool:
        return not only or any(part in name for part in only)

    one = bench.measure("one pass", Single())
    if wanted("greedy"):
        bench.measure("one pass, greedy", Single(), greedy)
    mean_length = float(np.mean(thinking_lengths(one)))
    for share in (0.25, 0.5):
        if wanted("cap"):
            cap = round(share * mean_length)
            capped = replace(params, policy=lambda cap=cap: ThinkingBudget(cap))
            bench.measure(f"thinking capped at {share:.0%} ({cap})", Single(), capped)
    for times in (1, 2):
        if wanted("check"):
            for greedy in (False, True):
                name = f"{times} forced check{'s' * (times > 1)}{', read greedily' * greedy}"
                bench.measure(name, Single(), replace(params, policy=forced(times, greedy)))
    if wanted("vote"):
        votes(bench)
    if wanted("adaptive"):
        adaptive = Sample(16, stop=BetaStop(0.95), wave=4)
        bench.measure("adaptive stopping, at most 16", adaptive)
    if wanted("deepconf"):
        bench.measure("DeepConf, 8 + 8", DeepConf(warmup=8, total=16, window=16, wave=4))
    for name, strategy in searches().items():
        if wanted(name):
            bench.measure(name, strategy)


def votes(bench: Bench) -> None:
    """Sixteen samples of each problem, and everything that can be made of them."""
    by_head: list[tuple[str, Select, int]] = [
        ("weighted majority of 16, step head", Weighted(HEAD), 16),
        ("best of 16, step head", Best(HEAD), 16),
        ("best of 16, step head, near ones vote", SURE, 16),
    ]
    others: list[tuple[str, Select, int]] = [
        ("majority of 4", Majority(), 4),
        ("majority of 8", Majority(), 8),
        ("best of 16, mean log-probability", Best(Confidence()), 16),
        ("best of 16, self-certainty", Best(Confidence("self_certainty")), 16),
    ]
    select_among(bench, "", bench.params, [*others, *by_head])
    checked = replace(bench.params, policy=forced(1, True))
    select_among(bench, ", each with a check", checked, by_head)


def select_among(
    bench: Bench,
    what: str,
    params: SamplingParams,
    selectors: Sequence[tuple[str, Select, int]],
) -> None:
    """Samples 16 times, and lets each selector choose among the first of them."""
    start = time.monotonic()
    sampled = bench.measure(f"majority of 16{what}", Sample(16), params)
    seconds = time.monotonic() - start
    ids = [tuple(bench.llm.read_prompt(prompt)[1]) for prompt in bench.prompts]
    pools = {key: result.candidates for key, result in zip(ids, sampled, strict=True)}
    for name, select, count in selectors:
        results = solve_many(
            bench.llm,
            bench.prompts,
            Chosen(pools, select, count),
            params=params,
            answers=KEY,
        )
        tokens = [sum(c.num_tokens for c in pools[key][:count]) for key in ids]
        bench.add(f"{name}{what}", results, tokens, 0.0, seconds * count / 16)
    at_least_one = [
        float(any(KEY.equal(c.answer, truth) for c in pools[key] if c.answer is not None))
        for key, truth in zip(ids, bench.truth, strict=True)
    ]
    print(f"{'(pass@16, no selector knows)':34} {np.mean(at_least_one):.3f}")


def searches() -> dict[str, Strategy]:
    """By mean log-probability, and by the step head."""
    found: dict[str, Strategy] = {}
    scorers = {"mean log-probability": Confidence(), "step head": HEAD}
    for by, scorer in scorers.items():
        found[f"beam, 4 of 4, {by}"] = StepBeam(4, 4, scorer)
        found[f"beam, 16 of 4, {by}"] = StepBeam(16, 4, scorer)
        found[f"DVTS, 16 of 4, {by}"] = StepBeam(16, 4, scorer, independent=True)
        scale: Literal["log", "probability"] = "probability" if scorer is HEAD else "log"
        found[f"particles, 16, {by}"] = ParticleFilter(16, scorer, scale=scale)
    found["MCTS, 16 rollouts, vote share"] = MCTS((NextStep(3),), VoteShare(), 16)
    found["MCTS, 16 rollouts, log-probability"] = MCTS((NextStep(3),), Scored(Confidence()), 16)
    return found


def report(bench: Bench) -> list[dict[str, Any]]:
    base = bench.figures[0]
    rows = []
    for figures in bench.figures:
        accuracy = bootstrap_interval(figures.right)
        row: dict[str, Any] = {
            "strategy": figures.name,
            "accuracy": float(np.mean(figures.right)),
            "interval": [accuracy.low, accuracy.high],
            "tokens": float(np.mean(figures.tokens)),
            "expert_loads": figures.expert_loads / len(figures.right),
            "seconds": figures.seconds,
        }
        if figures is not base:
            paired = paired_bootstrap(base.right, figures.right)
            row |= {
                "difference": paired.difference,
                "difference_interval": [paired.interval.low, paired.interval.high],
                "mcnemar_p": mcnemar(base.right, figures.right),
                "token_ratio": float(np.mean(figures.tokens) / np.mean(base.tokens)),
            }
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="tiny-reasoner")
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--min-steps", type=int, default=5)
    parser.add_argument("--max-steps", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--only", nargs="*", metavar="PART", help="strategies whose name holds it")
    add_json_option(parser)
    args = parser.parse_args()
    environment = describe_environment()
    settings = {k: v for k, v in vars(args).items() if k not in ("json", "only")}
    with (
        LLM(args.model, num_threads=1, max_num_requests=128) as llm,
        line_writer(args.json) as write,
    ):
        bench = Bench(llm, args)
        try:
            run(bench)
        finally:  # of half an hour's strategies those that ran are worth keeping
            if bench.figures:
                rows = report(bench)
                write({"bench": "reasoning", **environment, "threads": 1, **settings, "rows": rows})


if __name__ == "__main__":
    main()
