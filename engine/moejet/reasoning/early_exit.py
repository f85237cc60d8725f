"""Ending the thinking as soon as the answer is there, by asking for it on the side.

The branch that thinks is forked, the fork is made to answer, and is thrown away: nothing of it enters the branch, whose
thinking goes on where it was.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from moejet.branch import Branch, Segment
from moejet.policy import Action, Keep, Stop, TokenPolicy
from moejet.reasoning.result import Result
from moejet.reasoning.task import Run, Task, room_of, with_policy
from moejet.request import SamplingParams
from moejet.sample_state import SampleState
from moejet.tokenizer import Tokenizer
from moejet.validation import checked

HEDGES = ("wait", "but", "hmm", "maybe", "not sure", "alternatively")
TRANSITIONS = ("Wait", "Alternatively", "Hmm")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Exit:
    """What both ways have in common.

    closing: put after the thinking, before the closing tag, once it ends · probe: what makes a fork answer; {close} is
    the closing tag · probe_tokens: of a trial answer · probe_params: how it is sampled, greedily unless given
    """

    closing: str = "\n"
    probe: str = "\n{close}\n\n"
    probe_tokens: int = 20
    probe_params: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.0))

    def _may_go_on(self, task: Task, branch: Branch) -> bool:
        """Whether it still thinks, may, and leaves a trial its place in the context."""
        if not branch.is_thinking or branch.is_finished or task.is_ending:
            return False
        texts = len(self.probe) + len(self.closing) + 2 * len(_closing_tag(task))
        left = task.llm.max_context - len(branch.prompt_token_ids) - len(branch.token_ids)
        return (
            room_of(task, branch) > 0 and left > texts + 1
        )  # a text has at most a token per character

    def _try(self, task: Task, branch: Branch) -> Run[tuple[str | None, str, Branch]]:
        """The answer that a fork gives now, its words, and the fork."""
        [fork] = yield from task.fork(branch)
        before = len(fork.text)
        task.append(fork, self.probe.format(close=_closing_tag(task)))
        yield from task.advance([fork], max_tokens=self.probe_tokens, params=self.probe_params)
        words = fork.text[before:]
        return task.answers.extract(fork.content or words), words, fork

    def _finish(
        self,
        task: Task,
        branch: Branch,
        segment: Segment | None,
        seed: int,
        *,
        is_early: bool = False,
        tries: int,
    ) -> Run[Result]:
        if is_early and branch.is_thinking:
            task.append(branch, f"{self.closing}{_closing_tag(task)}\n\n")
        if not branch.is_finished and not (segment and segment.finish_reason == "length"):
            room = room_of(task, branch)
            [segment] = yield from task.advance([branch], max_tokens=max(0, room), seeds=[seed])
        candidate = task.candidate(branch, segment)
        if is_early:
            candidate = replace(candidate, stop_reason="early exit")
        task.release([branch])
        return Result(candidate, (candidate,), details={"early_exit": is_early, "probes": tries})


@dataclass(frozen=True, slots=True)
@checked
class Probed(_Exit):
    """Probes every `every` tokens and exits after `agree` equal answers without hedging (Dynasor-CoT, 2412.20993).

    agree: the paper's mild, low, mid and high savings are 8, 5, 3 and 2 · hedges: words in a probe that void it
    """

    every: int = 64
    agree: int = 3
    hedges: tuple[str, ...] = HEDGES

    def run(self, task: Task) -> Run[Result]:
        [branch] = yield from task.open()
        seed = task.next_seed()
        equal, last, tries = 0, None, 0
        segment: Segment | None = None
        while self._may_go_on(task, branch):
            most = min(self.every, room_of(task, branch))
            [segment] = yield from task.advance([branch], max_tokens=most, seeds=[seed])
            if segment.stop_reason == "budget":
                break
            if not self._may_go_on(task, branch):
                segment = None
                break
            answer, words, fork = yield from self._try(task, branch)
            task.release([fork])
            tries += 1
            yield from task.classify([answer])
            is_sure = answer is not None and not _hedges(words, self.hedges)
            is_same = task.answers.count(last, [answer]) == 1
            equal = (equal + 1 if is_same else 1) if is_sure else 0
            last = answer if is_sure else None
            if equal >= self.agree:
                yield from task.tell("stop", f"{equal} probes agree on {answer}", answer=answer)
                result = yield from self._finish(
                    task, branch, None, seed, is_early=True, tries=tries
                )
                return result
            segment = None
        result = yield from self._finish(task, branch, segment, seed, tries=tries)
        return result


@dataclass(frozen=True, slots=True)
@checked
class AtTransitions(_Exit):
    """Tries the answer where the model is about to turn, and exits if it is sure of it (DEER, arXiv 2504.15895).

    words: at which a trial is made, before they count · threshold: of the geometric mean probability of the trial
    """

    words: tuple[str, ...] = TRANSITIONS
    threshold: float = 0.95

    def run(self, task: Task) -> Run[Result]:
        [branch] = yield from task.open()
        seed, tries = task.next_seed(), 0
        segment: Segment | None = None
        while self._may_go_on(task, branch):
            held = with_policy(task.params, _HoldAt(task.tokenizer, self.words, is_first=not tries))
            most = room_of(task, branch)
            [segment] = yield from task.advance(
                [branch], max_tokens=most, params=held, seeds=[seed]
            )
            if not branch.is_thinking or segment.finish_reason == "length":
                break
            before = branch.statistics
            count, total = before.num_tokens, before.sum.logprob
            _, _, fork = yield from self._try(task, branch)
            gained = fork.statistics.num_tokens - count
            mean = (fork.statistics.sum.logprob - total) / max(1, gained)
            task.release([fork])
            tries += 1
            if gained and math.exp(mean) > self.threshold:
                yield from task.tell("stop", f"sure of the answer: {math.exp(mean):.3f}")
                result = yield from self._finish(
                    task, branch, None, seed, is_early=True, tries=tries
                )
                return result
            segment = None
        result = yield from self._finish(task, branch, segment, seed, tries=tries)
        return result


def _closing_tag(task: Task) -> str:
    tags = task.tokenizer.think_tags
    assert tags is not None, "a model without tags does not think"
    return tags[1]


class _HoldAt(TokenPolicy):
    """Stops before a token that begins one of the words; the first token may be one, unless is_first."""

    def __init__(self, tokenizer: Tokenizer, words: Sequence[str], *, is_first: bool):
        self._tokenizer, self._words = tokenizer, words
        self._may_hold = is_first

    def on_token(self, state: SampleState, token_id: int) -> Action:
        may_hold, self._may_hold = self._may_hold, True
        if not may_hold or not state.is_thinking:
            return Keep()
        text = self._tokenizer.decode([token_id], False).strip()
        begins = any(
            word.startswith(text) if len(text) > 1 else word == text for word in self._words
        )
        return Stop("transition", drop=True) if begins and text else Keep()


def _hedges(words: str, hedges: Sequence[str]) -> bool:
    lower = words.lower()
    return any(re.search(rf"\b{re.escape(hedge)}\b", lower) for hedge in hedges)
