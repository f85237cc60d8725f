"""Scorers say how good candidates, or the steps of a search, seem. They see candidates only, never a reference answer.

`Scorer` scores whole candidates, after the fact; `StepScorer` scores branches that have come to the end of a step. Most
here are both.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from moejet.branch import Branch
from moejet.llm import LLM
from moejet.policy import TokenPolicy
from moejet.reasoning.result import Candidate, ScoredStep
from moejet.reasoning.task import Run, Task
from moejet.request import SamplingParams
from moejet.statistics import TokenScores
from moejet.validation import checked

Aggregate = Literal["last", "min", "mean", "product"]


@runtime_checkable
class Scorer(Protocol):
    def score(self, task: Task, candidates: Sequence[Candidate]) -> Run[list[float]]:
        """Higher is better, in the order of the candidates."""


@runtime_checkable
class StepScorer(Protocol):
    def score_steps(self, task: Task, branches: Sequence[Branch]) -> Run[list[float]]:
        """Higher is better, of all that each branch has so far."""


def aggregate(scores: Sequence[float], how: Aggregate) -> float:
    """One score of several steps; of none 0. Verifiers are commonly read by their last or their worst step."""
    if not scores:
        return 0.0
    match how:
        case "last":
            return scores[-1]
        case "min":
            return min(scores)
        case "mean":
            return sum(scores) / len(scores)
        case "product":
            return math.prod(scores)


@dataclass(frozen=True, slots=True)
@checked
class Confidence:
    """The mean of one of the values of `moejet.statistics` over the tokens that the model chose.

    logprob: mean log-probability · self_certainty: arXiv 2502.18581 · confidence: of DeepConf, arXiv 2508.15260 ·
    gap: between the two likeliest tokens · entropy counts negatively, since less is surer · top5_share: of Marco-o1,
    arXiv 2411.14405
    """

    value: Literal["logprob", "self_certainty", "confidence", "gap", "entropy", "top5_share"] = (
        "logprob"
    )

    def score(self, task: Task, candidates: Sequence[Candidate]) -> Run[list[float]]:
        return [self._of(candidate.mean) for candidate in candidates]
        yield  # a generator like the others

    def score_steps(self, task: Task, branches: Sequence[Branch]) -> Run[list[float]]:
        return [self._of(branch.statistics.mean) for branch in branches]
        yield

    def _of(self, mean: TokenScores) -> float:
        value: float = getattr(mean, self.value)
        return -value if self.value == "entropy" else value


@dataclass(frozen=True, slots=True)
@checked
class StepHead:
    """The scalar head of the model itself (`moejet.step_head`), which decoding computes without another pass.

    how: see `aggregate` · pattern: a regular expression; only lines that begin with a match are steps, and of those
    that begin with the same one only the latest counts, since a repaired step replaces the first attempt. None: the
    model's own, and all lines if it has none
    Raises ValueError if the model has no step head.
    """

    how: Aggregate = "product"
    pattern: str | None = None

    def score(self, task: Task, candidates: Sequence[Candidate]) -> Run[list[float]]:
        pattern = self._pattern_of(task.llm)
        return [self.of_steps(candidate.steps, pattern) for candidate in candidates]
        yield

    def score_steps(self, task: Task, branches: Sequence[Branch]) -> Run[list[float]]:
        """Computes what has not been, so that the last step counts."""
        pattern = self._pattern_of(task.llm)
        late = [b for b in branches if b.token_ids and len(b.token_ids) - 1 not in b.step_scores]
        if late:
            yield from task.advance([b for b in late if not b.is_finished], max_tokens=0)
        return [self.of_steps(task.candidate(branch).steps, pattern) for branch in branches]

    def of_steps(self, steps: Sequence[ScoredStep], pattern: str | None) -> float:
        if pattern is None:
            return aggregate([step.score for step in steps], self.how)
        latest: dict[str, float] = {}
        for step in steps:
            if match := re.match(pattern, step.text):
                latest.pop(match.group(), None)
                latest[match.group()] = step.score
        return aggregate(list(latest.values()), self.how)

    def _pattern_of(self, llm: LLM) -> str | None:
        head = llm.engine.step_head
        if head is None:
            raise ValueError(
                f"{llm.config.model} has no step head: use another scorer, or add "
                "step_head.safetensors to its directory"
            )
        return head.pattern if self.pattern is None else self.pattern


@dataclass(frozen=True, slots=True)
@checked
class RewardModel:
    """A second model that reads problem and steps and says how likely each is right (Math-Shepherd, arXiv 2312.08935).

    After each step its prompt has `separator`, and the probability of `good` against `bad` as the next token is the
    step's score. template: how problem and steps are put, with {problem} and {steps}
    """

    model: LLM
    good: str = "+"
    bad: str = "-"
    separator: str = " ки"
    template: str = "{problem} {steps}"
    delimiter: str = "\n"
    how: Aggregate = "last"

    def score(self, task: Task, candidates: Sequence[Candidate]) -> Run[list[float]]:
        texts = [candidate.text for candidate in candidates]
        scores = yield from self._score(task, texts)
        return scores

    def score_steps(self, task: Task, branches: Sequence[Branch]) -> Run[list[float]]:
        scores = yield from self._score(task, [branch.text for branch in branches])
        return scores

    def _score(self, task: Task, texts: Sequence[str]) -> Run[list[float]]:
        all_steps = [
            [step for step in text.split(self.delimiter) if step.strip()] for text in texts
        ]
        prompts = [
            self.template.format(
                problem=task.prompt,
                steps=self.delimiter.join(f"{s}{self.separator}" for s in steps[: i + 1]),
            )
            for steps in all_steps
            for i in self._scored(len(steps))
        ]
        shares = yield from next_token_shares(task, self.model, prompts, self.good, self.bad)
        scores, begin = [], 0
        for steps in all_steps:
            count = len(self._scored(len(steps)))
            scores.append(aggregate(shares[begin : begin + count], self.how))
            begin += count
        return scores

    def _scored(self, num_steps: int) -> range:
        return range(max(0, num_steps - 1), num_steps) if self.how == "last" else range(num_steps)


@dataclass(frozen=True, slots=True)
@checked
class Verifier:
    """A model that is asked whether an answer is right: probability of `yes` against `no` (GenRM, arXiv 2408.15240).

    model: None for the one that answers · question: with {problem}, {reasoning} and {content}
    """

    model: LLM | None = None
    question: str = (
        "Problem:\n{problem}\n\nProposed solution:\n{reasoning}\n{content}\n\n"
        "Is the solution right? Answer with Yes or No.\n"
    )
    yes: str = "Yes"
    no: str = "No"

    def score(self, task: Task, candidates: Sequence[Candidate]) -> Run[list[float]]:
        prompts = [
            self.question.format(
                problem=task.prompt, reasoning=c.reasoning or "", content=c.content
            )
            for c in candidates
        ]
        scores = yield from next_token_shares(
            task, self.model or task.llm, prompts, self.yes, self.no
        )
        return scores

    def score_steps(self, task: Task, branches: Sequence[Branch]) -> Run[list[float]]:
        scores = yield from self.score(task, [task.candidate(branch) for branch in branches])
        return scores


@dataclass(frozen=True, slots=True)
@checked
class Check:
    """1 where a function of the candidate says yes, else 0: a unit test, a program that is run, a rule.

    It is called on another thread, so it may take its time.
    """

    function: Callable[[Candidate], bool | float]

    def score(self, task: Task, candidates: Sequence[Candidate]) -> Run[list[float]]:
        task.usage.model_evaluations += len(candidates)
        scores = yield from task.background(lambda: [float(self.function(c)) for c in candidates])
        return scores

    def score_steps(self, task: Task, branches: Sequence[Branch]) -> Run[list[float]]:
        scores = yield from self.score(task, [task.candidate(branch) for branch in branches])
        return scores


def next_token_shares(
    task: Task, model: LLM, prompts: Sequence[str], good: str, bad: str
) -> Run[list[float]]:
    """P(good) / (P(good) + P(bad)) as the first token after each prompt, all computed in common steps."""
    tokenizer = model.tokenizer
    first = [tokenizer.encode(text, add_special_tokens=False)[0] for text in (good, bad)]
    if first[0] == first[1]:
        raise ValueError(f"{good!r} and {bad!r} begin with the same token: choose other words")
    task.usage.model_evaluations += len(prompts)
    runs = [_share_of(task, model, prompt, first) for prompt in prompts]
    shares = yield from task.gather(runs)
    return [0.5 if share is None else share for share in shares]


def _share_of(task: Task, model: LLM, prompt: str, token_ids: Sequence[int]) -> Run[float]:
    """The share of token_ids[0] among the two, by a policy that looks at the logits and keeps nothing.

    Where the budget allows no look it is 0.5: nothing is known.
    """
    share = [0.5]

    class Look(TokenPolicy):
        needs_logits = True

        def on_logits(self, state: object, row: object) -> None:
            good, bad = (float(row[i]) for i in token_ids)  # type: ignore[index]
            share[:] = [1 / (1 + math.exp(min(700.0, bad - good)))]

    asked = yield from task.on(prompt, llm=model)
    [branch] = yield from asked.open()
    params = SamplingParams(temperature=0.0, max_tokens=1, policy=Look)
    yield from asked.advance([branch], params=params)
    asked.close()
    return share[0]
