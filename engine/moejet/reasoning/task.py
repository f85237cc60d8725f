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
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, TypeVar, cast, runtime_checkable

from moejet.advance import Advance
from moejet.branch import Branch, Segment, Until
from moejet.llm import LLM
from moejet.policy import TokenPolicy
from moejet.prompt_reader import Message
from moejet.reasoning.answer_classes import Answers, KnownAnswers
from moejet.reasoning.candidates import candidate_of
from moejet.reasoning.ledger import Ledger
from moejet.reasoning.result import Background, Candidate, Node, Progress, Result, Usage
from moejet.request import SamplingParams
from moejet.sampler import derive_seed
from moejet.tokenizer import Tokenizer

T = TypeVar("T")
Run = Generator["Advance | Background | Gather | Progress", Any, T]


# Of a conversation its text and tokens. It may be called on any thread.
Render = Callable[[Any], tuple[str | None, list[int]]]


@runtime_checkable
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


class Task:
    """One prompt for one model. `on(...)` makes one for another prompt or model that shares the budget.

    params: how candidates are sampled, unless a strategy says otherwise · answers: finds and compares answers ·
    messages: the conversation that the prompt is made of, None if it was given as a text or as token ids ·
    render: makes prompts of conversations, for this model
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
        render: Render | None = None,
    ):
        self.llm = llm
        self.render: Render = llm.read_prompt if render is None else render
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
        """Whether no further token is allowed, by the budget or because somebody has aborted the run."""
        return self.ledger.is_exhausted

    @property
    def is_ending(self) -> bool:
        """Whether nothing more shall be begun: no token is left, or somebody wants the answer now."""
        return self.ledger.answers_now or self.ledger.is_exhausted

    def on(
        self,
        prompt: str | Sequence[int] | Sequence[Message] | None = None,
        *,
        llm: LLM | None = None,
        params: SamplingParams | None = None,
        answers: Answers | None = None,
    ) -> Run[Task]:
        """A task with another prompt (text, token ids, or messages), model, or sampling; ends with this one.

        Another model reads the messages through its own chat template; without messages, the text as it stands.
        """
        llm = llm or self.llm
        seed = self.next_seed()
        messages = self.messages if prompt is None else messages_of(prompt)
        if prompt is None and llm is self.llm:
            text, token_ids = self.prompt, self.prompt_token_ids
        else:
            prompt = prompt or messages or self.prompt
            if prompt is None:
                raise ValueError(
                    "another model needs the prompt as messages or as a text, not token ids"
                )
            is_own_chat = messages is not None and llm is self.llm
            read = partial(self.render if is_own_chat else llm.read_prompt, prompt)
            is_text = messages is not None or isinstance(prompt, str)
            text, ids = (yield from self.background(read)) if is_text else read()
            token_ids = tuple(ids)
        child = Task(
            llm,
            token_ids,
            text,
            params=params or self.params,
            answers=answers or self.answers,
            ledger=self.ledger,
            messages=messages,
            seed=seed,
            render=self.render if llm is self.llm else None,
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
            yield from self._compute(root)
            if self.usage.prompt_tokens == 0:
                self.usage.prompt_tokens = len(self.prompt_token_ids)
            else:
                self.usage.appended_tokens += len(self.prompt_token_ids)
            if self._root is not None:
                self.release([self._root])
            self._root = root
        return [self._add(fork) for fork in self._root.fork(n, computes=False)]

    def fork(self, branch: Branch, n: int = 1) -> Run[list[Branch]]:
        """n copies of a branch, which shares its cache with them."""
        yield from self._compute(branch)
        return [self._add(fork) for fork in branch.fork(n, computes=False)]

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
        params = self.ledger.limited(params or self.params)
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
                ends |= dict.fromkeys(waiting, self.ledger.cut)
                self.ledger.has_cut = True
                break
            group, waiting = waiting[: self.ledger.width], waiting[self.ledger.width :]
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
        limit = min(len(runs), self.ledger.width, sys.maxsize if limit is None else limit)
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
        return candidate_of(
            branch,
            segment,
            answers=self.answers,
            tokenizer=self.tokenizer,
            parent=parent,
            scores=scores,
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

    def _compute(self, branch: Branch) -> Run[None]:
        """What forks will share; nothing in a run that was aborted."""
        if not branch.is_computed and not self.ledger.is_aborted:
            yield Advance(branch.llm, [branch], max_tokens=0, params=SamplingParams())

    def _add(self, branch: Branch) -> Branch:
        self._opened[branch] = None
        return branch

    def _advance(
        self, branches: list[Branch], wanted: list[int | None], **options: Any
    ) -> Run[tuple[list[Segment], list[int | None]]]:
        """Their segments, and how many tokens each was allowed."""
        with self.ledger.charging(branches, wanted) as shares:
            segments = yield Advance(branches[0].llm, branches, max_tokens=shares, **options)
        return segments, shares


def room_of(task: Task, branch: Branch, params: SamplingParams | None = None) -> int:
    """Tokens that a branch may still have, by the context and by `params.max_tokens`, which limits it as a whole."""
    length = len(branch.token_ids)
    room = task.llm.max_context - len(branch.prompt_token_ids) - length
    most = (params or task.params).max_tokens
    return room if most is None else min(room, most - length)


def with_policy(params: SamplingParams, policy: TokenPolicy) -> SamplingParams:
    """params that have one more policy, an instance for a single branch."""
    return replace(params, policy=(*params.policies, lambda: policy))


def messages_of(prompt: str | Sequence[int] | Sequence[Message]) -> list[Message] | None:
    """The messages of a prompt, None if it is a text or token ids."""
    is_chat = not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)
    return list(cast(Sequence[Message], prompt)) if is_chat else None


def _gained(branch: Branch, mark: tuple[int, int]) -> int:
    return branch.mark[0] - mark[0]
