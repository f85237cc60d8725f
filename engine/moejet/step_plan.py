"""How a step's tokens are divided among requests, and in which order those take their turns."""

from __future__ import annotations

from moejet.request import Request


class StepPlan:
    """What one step computes, while it is put together."""

    def __init__(
        self, max_tokens: int, max_mixed_tokens: int, max_scored_tokens: int, *, others_wait: bool
    ):
        self.budget = max_tokens
        self.max_mixed_tokens = max_mixed_tokens
        self.max_scored_tokens = max_scored_tokens
        self.requests: list[Request] = []
        self.query_lens: list[int] = []
        self.others_wait = others_wait
        self._num_decoding = 0
        self._num_prompt_tokens = 0
        self._num_scored_tokens = 0

    def share(self, request: Request, missing: int) -> int:
        """How many of the missing tokens may be computed now. Decoding requests come first."""
        if missing == 1:
            return min(1, self.budget)
        left = self.budget
        if self._num_decoding:
            left = min(left, self.max_mixed_tokens - self._num_prompt_tokens)
        if request.scores is not None:
            left = min(left, self.max_scored_tokens - self._num_scored_tokens)
        if self.others_wait:
            left -= left // 2  # a long prompt must not keep a short one from beginning
        return max(0, min(missing, left))

    def take(self, request: Request, query_len: int) -> None:
        if tokens_missing(request) == 1:
            self._num_decoding += 1
        else:
            self._num_prompt_tokens += query_len
        if request.scores is not None:
            self._num_scored_tokens += query_len
        self.requests.append(request)
        self.query_lens.append(query_len)
        self.budget -= query_len


def turn(request: Request) -> tuple[int, int, int]:
    """Sorts requests: priority (a smaller number goes first), then age."""
    return request.priority, request.order, request.index


def tokens_missing(request: Request) -> int:
    return len(request.token_ids) - request.num_computed_tokens
