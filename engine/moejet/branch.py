"""Branches: contexts that strategies fork, append to and advance, as in beam search, voting or step-wise checking.

>>> with llm.branch("Start with 17, add 25.") as root:
...     branches = root.fork(8)
...     llm.advance(branches, until="\\n", max_tokens=50, params=SamplingParams(seed=1))
...     best = max(branches, key=lambda branch: branch.statistics.mean.logprob)
...     best.advance(max_tokens=200)

Forks share the blocks of the cache that hold their common tokens; who writes into a shared block first gets a copy of
it. A branch that does not advance keeps its blocks as long as nothing else needs them. Then it loses them, the one
that has been idle longest first, and what cannot be found again by its tokens is computed again when it goes on: this
costs time and changes no result beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from moejet.output import OutputAssembler
from moejet.request import FinishReason, Request, SamplingParams
from moejet.sample_state import SampleState
from moejet.statistics import TokenStatistics
from moejet.thinking import split_reasoning
from moejet.validation import require_bool, require_ids, require_int, short

if TYPE_CHECKING:
    from moejet.engine import Engine

MAX_FORKS = 1 << 16  # at once
BRANCH_ID = "branch-"  # how the request ids of branches begin, and no other's
Until = str | int | Collection[str | int] | Callable[[str, Sequence[int]], bool] | None


@dataclass(frozen=True, slots=True)
class Segment:
    """What one call of `advance` added to a branch.

    finish_reason: "stop" at an eos (stop_reason None), at the condition named by stop_reason, by a policy; or "length"
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None


class BranchHost(Protocol):
    """Who drives the engine of branches: `LLM`."""

    @property
    def engine(self) -> Engine: ...

    def exclusive(self, *, even_closed: bool = False) -> AbstractContextManager[Engine]:
        """The engine, for one thread at a time."""

    def advance(
        self,
        branches: Sequence[Branch],
        *,
        until: Until = None,
        max_tokens: int | None = None,
        params: SamplingParams | None = None,
    ) -> list[Segment]: ...

    def begin(self, starts: Sequence[Callable[[], str]]) -> list[str]:
        """Calls functions that start requests; returns their ids."""

    def abandon(self, request_ids: Collection[str]) -> None:
        """Aborts those of these requests that still run."""


class Branch:
    """One context. Make it with `LLM.branch` or `fork`; release it, or leave its `with` block, which ends forks too."""

    def __init__(
        self,
        llm: BranchHost,
        prompt_token_ids: Sequence[int],
        *,
        cache_salt: str | None = None,
    ):
        """cache_salt: of this branch and its forks, see `SamplingParams`."""
        with llm.exclusive() as engine:
            ids = list(prompt_token_ids)
            engine.rules.check_prompt(ids, SamplingParams())
            number = engine.next_number()
            request = Request(
                request_id=f"{BRANCH_ID}{number}",
                index=0,
                prompt_token_ids=tuple(ids),
                params=SamplingParams(cache_salt=cache_salt),
                seed=0,
                max_total_tokens=engine.max_context,
                eos_token_ids=engine.eos_token_ids,
                order=number,
                is_branch=True,
            )
            thinking, tags = engine.rules.thinking_of(ids)
            self._assembler = OutputAssembler(
                engine.tokenizer, request.params, think_tags=tags, thinking=thinking
            )
            request.sample_state = SampleState(
                request,
                self._assembler,
                tokenizer=engine.tokenizer,
                vocab_size=engine.model_config.vocab_size,
                has_statistics=True,
            )
            engine.scheduler.hold(request)
        self._opens_thinking = thinking
        self._setup(llm, request)

    def _setup(self, llm: BranchHost, request: Request) -> None:
        self.llm = llm
        self._request = request
        self._forks: list[Branch] = []
        self._is_released = False

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Everything after the prompt, appended tokens included."""
        return tuple(self._request.output_token_ids)

    @property
    def prompt_token_ids(self) -> tuple[int, ...]:
        return self._request.prompt_token_ids

    @property
    def text(self) -> str:
        """Text of `token_ids`, thinking and tags included; a character that is incomplete is left out."""
        return self._assembler.text

    @property
    def reasoning(self) -> str | None:
        return self._split()[0]

    @property
    def content(self) -> str:
        return self._split()[1]

    @property
    def is_thinking(self) -> bool:
        return self._assembler.is_thinking

    @property
    def num_thinking_tokens(self) -> int:
        """Of `token_ids`, inside the thinking, tags left out."""
        return self._state.num_thinking_tokens

    @property
    def is_finished(self) -> bool:
        """Whether it ended with an eos; `append` opens it again."""
        ids = self._request.token_ids
        return len(ids) > self._request.num_prompt_tokens and ids[-1] in self._request.eos_token_ids

    @property
    def statistics(self) -> TokenStatistics:
        """Over the tokens that the model chose, since the root's prompt."""
        return self._state.statistics or TokenStatistics()

    @property
    def step_scores(self) -> dict[int, float]:
        """What the step head says of `token_ids`, by index: those that were the last of a step (`moejet.step_head`)."""
        return self._state.step_scores

    @property
    def score(self) -> float:
        """Sum of the log-probabilities of those tokens."""
        return self.statistics.sum.logprob

    @property
    def mark(self) -> tuple[int, int]:
        """How much there is of `token_ids` and of `text`."""
        return len(self._request.token_ids) - self._request.num_prompt_tokens, len(self.text)

    @property
    def number(self) -> int:
        """Of all branches and requests of its engine, which no other has."""
        return self._request.order

    @property
    def is_computed(self) -> bool:
        """Whether `fork` has nothing to compute first."""
        return len(self._request.token_ids) - self._request.num_computed_tokens <= 1

    @property
    def num_blocks(self) -> int:
        """Blocks of the cache that it holds, shared ones included."""
        return len(self._request.block_table)

    def fork(self, n: int = 1, *, computes: bool = True) -> list[Branch]:
        """n copies that share what is computed; what is not computed yet is computed first, unless computes=False."""
        require_int("n", n, 1, MAX_FORKS)
        require_bool("computes", computes)
        self._check_usable()
        if computes and not self.is_computed:
            self.advance(max_tokens=0)
        with self.llm.exclusive():
            forks = [self._fork() for _ in range(n)]
        self._forks = [fork for fork in self._forks if not fork._is_released] + forks
        return forks

    def append(self, more: str | Sequence[int]) -> None:
        """Adds a text or token ids, which are computed when the branch goes on.

        Raises ValueError for ids outside the vocabulary and for more than the context holds.
        """
        with self.llm.exclusive() as engine:
            self._check_usable()
            ids = self._state.encode(more) if isinstance(more, str) else require_ids("more", more)
            if not ids:
                raise ValueError(f"more={short(more)}: nothing to append; give a text or token ids")
            engine.rules.check_prompt([*self._request.token_ids, *ids], SamplingParams())
            for token_id in ids:
                was_thinking = self._assembler.is_thinking
                self._request.token_ids.append(token_id)
                self._assembler.push(token_id)
                self._state.track(was_thinking)

    def advance(
        self,
        *,
        until: Until = None,
        max_tokens: int | None = None,
        params: SamplingParams | None = None,
    ) -> Segment:
        """`LLM.advance` of this branch alone."""
        return self.llm.advance([self], until=until, max_tokens=max_tokens, params=params)[0]

    def release(self) -> None:
        """Frees its blocks, as far as no other branch shares them. Forks stay. Calling it twice is harmless."""
        if self._is_released:
            return
        self._is_released = True
        scheduler = self.llm.engine.scheduler
        with self.llm.exclusive(even_closed=True):
            if self._request in scheduler.held:
                scheduler.drop(self._request)

    def __enter__(self) -> Branch:
        return self

    def __exit__(self, *exc: object) -> None:
        waiting = [self]
        while waiting:
            branch = waiting.pop()
            waiting += branch._forks
            branch.release()

    @property
    def _state(self) -> SampleState:
        assert self._request.sample_state is not None, f"{self._request.request_id=}"
        return self._request.sample_state

    def _fork(self) -> Branch:
        source, engine = self._request, self.llm.engine
        number = engine.next_number()
        request = replace(
            source,
            request_id=f"{BRANCH_ID}{number}",
            order=number,
            block_table=[],
            block_hashes=list(source.block_hashes),
        )
        request.token_ids = list(source.token_ids)
        fork = Branch.__new__(Branch)
        fork._assembler = self._assembler.copy()
        fork._opens_thinking = self._opens_thinking
        request.sample_state = self._state.fork(request, fork._assembler)
        engine.scheduler.hold(request, source)
        fork._setup(self.llm, request)
        return fork

    def _split(self) -> tuple[str | None, str]:
        tags = self._state.think_tags
        if tags is None:
            return None, self.text
        return split_reasoning(self.text, self._opens_thinking, open=tags[0], close=tags[1])

    def _check_usable(self) -> None:
        if self._is_released:
            raise ValueError("this branch has been released: fork it before you release it")
