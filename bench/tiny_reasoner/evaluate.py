"""Measure the tiny reasoner on held-out problems: one pass, voting, forced checks, best of n.

    python bench/tiny_reasoner/evaluate.py DIR --problems 300 --temperature 0.8

Every figure has a 95 % interval from a bootstrap over problems (Wilson's where each problem has one
0/1 outcome), and is compared with pass@1 (or greedy) on the same problems by paired differences.
Selectors see candidates only, never the right answer. Prints a table and one JSON line.
"""

import argparse
import math
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from model import TinyReasoner
from sampling import generate
from tokenizer import ASSISTANT, BOS, END_THINK, THINK, USER
from tokenizers import Tokenizer
from torch import Tensor

from moejet.cli.environment import describe_environment
from moejet.cli.results import line_writer
from moejet.testing import arithmetic as ar


@dataclass(frozen=True)
class Completion:
    """What a selector may see."""

    text: str
    tokens: int
    mean_logprob: float
    line_scores: tuple[float, ...]  # step head, one per line of the thinking


class Backend(Protocol):
    """Something that completes prompts."""

    def complete(
        self, prompts: Sequence[str], *, temperature: float, waits: int, seed: int
    ) -> list[Completion]:
        """One completion per prompt; the first `waits` ends of thinking are replaced by "Wait"."""
        ...


class TorchBackend:
    """The plain torch model."""

    def __init__(self, path: Path) -> None:
        self.model = TinyReasoner.load(path)
        self.tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))

    def complete(
        self, prompts: Sequence[str], *, temperature: float, waits: int, seed: int
    ) -> list[Completion]:
        """Complete in batches of 300."""
        done: list[Completion] = []
        for begin in range(0, len(prompts), 300):
            texts = [f"{BOS}{USER}{p}{ASSISTANT}{THINK}\n" for p in prompts[begin : begin + 300]]
            samples = generate(
                self.model,
                self.tokenizer,
                [self.tokenizer.encode(t).ids for t in texts],
                temperature=temperature,
                seed=seed + begin,
                waits=waits,
            )
            done += [
                Completion(
                    self.tokenizer.decode(s.ids),
                    len(s.ids),
                    s.logprob / len(s.ids),
                    tuple(s.step_scores),
                )
                for s in samples
            ]
        return done


def chain_scores(completion: Completion) -> list[float]:
    """Step-head scores of the latest forward line of every step."""
    latest: dict[str, float] = {}
    lines = completion.text.partition(END_THINK)[0].split("\n")
    for line, score in zip(lines, completion.line_scores, strict=False):
        if len(line) > 1 and line[0] in ar.LABELS and line[1] == ":":
            latest[line[0]] = score
    return list(latest.values()) or [0.0]


SCORES = {
    "min": lambda c: min(chain_scores(c)),
    "mean": lambda c: sum(chain_scores(c)) / len(chain_scores(c)),
    "product": lambda c: math.prod(chain_scores(c)),
    "logprob": lambda c: c.mean_logprob,
}


def majority(answers: Sequence[int | None], weights: Sequence[float] | None = None) -> int | None:
    """The answer with the most votes (or weight), the first such on ties."""
    votes: Counter[int] = Counter()
    for answer, weight in zip(answers, weights or [1.0] * len(answers), strict=True):
        if answer is not None:
            votes[answer] += weight  # type: ignore[assignment]
    return votes.most_common(1)[0][0] if votes else None


def wilson(p: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval."""
    centre, spread = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return (centre - spread) / (1 + z * z / n), (centre + spread) / (1 + z * z / n)


def bootstrap(values: Tensor, resamples: int = 10_000) -> tuple[float, float]:
    """Percentile interval of the mean of one value per problem."""
    generator = torch.Generator().manual_seed(0)
    picks = torch.randint(len(values), (resamples, len(values)), generator=generator)
    means = values[picks].mean(1)
    return float(means.quantile(0.025)), float(means.quantile(0.975))


def measure(
    backend: Backend, args: argparse.Namespace
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """One value in 0..1 per problem for every strategy, and mean tokens per sample."""
    posed = ar.held_out_problems(args.problems, seed=args.seed)
    truth = [p.answer for p, _ in posed]
    prompts = [text for _, text in posed]
    values: dict[str, Tensor] = {}
    tokens: dict[str, float] = {}

    def run(name: str, n: int, temperature: float, waits: int) -> list[list[Completion]]:
        flat = backend.complete(
            [p for p in prompts for _ in range(n)],
            temperature=temperature,
            waits=waits,
            seed=args.seed,
        )
        tokens[name] = sum(c.tokens for c in flat) / len(flat)
        groups = [flat[i : i + n] for i in range(0, len(flat), n)]
        right = [
            [ar.extract_answer(c.text) == t for c in g] for g, t in zip(groups, truth, strict=True)
        ]
        values[name] = torch.tensor(right).float().mean(1)
        return groups

    for waits in range(args.checks + 1):
        run(f"greedy, {waits} checks", 1, 0.0, waits)
    groups = run("pass@1", args.samples, args.temperature, 0)
    answers = [[ar.extract_answer(c.text) for c in g] for g in groups]
    n = args.samples

    def select(name: str, chosen: Sequence[int | None]) -> None:
        values[name] = torch.tensor([c == t for c, t in zip(chosen, truth, strict=True)]).float()
        tokens[name] = tokens["pass@1"] * n

    select(f"majority@{n}", [majority(a) for a in answers])
    for score_name, score in SCORES.items():
        best = [max(range(n), key=lambda i, g=g: score(g[i])) for g in groups]  # type: ignore[misc]
        select(f"best-of-{n} by {score_name}", [a[i] for a, i in zip(answers, best, strict=True)])
    weights = [[SCORES["product"](c) for c in g] for g in groups]
    select(
        f"weighted majority@{n}", [majority(a, w) for a, w in zip(answers, weights, strict=True)]
    )
    values[f"pass@{n} (oracle)"] = torch.tensor(
        [t in a for a, t in zip(answers, truth, strict=True)]
    ).float()
    for waits in range(1, args.checks + 1):
        run(f"pass@1, {waits} checks", args.check_samples, args.temperature, waits)
    return values, tokens


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--check-samples", type=int, default=4)
    parser.add_argument("--checks", type=int, default=3)
    parser.add_argument("--temperature", type=float, default=0.8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    started = time.monotonic()
    values, tokens = measure(TorchBackend(args.model), args)
    result: dict[str, object] = {"problems": args.problems, "temperature": args.temperature}
    print(
        f"{'strategy':28}{'accuracy':>9}  {'95 % interval':16}{'difference':>11}  {'95 % interval':18}tokens"
    )
    for name, v in values.items():
        base = values["greedy, 0 checks" if name.startswith("greedy") else "pass@1"]
        mean = float(v.mean())
        single = bool(((v == 0) | (v == 1)).all())
        low, high = wilson(mean, len(v)) if single else bootstrap(v)
        diff, (d_low, d_high) = float((v - base).mean()), bootstrap(v - base)
        used = tokens.get(name, math.nan)
        print(
            f"{name:28}{mean:9.3f}  [{low:.3f}, {high:.3f}]  {diff:+9.3f}  "
            f"[{d_low:+.3f}, {d_high:+.3f}]  {used:.0f}"
        )
        result[name] = [round(x, 4) for x in (mean, low, high, diff, d_low, d_high)]
    with line_writer("-") as write:
        wall_s = round(time.monotonic() - started)
        write({"bench": "tiny_evaluate", **describe_environment(), **result, "wall_s": wall_s})


if __name__ == "__main__":
    main()
