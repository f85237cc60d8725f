"""Policies: code that watches a sample token by token and may change what comes next.

A policy stands between the sampler and the tokens of a request. What it replaces never enters the cache, and what it
injects is computed with the next step as one chunk, so nothing is ever computed again. Write one by overriding any of

  on_logits  before sampling: forbid tokens or edit the row (only if `needs_logits`)
  on_token   after sampling, before the token counts: Keep, Replace, Inject or Stop
  on_append  after any token, injected ones too, has been appended and did not end the sample: None, Inject or Stop

and pass a function that makes it, since every sample gets a policy of its own:

>>> SamplingParams(policy=lambda: ForceContinuation(times=2))

Injected tokens are part of the output like all others: they count against max_tokens, which cuts them off, an eos or
stop token or a stop string among them ends the sample, and `on_token` is not asked about them. They have no
log-probability: their entries say `is_injected`. An exception in a policy ends its own request only and is raised to
whoever made the request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from moejet.validation import (
    require_bool,
    require_choice,
    require_int,
    require_text,
    require_type,
    short,
)

if TYPE_CHECKING:
    from torch import Tensor

    from moejet.sample_state import SampleState


@dataclass(frozen=True, slots=True)
class Keep:
    """The sampled token counts."""


@dataclass(frozen=True, slots=True)
class Replace:
    """These ids, at least one, come instead of the sampled token. Policies further on are not asked."""

    ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Inject:
    """The token counts, and these ids follow it."""

    ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class Stop:
    """The sample ends with finish_reason "stop" and this stop_reason. The token counts, unless it is dropped.

    drop: only in `on_token`.
    """

    reason: str | int | None = None
    drop: bool = False


Action = Keep | Replace | Inject | Stop


class TokenPolicy:
    """Does nothing; override what you need. One instance serves one sample."""

    needs_logits = False  # whether on_logits is called
    needs_statistics = False  # whether state.statistics and state.last are there

    def on_logits(self, state: SampleState, row: Tensor) -> Tensor | None:
        """A bool mask [V] of the tokens that may come, or an edited row [V]; None changes nothing.

        row [V] fp32: logits after penalties and logit_bias, before temperature; a copy that may be written to.
        A step that has to be repeated asks again about the same position.
        """
        return None

    def on_token(self, state: SampleState, token_id: int) -> Action:
        """What to do with a sampled token; `state` does not hold it yet."""
        return Keep()

    def on_append(self, state: SampleState, token_id: int) -> Inject | Stop | None:
        """What follows a token that `state` now holds; `state.num_pending` injected ones are still to come."""
        return None


class ThinkingBudget(TokenPolicy):
    """Ends the thinking when it has taken `max_thinking_tokens` and wants one more.

    closing_text comes before the closing tag, e.g. a sentence that announces the answer.
    """

    def __init__(self, max_thinking_tokens: int, closing_text: str = "\n"):
        require_int("max_thinking_tokens", max_thinking_tokens, 0)
        require_type("closing_text", closing_text, str)
        self.max_thinking_tokens = max_thinking_tokens
        self.closing_text = closing_text

    def on_token(self, state: SampleState, token_id: int) -> Action:
        if not state.is_thinking or state.num_thinking_tokens < self.max_thinking_tokens:
            return Keep()
        if state.closes_thinking(token_id):
            return Replace((token_id,))  # for good: no other policy may go on thinking
        return Replace(state.closing_ids(self.closing_text))


class ForceContinuation(TokenPolicy):
    """Lets the model think on: `text` replaces the end of its thinking, the first `times` times (arXiv 2501.19393).

    The end is the closing tag or an eos. Of a tag of several tokens only the last one is replaced.
    greedy: from the first forced text on the most likely token is taken, whatever the temperature: a first attempt
    gains by variety, looking again at it by care.
    """

    def __init__(self, times: int, text: str = "Wait", *, greedy: bool = False):
        require_int("times", times, 0)
        require_text("text", text)
        require_bool("greedy", greedy)
        self.times = times
        self.text = text
        self.needs_logits = greedy
        self.num_forced = 0

    def on_logits(self, state: SampleState, row: Tensor) -> Tensor | None:
        if self.num_forced == 0:
            return None
        best = row.argmax()
        edited = row.new_full(row.shape, float("-inf"))
        edited[best] = row[best]
        return edited

    def on_token(self, state: SampleState, token_id: int) -> Action:
        if not state.is_thinking or self.num_forced >= self.times:
            return Keep()
        if token_id not in state.eos_token_ids and not state.closes_thinking(token_id):
            return Keep()
        self.num_forced += 1
        return Replace(state.encode(self.text))


class MinimumThinking(TokenPolicy):
    """Keeps the model thinking for `min_tokens`: until then neither the closing tag nor an eos can be sampled.

    A tag of several tokens cannot be masked; `text` replaces its last token there.
    """

    needs_logits = True

    def __init__(self, min_tokens: int, text: str = "Wait"):
        require_int("min_tokens", min_tokens, 0)
        require_text("text", text)
        self.min_tokens = min_tokens
        self.text = text

    def on_logits(self, state: SampleState, row: Tensor) -> Tensor | None:
        if not state.is_thinking or state.num_thinking_tokens >= self.min_tokens:
            return None
        for token_id in (*state.eos_token_ids, *state.closing_tag_ids):
            row[token_id] = float("-inf")
        return row

    def on_token(self, state: SampleState, token_id: int) -> Action:
        is_early = state.is_thinking and state.num_thinking_tokens < self.min_tokens
        if is_early and state.closes_thinking(token_id):
            return Replace(state.encode(self.text))
        return Keep()


class LoopGuard(TokenPolicy):
    """Ends the thinking, or with end="sample" everything, once the last tokens repeat themselves.

    That is when some block of up to `max_tokens` tokens has come `repeats` times in a row and they cover at least
    `ngram` tokens: a shorter block has to come more often.
    """

    def __init__(
        self,
        *,
        ngram: int = 32,
        repeats: int = 4,
        max_tokens: int = 512,
        closing_text: str = "\n",
        end: Literal["thinking", "sample"] = "thinking",
    ):
        require_int("ngram", ngram, 1)
        require_int("repeats", repeats, 2)
        require_int("max_tokens", max_tokens, 1)
        require_choice("end", end, ("thinking", "sample"))
        require_type("closing_text", closing_text, str)
        self.ngram, self.repeats, self.max_tokens = ngram, repeats, max_tokens
        self.closing_text = closing_text
        self.end = end
        self._run_lengths: dict[int, int] = {}  # period -> tokens that equal those a period before

    def on_token(self, state: SampleState, token_id: int) -> Action:
        if not self._repeats(state, token_id):
            return Keep()
        if self.end == "thinking" and state.is_thinking and not state.closes_thinking(token_id):
            return Replace(state.closing_ids(self.closing_text))
        return Stop("loop") if self.end == "sample" else Keep()

    def _repeats(self, state: SampleState, token_id: int) -> bool:
        """O(max_tokens) a token: how long each period has lasted."""
        ids = state.token_ids
        found = False
        longest = min(self.max_tokens, state.num_output_tokens)
        lengths: dict[int, int] = {}
        for period in range(1, longest + 1):
            if ids[-period] != token_id:
                continue
            length = lengths[period] = self._run_lengths.get(period, 0) + 1
            found = found or length >= max(self.ngram, period * self.repeats) - period
        self._run_lengths = lengths
        return found


class EarlyExit(TokenPolicy):
    """Ends the thinking, or with end="sample" everything, once `condition(state)` holds.

    condition reads `state.statistics` (sums, means and last values over the tokens so far), or anything else of the
    state; it is asked at every `every`-th thinking token from `min_tokens` on.
    """

    needs_statistics = True

    def __init__(
        self,
        condition: Callable[[SampleState], bool],
        *,
        min_tokens: int = 1,
        every: int = 1,
        closing_text: str = "\n",
        end: Literal["thinking", "sample"] = "thinking",
    ):
        if not callable(condition):
            raise ValueError(f"condition={short(condition)} must be a function of the state")
        require_int("min_tokens", min_tokens, 0)
        require_int("every", every, 1)
        require_choice("end", end, ("thinking", "sample"))
        require_type("closing_text", closing_text, str)
        self.condition = condition
        self.min_tokens = min_tokens
        self.every = every
        self.closing_text = closing_text
        self.end = end

    def on_token(self, state: SampleState, token_id: int) -> Action:
        count = state.num_thinking_tokens
        is_due = state.is_thinking and count >= self.min_tokens and count % self.every == 0
        if not is_due or state.closes_thinking(token_id) or not self.condition(state):
            return Keep()
        if self.end == "sample":
            return Stop("early exit")
        return Replace(state.closing_ids(self.closing_text))
