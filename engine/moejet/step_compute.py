"""Computes one batch: the model, the choice of tokens, and what is noted of logits and hidden states on the way.

Nothing but scores is recorded before the tokens are known, and those come out the same again: any part of a batch can
be computed once more (`moejet.isolation`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from moejet.batch import Batch
from moejet.isolation import compute_apart
from moejet.request import Request, RequestState
from moejet.runner import Runner
from moejet.sampler import SampledToken, sample
from moejet.scoring import set_scores
from moejet.step_head import StepHead

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Computed:
    """A batch, or the part of one that could be computed, and the tokens that were sampled from it."""

    batch: Batch
    requests: list[Request]
    tokens: list[SampledToken]


class StepComputer:
    """drawers: of a request with a row of logits, the samples that draw their next token from it, perhaps none"""

    def __init__(
        self, runner: Runner, drawers: Callable[[Request], Sequence[Request]], *, block_size: int
    ):
        self._runner = runner
        self._drawers = drawers
        self._block_size = block_size

    def compute_isolating(
        self, batch: Batch, probe: Callable[[], None], step_head: StepHead | None
    ) -> tuple[list[Computed], dict[str, Exception]]:
        """The batch; or those of its requests that can be computed, and why the others cannot.

        probe: raises if the engine as a whole does not work; then what the batch raised is raised
        """
        compute = partial(self._compute, step_head=step_head)
        try:
            return [compute(batch)], {}
        except Exception as error:
            logger.warning("a step failed and is computed in parts", exc_info=error)
            try:
                probe()
            except Exception as probe_error:
                raise error from probe_error
        # Outside of the handler: errors would refer to the first one and, by its frames, to tensors.
        parts, culprits = compute_apart(batch, compute, block_size=self._block_size)
        return parts, {r.request_id: e.with_traceback(None) for r, e in culprits.items()}

    def _compute(self, batch: Batch, step_head: StepHead | None) -> Computed:
        if self._runner.samples:
            tokens = self._runner.sample(batch, *self._sampled_rows(batch))
            if tokens is not None:
                kept = {r: token for r, token in tokens if r.state is not RequestState.FINISHED}
                return Computed(batch, list(kept), list(kept.values()))
        logits = self._runner.execute(batch)
        if step_head is not None:
            self._score_steps(step_head, batch)
        rows, requests = self._sampled_rows(batch)
        for request in dict.fromkeys(batch.sampled):
            if request.scores is not None:
                first = batch.sampled.index(request)
                set_scores(request, logits[first : first + batch.sampled.count(request)])
        if rows != list(range(logits.shape[0])):  # else a copy of all of them would change nothing
            logits = logits[rows]
        return Computed(batch, requests, sample(logits, requests) if requests else [])

    def _sampled_rows(self, batch: Batch) -> tuple[list[int], list[Request]]:
        """Rows of the logits and whose they are."""
        rows: list[int] = []
        requests: list[Request] = []
        for row, request in enumerate(batch.sampled):
            drawers = self._drawers(request)
            rows += [row] * len(drawers)
            requests += drawers
        return rows, requests

    def _score_steps(self, head: StepHead, batch: Batch) -> None:
        """Notes the head's score of the last computed token of each sample that is watched."""
        rows = [
            (row, request)
            for row, request in enumerate(batch.sampled)
            if request.sample_state is not None and request.scores is None
        ]
        hidden = self._runner.hidden(len(batch.sampled)) if rows else None
        if hidden is None:
            return
        counts = dict(zip(batch.requests, batch.query_lens, strict=True))
        scores = head.scores(hidden[[row for row, _ in rows]])
        for (_, request), score in zip(rows, scores, strict=True):
            assert request.sample_state is not None
            last = request.num_computed_tokens + counts[request] - 1 - request.num_prompt_tokens
            request.sample_state.step_scores[last] = score
