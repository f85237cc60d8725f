"""What a branch has become, as selectors and scorers see it."""

from __future__ import annotations

from collections.abc import Mapping

from moejet.branch import Branch, Segment
from moejet.reasoning.answer_classes import Answers
from moejet.reasoning.result import Candidate, ScoredStep
from moejet.tokenizer import Tokenizer


def candidate_of(
    branch: Branch,
    segment: Segment | None,
    *,
    answers: Answers,
    tokenizer: Tokenizer,
    parent: int = -1,
    scores: Mapping[str, float] | None = None,
) -> Candidate:
    """segment: its last one, which knows why it ended."""
    statistics = branch.statistics
    reason = "stop" if segment is None else segment.finish_reason
    if segment is not None and segment.stop_reason == "wall_s":
        reason = "length"
    return Candidate(
        text=branch.text,
        reasoning=branch.reasoning,
        content=branch.content,
        answer=None if branch.is_thinking else answers.extract(branch.content),
        num_tokens=len(branch.token_ids),
        num_thinking_tokens=branch.num_thinking_tokens,
        finish_reason=reason,
        stop_reason=None if segment is None else segment.stop_reason,
        logprob=statistics.sum.logprob,
        mean=statistics.mean,
        scores=dict(scores or {}),
        steps=_scored_lines(branch, tokenizer) if branch.step_scores else (),
        parent=parent,
    )


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
