"""One sample as its policies see it, and the calls of those policies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moejet.policy import Inject, Keep, Replace, Stop, ThinkingBudget, TokenPolicy
from moejet.statistics import TokenScores, TokenStatistics

if TYPE_CHECKING:
    from moejet.output import OutputAssembler
    from moejet.request import Request
    from moejet.tokenizer import Tokenizer


class PolicyFailure(Exception):
    """Carries what a policy raised, or did wrong, out of the step."""

    def __init__(self, error: Exception):
        super().__init__(str(error))
        self.error = error


class SampleState:
    """What a sample has so far. Policies read it and change nothing.

    statistics: of the tokens before the one being decided; None unless asked for · last: scores of the sampled token
    that is being decided · step_scores: what the model's step head says of tokens of the output, by their index, as far
    as they were computed one by one; empty without such a head · num_thinking_tokens: those inside the thinking, tags
    left out · content_start: index among the output's tokens where the answer begins, None while the model thinks ·
    num_pending: injected tokens that follow
    """

    def __init__(
        self,
        request: Request,
        assembler: OutputAssembler,
        *,
        tokenizer: Tokenizer | None,
        vocab_size: int,
        policies: Sequence[TokenPolicy] = (),
        has_statistics: bool = False,
    ):
        self._request = request
        self._assembler = assembler
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._policies = list(policies)
        wanted = has_statistics or any(p.needs_statistics for p in policies)
        self.statistics = TokenStatistics() if wanted else None
        self.last: TokenScores | None = None
        self.step_scores: dict[int, float] = {}
        self.num_thinking_tokens = 0
        self.content_start: int | None = None if self.is_thinking else 0
        self.num_pending = 0

    @property
    def index(self) -> int:
        """Which of the request's n samples this is."""
        return self._request.index

    @property
    def token_ids(self) -> Sequence[int]:
        """Prompt and output."""
        return self._request.token_ids

    @property
    def num_prompt_tokens(self) -> int:
        return self._request.num_prompt_tokens

    @property
    def num_output_tokens(self) -> int:
        return len(self._request.token_ids) - self._request.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        return self._request.output_token_ids

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end the sample; none with ignore_eos."""
        return self._request.eos_token_ids

    @property
    def text(self) -> str:
        """Everything generated, tags included."""
        return self._assembler.text

    @property
    def reasoning(self) -> str | None:
        return self._assembler.reasoning

    @property
    def content(self) -> str:
        return self._assembler.content

    @property
    def is_thinking(self) -> bool:
        return self._assembler.is_thinking

    @property
    def may_open_thinking(self) -> bool:
        """Whether an opening tag, if it came now, would begin the thinking."""
        return self._assembler.may_open_thinking

    @property
    def think_tags(self) -> tuple[str, str] | None:
        return self._tokenizer.think_tags if self._tokenizer is not None else None

    @property
    def needs_logits(self) -> bool:
        return any(p.needs_logits for p in self._policies)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text to inject; the text of a special token becomes that token."""
        if self._tokenizer is None:
            raise ValueError("this model has no tokenizer: inject token ids")
        return self._tokenizer.encode(text, add_special_tokens=False)

    def closing_ids(self, text: str = "\n") -> list[int]:
        """Token ids of `text`, the closing tag and an empty line."""
        assert self.think_tags is not None, "a model without tags does not think"
        return self.encode(f"{text}{self.think_tags[1]}\n\n")

    @property
    def closing_tag_ids(self) -> tuple[int, ...]:
        """The closing tag's token, if it is a single one."""
        if self.think_tags is None or self._tokenizer is None:
            return ()
        token_id = self._tokenizer.token_to_id(self.think_tags[1])
        return () if token_id is None else (token_id,)

    def closes_thinking(self, token_id: int) -> bool:
        """Whether the closing tag is complete with this token."""
        if self.think_tags is None or self._tokenizer is None or not self.is_thinking:
            return False
        tag = self.think_tags[1]
        single = self._tokenizer.token_to_id(tag)
        if single is not None:
            return token_id == single
        # A tag has at most as many tokens as bytes.
        begin = max(self.num_prompt_tokens, len(self.token_ids) - len(tag.encode()))
        return tag in self._tokenizer.decode([*self.token_ids[begin:], token_id], False)

    def set_policies(self, policies: Sequence[TokenPolicy]) -> None:
        """For a branch that goes on: its state stays, its policies are new."""
        self._policies = list(policies)

    def end_thinking(self) -> None:
        """From now on the sample does not think, whatever its other policies want."""
        self._policies.insert(0, ThinkingBudget(0))

    def fork(self, request: Request, assembler: OutputAssembler) -> SampleState:
        """The same state for a copy of the request, without policies."""
        copy = SampleState(
            request, assembler, tokenizer=self._tokenizer, vocab_size=self._vocab_size
        )
        copy.statistics = None if self.statistics is None else self.statistics.copy()
        copy.step_scores = dict(self.step_scores)
        copy.num_thinking_tokens = self.num_thinking_tokens
        copy.content_start = self.content_start
        return copy

    def edit_logits(self, row: Tensor) -> Tensor:
        """Asks the policies about one row [V] fp32. Raises `PolicyFailure`."""
        for policy in self._policies:
            if not policy.needs_logits:
                continue
            try:
                answer = policy.on_logits(self, row)
            except Exception as error:
                raise PolicyFailure(error) from error
            if answer is None:
                continue
            if not isinstance(answer, Tensor) or answer.shape != row.shape:
                found = tuple(answer.shape) if isinstance(answer, Tensor) else type(answer).__name__
                raise PolicyFailure(
                    ValueError(
                        f"{_name(policy)}.on_logits must return None, a bool mask or a row of shape "
                        f"{tuple(row.shape)}, not {found}"
                    )
                )
            is_mask = answer.dtype == torch.bool
            row = row.masked_fill(~answer, -torch.inf) if is_mask else answer.float()
            if bool((torch.isnan(row) | torch.isposinf(row)).any()):
                raise PolicyFailure(ValueError(f"{_name(policy)}.on_logits returned NaN or +inf"))
            if bool(torch.isneginf(row).all()):
                raise PolicyFailure(ValueError(f"{_name(policy)}.on_logits leaves no token"))
        return row

    def decide(
        self, token_id: int, scores: TokenScores | None
    ) -> tuple[tuple[int, ...], Stop | None]:
        """The tokens that come of a sampled one, and whether they are the last. Raises `PolicyFailure`."""
        self.last = scores
        for policy in self._policies:
            try:
                action = policy.on_token(self, token_id)
            except Exception as error:
                raise PolicyFailure(error) from error
            match action:
                case Keep():
                    continue
                case Replace(ids):
                    return self._checked(policy, ids), None
                case Inject(ids):
                    return (token_id, *self._checked(policy, ids)), None
                case Stop():
                    return () if action.drop else (token_id,), action
                case _:
                    raise PolicyFailure(
                        TypeError(
                            f"{_name(policy)}.on_token must return Keep, Replace, Inject or Stop, "
                            f"not {action!r}"
                        )
                    )
        return (token_id,), None

    def appended(
        self, token_id: int, *, was_thinking: bool, num_pending: int
    ) -> tuple[tuple[int, ...], Stop | None]:
        """Tells the policies of a token; returns what they inject, and a stop. Raises `PolicyFailure`."""
        self.track(was_thinking)
        self.num_pending = num_pending
        injected: list[int] = []
        stop: Stop | None = None
        for policy in self._policies:  # every one hears of every token
            try:
                action = policy.on_append(self, token_id)
            except Exception as error:
                raise PolicyFailure(error) from error
            match action:
                case None:
                    continue
                case Inject(ids):
                    injected += self._checked(policy, ids)
                    self.num_pending += len(ids)
                case Stop():
                    stop = stop or action
                case _:
                    raise PolicyFailure(
                        TypeError(
                            f"{_name(policy)}.on_append must return None, Inject or Stop, "
                            f"not {action!r}"
                        )
                    )
        return tuple(injected), stop

    def track(self, was_thinking: bool) -> None:
        """Counts a token that has been appended, given whether the model was thinking before it."""
        if was_thinking and self.is_thinking:
            self.num_thinking_tokens += 1
        elif was_thinking:
            self.content_start = self.num_output_tokens
        elif self.is_thinking:
            self.content_start = None

    def _checked(self, policy: TokenPolicy, ids: Sequence[int]) -> tuple[int, ...]:
        if len(ids) == 0:
            raise PolicyFailure(
                ValueError(f"{_name(policy)} gave no token ids: Replace and Inject need at least 1")
            )
        for token_id in ids:
            is_id = isinstance(token_id, int) and 0 <= token_id < self._vocab_size
            if not is_id or isinstance(token_id, bool):
                raise PolicyFailure(
                    ValueError(
                        f"{_name(policy)} gave token id {token_id!r}, which is outside the "
                        f"vocabulary of {self._vocab_size}"
                    )
                )
        return tuple(ids)


def _name(policy: TokenPolicy) -> str:
    return type(policy).__name__
