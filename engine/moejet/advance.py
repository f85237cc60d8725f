"""Several branches that go on together, in common steps, each until its own condition."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from moejet.branch import Branch, BranchHost, Segment, Until
from moejet.policy import Stop, TokenPolicy
from moejet.request import CompletionOutput, SamplingParams
from moejet.sample_state import SampleState
from moejet.sampler import derive_seed
from moejet.validation import require_int, require_type, short

if TYPE_CHECKING:
    from moejet.engine import Engine


class _Until(TokenPolicy):
    """Stops a branch whose part since then, in tokens and characters, meets the condition."""

    def __init__(self, branch: Branch, condition: Until, since: tuple[int, int]):
        self._num_tokens, self._begin = since
        self._searched = len(branch.text)
        self._condition = condition if callable(condition) else None
        self._strings: list[str] = []
        self._ids: set[int] = set()
        if condition is None or callable(condition):
            return
        if not isinstance(condition, str | int | Collection) or isinstance(condition, Mapping):
            raise ValueError(f"until={short(condition)} must be strings, token ids, or a function")
        for item in [condition] if isinstance(condition, str | int) else list(condition):
            if isinstance(item, str) and item:
                self._strings.append(item)
            elif isinstance(item, int) and not isinstance(item, bool):
                self._ids.add(item)
            else:
                raise ValueError(
                    f"until holds {short(item)}: give non-empty strings, token ids, or a function of the "
                    "new text and token ids"
                )

    def on_append(self, state: SampleState, token_id: int) -> Stop | None:
        if token_id in self._ids:
            return Stop(token_id)
        for string in self._strings:
            # It may have begun in text that was searched before.
            begin = max(self._begin, self._searched - len(string) + 1)
            if state.text.find(string, begin) >= 0:
                return Stop(string)
        self._searched = len(state.text)
        if self._condition is None:
            return None
        new_ids = state.output_token_ids[self._num_tokens :]
        return Stop("until") if self._condition(state.text[self._begin :], new_ids) else None


class Advance:
    """One common advance of several branches: `starts` begin their requests, `segments` says what came of them.

    until, max_tokens: as of `LLM.advance` · params, max_tokens: one for all, or one for each · since: where a branch's
    new part begins, in tokens and in characters, if not where it is now · seeds: of each branch, instead of those that
    follow from params and the place in the list
    Raises ValueError for what cannot run, before anything has changed.
    """

    def __init__(
        self,
        llm: BranchHost,
        branches: Sequence[Branch],
        *,
        until: Until = None,
        max_tokens: int | Sequence[int | None] | None = None,
        params: SamplingParams | Sequence[SamplingParams],
        since: Sequence[tuple[int, int]] | None = None,
        seeds: Sequence[int] | None = None,
    ):
        self.llm = llm
        with llm.exclusive() as engine:
            _check_branches(llm, branches)
            self.branches = list(branches)
            counts = _for_each("max_tokens", max_tokens, len(self.branches))
            choices = _for_each("params", params, len(self.branches))
            for branch, count, choice in zip(self.branches, counts, choices, strict=True):
                _check(engine, branch, count, choice)
            self.since = [branch.mark for branch in branches] if since is None else list(since)
            self._marks = [branch.mark for branch in branches]
            self._conditions = [
                _Until(branch, until, mark)
                for branch, mark in zip(self.branches, self.since, strict=True)
            ]
            if seeds is None:
                number = engine.next_number()
                seeds = [
                    derive_seed(engine.seed_of(choice, number), index)
                    for index, choice in enumerate(choices)
                ]
            self.starts = [
                partial(_resume, *of_branch)
                for of_branch in zip(
                    self.branches, choices, counts, seeds, self._conditions, strict=True
                )
            ]

    def segments(self, outputs: Sequence[CompletionOutput]) -> list[Segment]:
        """Of all branches, given how their requests ended."""
        segments = []
        for branch, (first, begin), condition, output in zip(
            self.branches, self._marks, self._conditions, outputs, strict=True
        ):
            ids = branch.token_ids[first:]
            reason, stop_reason = output.finish_reason, output.stop_reason
            if reason == "length" and ids:
                # The last token that was allowed may meet the condition as well.
                stop = condition.on_append(branch._state, ids[-1])
                if stop is not None:
                    reason, stop_reason = "stop", stop.reason
            segments.append(Segment(branch.text[begin:], ids, reason, stop_reason))
        return segments


def _for_each(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, list | tuple):
        return [value] * count
    if len(value) != count:
        raise ValueError(
            f"{name}={short(value)} has {len(value)} entries for {count} branches: give one for each"
        )
    return list(value)


def _resume(
    branch: Branch, params: SamplingParams, max_tokens: int | None, seed: int, until: TokenPolicy
) -> str:
    engine, request = branch.llm.engine, branch._request
    branch._check_usable()
    branch._state.set_policies([*engine.rules.policies_of(params), until])
    request.params = replace(params, cache_salt=request.params.cache_salt)
    request.seed = seed
    limit = params.max_tokens if max_tokens is None else max_tokens
    room = engine.max_context - len(request.token_ids)
    request.max_total_tokens = len(request.token_ids) + (
        room if limit is None else min(room, limit)
    )
    request.eos_token_ids = frozenset() if params.ignore_eos else engine.eos_token_ids
    engine.resume(request, branch._assembler)
    return request.request_id


def _check_branches(llm: BranchHost, branches: Sequence[Branch]) -> None:
    if not isinstance(branches, Sequence) or not all(isinstance(b, Branch) for b in branches):
        raise ValueError(f"branches={short(branches)} must be a list of branches")
    if len(set(branches)) < len(branches):
        raise ValueError("a branch is listed twice: fork it")
    if any(branch.llm is not llm for branch in branches):
        raise ValueError("a branch belongs to another LLM")


def _check(engine: Engine, branch: Branch, max_tokens: int | None, params: SamplingParams) -> None:
    require_int("max_tokens", max_tokens, 0, or_none=True)
    require_type("params", params, SamplingParams)
    for name, default, remedy in (
        ("n", 1, "fork the branch"),
        ("stop", (), "use until="),
        ("logprobs", None, "read branch.statistics"),
        ("cache_salt", None, "it belongs to the whole branch"),
    ):
        if (value := getattr(params, name)) != default:
            raise ValueError(f"{name}={value!r} does not apply to branches: {remedy}")
    branch._check_usable()
    if branch.is_finished and max_tokens != 0:
        raise ValueError("a branch has ended with an eos: append something before it goes on")
    engine.rules.check_params(params)
