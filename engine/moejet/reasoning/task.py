"""A prompt that a strategy is answering: what it may do, within its budget.

A strategy is a generator. What takes the engine's time it yields, and gets the outcome back; so one engine computes
many strategies, and many prompts, in the same steps, and whoever drives it (`moejet.reasoning.driver`) decides when.
Methods below that return a `Run` are generators as well, to be used with `yield from`:

>>> def run(self, task):
...     branches = yield from task.open(4)
...     yield from task.complete(branches)
...     candidates = [task.candidate(branch) for branch in branches]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, TypeVar, cast

from moejet.advance import Advance
from moejet.branch import Branch, Segment, Until
from moejet.llm import LLM
from moejet.policy import TokenPolicy
from moejet.prompt_reader import Message
from moejet.reasoning.budget import Budget, Deadline
from moejet.reasoning.result import Background, Candidate, Node, Progress, Result, ScoredStep, Usage
from moejet.request import SamplingParams
from moejet.sampler import derive_seed
from moejet.tokenizer import Tokenizer

T = TypeVar("T")
Run = Generator["Advance | Background | Gather | Progress", Any, T]


class Answers(Protocol):
    """How answers are found in a text and compared."""

    def extract(self, content: str) -> str | None:
        """The answer that a finished text gives, None if it gives none."""

    def group(self, answers: Sequence[str]) -> list[int]:
        """For each answer the index of the first one that is equal to it."""


class KnownAnswers:
    """Answers that remembers which ones are equal: comparing may take a proof, and an engine waits for nobody.

    `Task.classify` finds it out in the background; what it has seen is grouped at once.
    """

    def __init__(self, answers: Answers):
        self.answers = answers
        self.classes: dict[
            str, str
        ] = {}  # each answer and the one that stands for all that equal it

    def extract(self, content: str) -> str | None:
        return self.answers.extract(content)

    def group(self, answers: Sequence[str]) -> list[int]:
        if not all(answer in self.classes for answer in answers):
            return self.answers.group(answers)
        classes = [self.classes[answer] for answer in answers]
        return [classes.index(name) for name in classes]


class Strategy(Protocol):
    """A way to come to an answer. Implementations are frozen dataclasses without state of their own."""

    def run(self, task: Task) -> Run[Result]: ...


@dataclass(frozen=True, slots=True)
class Gather:
    """Runs to be driven at the same time, `limit` of them at once; what they return comes back in their order.

    stop: asked about the results of the first run, of the first two and so on, each time as soon as all of these have
    ended; once it says yes the others are ended and are None
    """

    runs: Sequence[Run[Any]]
    limit: int
    stop: Callable[[Sequence[Any]], bool] | None = None


@dataclass(slots=True)
class Ledger:
    """What the tasks of one run have spent together.

    held: tokens that branches under way may still take · live: runs that go on at the same time · holding: those of
    them that hold tokens · has_cut: the budget has ended a branch · cache_salt: of all their branches
    """

    budget: Budget
    seed: int
    cache_salt: str | None = None
    usage: Usage = field(default_factory=Usage)
    start_s: float = field(default_factory=time.monotonic)
    held: int = 0
    live: int = 1
    holding: int = 0
    has_cut: bool = False
    generating: set[int] = field(default_factory=set)  # numbers of branches

    @property
    def num_left(self) -> int | None:
        """Tokens that nobody has spent or holds."""
        total = self.budget.total_tokens
        return None if total is None else total - self.usage.generated_tokens - self.held

    @property
    def deadline_s(self) -> float | None:
        return None if self.budget.wall_s is None else self.start_s + self.budget.wall_s


class Task:
    """One prompt for one model. `on(...)` makes one for another prompt or model that shares the budget.

    params: how candidates are sampled, unless a strategy says otherwise · answers: finds and compares answers ·
    messages: the conversation that the prompt is made of, None if it was given as a text or as token ids
    """

    def __init__(
        self,
        llm: LLM,
        prompt_token_ids: Sequence[int],
        prompt: str | None,
        *,
        params: SamplingParams,
        answers: Answers,
        ledger: Ledger,
        messages: Sequence[Message] | None = None,
        seed: int | None = None,
    ):
        self.llm = llm
        self.messages = messages
        self.prompt_token_ids = tuple(prompt_token_ids)
        self.prompt = prompt
        self.params = params
        self.answers = answers if isinstance(answers, KnownAnswers) else KnownAnswers(answers)
        self.ledger = ledger
        self.seed = ledger.seed if seed is None else seed
        self._num_seeds = 0
        self._root: Branch | None = None
        self._opened: dict[Branch, None] = {}
        self._children: list[Task] = []

    @property
    def tokenizer(self) -> Tokenizer:
        return self.llm.tokenizer

    @property
    def usage(self) -> Usage:
        return self.ledger.usage

    @property
    def is_exhausted(self) -> bool:
        """Whether the budget allows no further token."""
        left, deadline = self.ledger.num_left, self.ledger.deadline_s
        return (left is not None and left <= 0) or (
            deadline is not None and time.monotonic() >= deadline
        )

    def on(
        self,
        prompt: str | Sequence[int] | Sequence[Message] | None = None,
        *,
        llm: LLM | None = None,
        params: SamplingParams | None = None,
        answers: Answers | None = None,
    ) -> Task:
        """A task with another prompt (text, token ids, or messages), model, or sampling; ends with this one.

        Another model reads the messages through its own chat template; without messages, the text as it stands.
        """
        llm = llm or self.llm
        messages = self.messages if prompt is None else messages_of(prompt)
        if prompt is None and llm is self.llm:
            text, token_ids = self.prompt, self.prompt_token_ids
        else:
            prompt = prompt or messages or self.prompt
            if prompt is None:
                raise ValueError(
                    "another model needs the prompt as messages or as a text, not token ids"
                )
            text, ids = llm.read_prompt(prompt)
            token_ids = tuple(ids)
        child = Task(
            llm,
            token_ids,
            text,
            params=params or self.params,
            answers=answers or self.answers,
            ledger=self.ledger,
            messages=messages,
            seed=self.next_seed(),
        )
        self._children.append(child)
        return child

    def part(self, number: int) -> Task:
        """The same task for one of several runs that go on at the same time.

        Its seeds depend on its number alone, and so not on which run draws first.
        """
        part = copy(self)
        part.seed, part._num_seeds = derive_seed(self.seed, 2 * number + 2), 0
        return part

    def next_seed(self) -> int:
        self._num_seeds += 1
        return derive_seed(self.seed, 2 * self._num_seeds - 1)  # those between are for parts

    def open(self, n: int = 1) -> Run[list[Branch]]:
        """n branches that hold the prompt, which is computed once."""
        if self._root is None or not self._root.is_computed:  # the second if its cache was needed
            salt = self.ledger.cache_salt
            root = self._add(Branch(self.llm, self.prompt_token_ids, cache_salt=salt))
            yield Advance(self.llm, [root], max_tokens=0, params=SamplingParams())
            if self.usage.prompt_tokens == 0:
                self.usage.prompt_tokens = len(self.prompt_token_ids)
            else:
                self.usage.appended_tokens += len(self.prompt_token_ids)
            if self._root is not None:
                self.release([self._root])
            self._root = root
        return [self._add(fork) for fork in self._root.fork(n)]

    def fork(self, branch: Branch, n: int = 1) -> Run[list[Branch]]:
        """n copies of a branch, which shares its cache with them."""
        if not branch.is_computed:
            yield Advance(branch.llm, [branch], max_tokens=0, params=SamplingParams())
        return [self._add(fork) for fork in branch.fork(n)]

    def append(self, branch: Branch, text: str | Sequence[int]) -> None:
        """Adds a text or token ids, which are computed when the branch goes on; they count as appended tokens."""
        before = len(branch.token_ids)
        branch.append(text)
        self.usage.appended_tokens += len(branch.token_ids) - before

    def advance(
        self,
        branches: Sequence[Branch],
        *,
        until: Until = None,
        max_tokens: int | Sequence[int] | None = None,
        params: SamplingParams | None = None,
        seeds: Sequence[int] | None = None,
    ) -> Run[list[Segment]]:
        """As `LLM.advance`, within the budget. What it cut off ends with "length" and stop_reason "budget".

        Branches go on at the same time, as many as the budget allows. max_tokens: one for all, or of each · seeds: of
        each branch, new ones unless given; a branch that advances in pieces with the same seed becomes what it would
        have become in one go.
        """
        params = self._limited(params or self.params)
        limit = params.max_tokens if max_tokens is None else max_tokens
        limits = list(limit) if isinstance(limit, Sequence) else [limit] * len(branches)
        marks = [branch.mark for branch in branches]
        seeds = [self.next_seed() for _ in branches] if seeds is None else list(seeds)
        ends: dict[int, tuple[Any, Any]] = {
            i: ("stop", None) for i, branch in enumerate(branches) if branch.is_finished
        }
        waiting = [i for i in range(len(branches)) if i not in ends]
        while waiting:
            if self.is_exhausted:
                ends |= dict.fromkeys(waiting, ("length", "budget"))
                self.ledger.has_cut = True
                break
            group, waiting = waiting[: self._width], waiting[self._width :]
            wanted = [
                None if (most := limits[i]) is None else most - _gained(branches[i], marks[i])
                for i in group
            ]
            segments, shares = yield from self._advance(
                [branches[i] for i in group],
                wanted,
                until=until,
                params=params,
                since=[marks[i] for i in group],
                seeds=[seeds[i] for i in group],
            )
            for i, segment, share, own in zip(group, segments, shares, wanted, strict=True):
                is_cut = segment.finish_reason == "length" and share != own
                if is_cut and share:  # others may have left something
                    waiting.append(i)
                else:
                    reason = "budget" if is_cut else segment.stop_reason
                    self.ledger.has_cut |= is_cut or reason == "wall_s"
                    ends[i] = (segment.finish_reason, reason)
        return [
            Segment(branch.text[begin:], branch.token_ids[first:], *ends[i])
            for i, (branch, (first, begin)) in enumerate(zip(branches, marks, strict=True))
        ]

    def complete(
        self, branches: Sequence[Branch], *, params: SamplingParams | None = None
    ) -> Run[list[Segment]]:
        """Lets branches go on to their end."""
        segments = yield from self.advance(branches, params=params)
        return segments

    def gather(
        self,
        runs: Sequence[Run[T]],
        *,
        limit: int | None = None,
        stop: Callable[[Sequence[T | None]], bool] | None = None,
    ) -> Run[list[T | None]]:
        """Drives runs at the same time, see `Gather`."""
        if limit is not None and limit < 1:
            raise ValueError(f"limit={limit!r} must be at least 1")
        if not runs:
            return []
        limit = min(len(runs), self._width, sys.maxsize if limit is None else limit)
        self.ledger.live += limit - 1
        try:
            results: list[T | None] = yield Gather(runs, limit, stop)
        finally:
            self.ledger.live -= limit - 1
        return results

    def background(self, function: Callable[[], T]) -> Run[T]:
        """The function's result; other work goes on meanwhile."""
        result: T = yield Background(function)
        return result

    def classify(self, answers: Iterable[str | None]) -> Run[None]:
        """Finds out, in the background, which answers are equal, so that `self.answers.group` need not."""
        known = self.answers
        for answer in answers:
            compared: list[str] = []
            while answer is not None and answer not in known.classes:
                names = [
                    name for name in dict.fromkeys(known.classes.values()) if name not in compared
                ]
                if not names:  # as long as none has come meanwhile
                    known.classes[answer] = answer
                    break
                given = [*names, answer]
                groups = yield from self.background(partial(known.answers.group, given))
                compared += names
                if groups[-1] < len(names):
                    known.classes[answer] = names[groups[-1]]

    def tell(self, kind: Any, message: str, *, node: Node | None = None, **data: Any) -> Run[None]:
        """Reports progress to whoever watches."""
        yield Progress(kind, message, data, node)

    def candidate(
        self,
        branch: Branch,
        segment: Segment | None = None,
        *,
        parent: int = -1,
        scores: Mapping[str, float] | None = None,
    ) -> Candidate:
        """What a branch has become; segment: its last one, which knows why it ended."""
        statistics = branch.statistics
        is_cut = segment is not None and (
            segment.finish_reason == "length" or segment.stop_reason == "wall_s"
        )
        is_open = branch.is_thinking
        return Candidate(
            text=branch.text,
            reasoning=branch.reasoning,
            content=branch.content,
            answer=None if is_open else self.answers.extract(branch.content),
            num_tokens=len(branch.token_ids),
            num_thinking_tokens=branch.num_thinking_tokens,
            finish_reason="length" if is_cut else "stop",
            stop_reason=None if segment is None else segment.stop_reason,
            logprob=statistics.sum.logprob,
            mean=statistics.mean,
            scores=dict(scores or {}),
            steps=_scored_lines(branch, self.tokenizer) if branch.step_scores else (),
            parent=parent,
        )

    def release(self, branches: Sequence[Branch]) -> None:
        """Gives their cache back, before the task ends."""
        for branch in branches:
            branch.release()
            self._opened.pop(branch, None)

    def close(self) -> None:
        """Releases every branch that was opened here."""
        for child in self._children:
            child.close()
        self._children.clear()
        self.release(list(self._opened))

    def _add(self, branch: Branch) -> Branch:
        self._opened[branch] = None
        return branch

    def _limited(self, params: SamplingParams) -> SamplingParams:
        """With the budget's limits on thinking and time."""
        budget = self.ledger.budget
        most = [x for x in (params.max_thinking_tokens, budget.thinking_tokens) if x is not None]
        if budget.answer_reserve:
            left = self.ledger.num_left
            share = None if left is None else left // self.ledger.live
            ends = [x for x in (params.max_tokens, share) if x is not None]
            most += [max(0, min(ends) - budget.answer_reserve)] if ends else []
        changes: dict[str, Any] = {"max_thinking_tokens": min(most)} if most else {}
        deadline = self.ledger.deadline_s
        if deadline is not None:
            changes["policy"] = (*params.policies, lambda: Deadline(deadline))
        return replace(params, **changes) if changes else params

    @property
    def _width(self) -> int:
        """How many branches this run may let go on at the same time."""
        most = self.ledger.budget.branches
        return sys.maxsize if most is None else max(1, most // self.ledger.live)

    def _advance(
        self, branches: list[Branch], wanted: list[int | None], **options: Any
    ) -> Run[tuple[list[Segment], list[int | None]]]:
        """Their segments, and how many tokens each was allowed."""
        ledger, usage = self.ledger, self.usage
        shares = self._reserve(wanted)
        thoughts = sum(branch.num_thinking_tokens for branch in branches)
        lengths = [len(branch.token_ids) for branch in branches]
        chosen = sum(branch.statistics.num_tokens for branch in branches)
        try:
            segments = yield Advance(branches[0].llm, branches, max_tokens=shares, **options)
        finally:
            if ledger.budget.total_tokens is not None:
                ledger.held -= sum(share or 0 for share in shares)
                ledger.holding -= 1
            gains = [len(b.token_ids) - n for b, n in zip(branches, lengths, strict=True)]
            usage.generated_tokens += sum(gains)
            chosen = sum(branch.statistics.num_tokens for branch in branches) - chosen
            usage.injected_tokens += sum(gains) - chosen
            usage.thinking_tokens += sum(b.num_thinking_tokens for b in branches) - thoughts
            ledger.generating.update(
                b.number for b, gain in zip(branches, gains, strict=True) if gain
            )
            usage.branches = len(ledger.generating)
        return segments, shares

    def _reserve(self, wanted: list[int | None]) -> list[int | None]:
        """Tokens that branches may take now, of those that are left: equal shares, and nobody more than it wants."""
        ledger = self.ledger
        left = ledger.num_left
        if left is None:
            return wanted
        left //= max(1, ledger.live - ledger.holding)
        shares = [0] * len(wanted)
        order = sorted(range(len(wanted)), key=lambda i: _or_more(wanted[i], left))
        for place, i in enumerate(order):
            shares[i] = min(_or_more(wanted[i], left), left // (len(order) - place))
            left -= shares[i]
        ledger.held += sum(shares)
        ledger.holding += 1
        return list(shares)


def room_of(task: Task, branch: Branch, params: SamplingParams | None = None) -> int:
    """Tokens that a branch may still have, by the context and by `params.max_tokens`, which limits it as a whole."""
    length = len(branch.token_ids)
    room = task.llm.max_context - len(branch.prompt_token_ids) - length
    most = (params or task.params).max_tokens
    return room if most is None else min(room, most - length)


def with_policy(params: SamplingParams, policy: TokenPolicy) -> SamplingParams:
    """params that have one more policy, an instance for a single branch."""
    return replace(params, policy=(*params.policies, lambda: policy))


def _scored_lines(branch: Branch, tokenizer: Tokenizer) -> tuple[ScoredStep, ...]:
    """The lines of the thinking, as far as the head has seen the token that ends them."""
    steps, first, scores = [], 0, branch.step_scores
    ids = branch.token_ids
    end = ids.index(close) if (close := _closing_id(tokenizer)) in ids else len(ids)
    for index, token_id in enumerate(ids[:end]):
        if "\n" not in tokenizer.decode([token_id], False):
            continue
        text = tokenizer.decode(list(ids[first : index + 1]), False).strip("\n")
        if index in scores and text:
            steps.append(ScoredStep(text, scores[index]))
        first = index + 1
    return tuple(steps)


def _closing_id(tokenizer: Tokenizer) -> int | None:
    return None if tokenizer.think_tags is None else tokenizer.token_to_id(tokenizer.think_tags[1])


def messages_of(prompt: str | Sequence[int] | Sequence[Message]) -> list[Message] | None:
    """The messages of a prompt, None if it is a text or token ids."""
    is_chat = not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)
    return list(cast(Sequence[Message], prompt)) if is_chat else None


def _or_more(wanted: int | None, left: int) -> int:
    return left if wanted is None else wanted


def _gained(branch: Branch, mark: tuple[int, int]) -> int:
    return branch.mark[0] - mark[0]
