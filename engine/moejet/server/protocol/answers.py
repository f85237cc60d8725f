"""Between a generation and a dialect: what every dialect has to write, streamed or put together."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import Any, Protocol

from moejet.request import FinishReason, TokenLogprobs
from moejet.server.errors import ApiError, as_api_error
from moejet.server.generation import (
    ChoiceEnd,
    Generation,
    Piece,
    Progress,
    Silence,
    StrategyStep,
    Totals,
)
from moejet.server.strategies import Outcome
from moejet.server.strategy_generation import StrategyGeneration
from moejet.server.tool_calls import (
    ContentDelta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallStart,
)


@dataclass(slots=True)
class ToolCall:
    id: str
    name: str
    arguments: str = ""


@dataclass(slots=True)
class Answer:
    """One choice."""

    index: int
    reasoning: list[str] = field(default_factory=list)
    content: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason = "stop"
    stop_reason: str | int | None = None
    outcome: Outcome | None = None

    def add(self, event: Piece | ChoiceEnd) -> None:
        self.logprobs += event.tokens.logprobs
        if isinstance(event, ChoiceEnd):
            self.finish_reason, self.stop_reason = event.finish_reason, event.stop_reason
            self.outcome = event.outcome
            return
        match event.event:
            case ReasoningDelta(text):
                self.reasoning.append(text)
            case ContentDelta(text):
                self.content.append(text)
            case ToolCallStart(_, id, name):
                self.calls.append(ToolCall(id, name))
            case ToolCallArguments(index, fragment):
                self.calls[index].arguments += fragment


class Renderer(Protocol):
    """Writes one request's answer in a dialect; every method returns parts of the stream, ready to be sent."""

    keep_alive: bytes

    def begin(self) -> list[bytes]: ...

    def event(self, event: Piece | ChoiceEnd | Progress | StrategyStep) -> list[bytes]: ...

    def end(self, totals: Totals) -> list[bytes]: ...

    def failure(self, error: ApiError) -> list[bytes]:
        """Ends a stream that has begun."""

    def body(self, answers: list[Answer], totals: Totals) -> dict[str, Any]:
        """The whole answer, not streamed."""


async def stream(
    generation: Generation | StrategyGeneration, renderer: Renderer
) -> AsyncGenerator[bytes]:
    """The one loop behind every streamed answer."""
    try:
        if parts := renderer.begin():
            yield b"".join(parts)
        async for event in generation.events():
            if isinstance(event, Silence):
                yield renderer.keep_alive
            elif parts := renderer.event(event):
                yield b"".join(parts)
        last = renderer.end(generation.totals())
    except Exception as error:
        last = renderer.failure(as_api_error(error))
    finally:
        generation.close()
    yield b"".join(last)


async def collect(generation: Generation | StrategyGeneration, num_choices: int) -> list[Answer]:
    """The answers when all have ended."""
    answers = [Answer(i) for i in range(num_choices)]
    async for event in generation.events():
        if isinstance(event, Piece | ChoiceEnd):
            answers[event.choice].add(event)
    return answers
