"""What one step of a search is, and branches that go on by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moejet.branch import Branch, Segment, Until
from moejet.reasoning.task import Run, Task, room_of
from moejet.request import SamplingParams
from moejet.validation import checked, require_int, require_text


@dataclass(frozen=True, slots=True)
class Step:
    """What a branch has gained. is_last: it cannot go on: it has ended, or a limit has cut it off."""

    segment: Segment
    is_last: bool

    @property
    def text(self) -> str:
        return self.segment.text

    def ended(self, task: Task) -> Segment:
        """The segment once the search is over: whoever was to go on, and may not, was cut off."""
        if self.is_last or not task.is_exhausted:
            return self.segment
        return Segment(self.segment.text, self.segment.token_ids, *task.ledger.cut)


@dataclass(frozen=True, slots=True)
@checked
class Steps:
    """A step ends with `delimiter`, behind something that is not white space, or after `max_tokens`.

    With delimiter None all steps have exactly max_tokens, except the last: the mini-steps of 32 or 64 tokens of
    Marco-o1 (arXiv 2411.14405). A model that thinks takes steps while it does; its answer is not divided but belongs
    to the step that closes the thinking, or is one of its own, unless divides_answer. What a model writes that does
    not think is divided. A blank line is what verifiers commonly divide at, a line what the tiny reasoner writes.
    """

    delimiter: str | None = "\n"
    max_tokens: int | None = 1024
    divides_answer: bool = False

    def __post_init__(self) -> None:
        require_text("delimiter", self.delimiter, or_none=True)
        require_int("max_tokens", self.max_tokens, 1, or_none=self.delimiter is not None)

    @classmethod
    def mini(cls, num_tokens: int = 32) -> Steps:
        """Steps of a fixed number of tokens."""
        return cls(None, num_tokens)

    def advance(
        self, task: Task, branches: Sequence[Branch], *, params: SamplingParams | None = None
    ) -> Run[list[Step]]:
        """Takes branches, none of which has ended, one step further. `params.max_tokens` limits a branch as a whole."""
        params = params or task.params
        whole = [i for i, branch in enumerate(branches) if self._is_answering(branch)]
        parts = [i for i in range(len(branches)) if i not in set(whole)]
        steps: dict[int, Step] = {}
        groups = [(parts, self), (whole, None)]
        runs = [
            _advance(task, [branches[i] for i in group], step, params)
            for group, step in groups
            if group
        ]
        results = yield from task.gather(runs)
        for (group, _), found in zip([g for g in groups if g[0]], results, strict=True):
            steps |= zip(group, found or [], strict=True)
        return [steps[i] for i in range(len(branches))]

    def until(self, close: str | None) -> Until:
        """The condition of a step's end. close: the tag that ends the thinking, if the answer is not divided."""
        delimiter = self.delimiter
        if delimiter is None:
            return None

        def is_over(text: str, token_ids: Sequence[int]) -> bool:
            if close is not None and close in text:
                return False
            return delimiter in text.lstrip()

        return is_over

    def _is_answering(self, branch: Branch) -> bool:
        return not self.divides_answer and branch.reasoning is not None and not branch.is_thinking


def complete(
    task: Task, branches: Sequence[Branch], *, params: SamplingParams | None = None
) -> Run[list[Step]]:
    """Lets branches, none of which has ended, go on to their end."""
    steps = yield from _advance(task, branches, None, params or task.params)
    return steps


def _advance(
    task: Task, branches: Sequence[Branch], steps: Steps | None, params: SamplingParams
) -> Run[list[Step]]:
    limits = [room_of(task, branch, params) for branch in branches]
    if steps is not None and steps.max_tokens is not None:
        limits = [min(limit, steps.max_tokens) for limit in limits]
    live = [i for i, limit in enumerate(limits) if limit > 0]
    tags = task.tokenizer.think_tags
    close = None if steps is None or steps.divides_answer or tags is None else tags[1]
    segments = yield from task.advance(
        [branches[i] for i in live],
        until=None if steps is None else steps.until(close),
        max_tokens=[limits[i] for i in live],
        params=params,
    )
    found = dict(zip(live, segments, strict=True))
    return [
        _step(branch, found.get(i, Segment("", (), "length", None)), steps)
        for i, branch in enumerate(branches)
    ]


def _step(branch: Branch, segment: Segment, steps: Steps | None) -> Step:
    is_over = segment.stop_reason == "until"
    if segment.finish_reason == "length" and segment.stop_reason is None and steps is not None:
        is_over = 0 < len(segment.token_ids) == steps.max_tokens
    return Step(segment, branch.is_finished or not is_over)
