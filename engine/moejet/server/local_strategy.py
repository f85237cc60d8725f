"""A strategy on the `AsyncLLM` of this process, as the server wants it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from moejet.reasoning.budget import Budget
from moejet.reasoning.result import Progress, Result
from moejet.server.errors import ApiError
from moejet.server.prompts import PromptMaker
from moejet.server.strategies import Conversation, Outcome, SolveJob, plain

if TYPE_CHECKING:
    from moejet.async_llm import AsyncLLM
    from moejet.reasoning.async_runs import StrategyStream

_MAX_MESSAGE = 500  # characters of an error, which repeats what the client wrote


@dataclass(frozen=True, slots=True)
class WholeTexts:
    """Answers of a given form, such as JSON: all of the content is the answer."""

    def extract(self, content: str) -> str | None:
        text = content.strip()
        with suppress(ValueError, RecursionError):  # spaces and the order of fields say nothing
            text = json.dumps(json.loads(text), sort_keys=True, ensure_ascii=False)
        return text or None

    def group(self, answers: Sequence[str]) -> list[int]:
        first: dict[str, int] = {}
        return [first.setdefault(answer, i) for i, answer in enumerate(answers)]


class LocalStrategy:
    """See `moejet.server.strategies.StrategyRun`; made by `start`."""

    def __init__(self, stream: StrategyStream, num_moe_layers: int):
        self._stream = stream
        self._num_moe_layers = num_moe_layers

    @classmethod
    async def start(cls, llm: AsyncLLM, job: SolveJob, prompts: PromptMaker) -> LocalStrategy:
        """prompts: makes those of the model.

        Raises ValueError naming the request's field, QueueFullError, EngineClosedError or EngineDeadError.
        """
        try:
            strategy = await llm.checked_strategy(
                job.strategy, job.token_ids, job.params, max_samples=job.max_samples
            )
        except ValueError as error:
            text = str(error)[:_MAX_MESSAGE]
            if text.startswith(("strategy", "scorer")):
                text = f"reasoning_strategy={job.strategy[:80]!r}: {text}"
            raise ValueError(text) from None
        conversation = job.conversation
        stream = llm.solve(
            job.token_ids,
            strategy,
            request_id=job.request_id,
            messages=None if conversation is None else conversation.messages,
            render=None if conversation is None else partial(_render, prompts, conversation),
            params=job.params,
            budget=_budget(job.limits),
            seed=job.seed,
            answers=WholeTexts() if job.compares == "texts" else None,
        )
        await stream.start()
        return cls(stream, llm.model_config.num_moe_layers)

    async def get(self) -> Progress | Outcome:
        event = await anext(self._stream)
        if isinstance(event, Result):
            num_experts = event.usage.distinct_experts(self._num_moe_layers)
            return Outcome(plain(event), num_experts)
        progress: Progress = plain(event)
        return progress

    def close(self) -> None:
        self._stream.close()

    def __del__(self) -> None:
        if getattr(self, "_stream", None) is not None:
            self.close()


def _render(
    prompts: PromptMaker, conversation: Conversation, messages: Sequence[dict[str, Any]]
) -> tuple[str, list[int]]:
    """As the server renders requests, so that no text in a later question can pass for a turn either."""
    try:
        return prompts.of_chat(messages, conversation.template_kwargs)
    except ApiError as error:
        raise ValueError(str(error)) from None


def _budget(limits: dict[str, Any]) -> Budget | None:
    try:
        return Budget(**limits) if limits else None
    except ValueError as error:
        raise ValueError(f"strategy_budget.{error}") from None
