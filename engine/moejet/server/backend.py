"""What the server asks of an engine, whether it runs in this process (`LocalBackend`) or in one of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from moejet.request import SamplingParams, StreamDelta, TokenLogprobs
from moejet.server.prompts import PromptMaker
from moejet.server.strategies import SolveJob, StrategyRun
from moejet.tokenizer import Tokenizer

if TYPE_CHECKING:  # which loads torch
    from moejet.async_llm import AsyncLLM


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What the server must know of the model to check and render requests without asking the engine.

    tokenizer: None for a synthetic model, which serves token ids only · strategies: names of those it
    can answer by · loaded_as: by what name or path, where that is known · description: `LLM.describe`
    """

    name: str
    max_context: int
    vocab_size: int
    default_sampling: SamplingParams
    tokenizer: Tokenizer | None
    strategies: tuple[str, ...] = ()
    loaded_as: str = ""
    description: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """One request for the engine: tokens in, deltas out. params without a policy, so that it can be sent."""

    request_id: str
    token_ids: list[int]
    params: SamplingParams
    prompt: str | None = None  # the text behind token_ids, for the log
    priority: int = 0


class Stream(Protocol):
    """A running request. Dropping or closing it ends the request within one step."""

    async def get(self, timeout_s: float | None = None) -> StreamDelta | None:
        """The next delta, None after the last; TimeoutError if there is none in time."""

    def close(self) -> None: ...


class Backend(Protocol):
    """Raises ValueError for wrong input, QueueFullError, EngineDeadError, EngineClosedError, EngineStepError."""

    card: ModelCard

    async def start(self, job: Job) -> Stream:
        """Queues the request; returns once it has been accepted."""

    async def solve(self, job: SolveJob) -> StrategyRun:
        """Begins a strategy; returns once it has been accepted."""

    async def score(self, token_ids: list[int], num_top: int = 0) -> list[TokenLogprobs]:
        """Log-probability of every token after the first given those before it, beside the num_top likeliest ones."""

    def progress(self, request_id: str) -> tuple[int, int, int] | None:
        """(tokens of the prompt that are in the cache, all of them, those that were there before).

        None while that is not known.
        """

    async def end_thinking(self, request_id: str) -> bool:
        """Makes a request answer now; False if there is none of that id that thinks."""

    async def abort(self, request_id: str) -> bool: ...

    def health(self) -> dict[str, Any]: ...

    def counters(self) -> dict[str, Any]: ...

    async def close(self) -> None: ...


class LocalBackend:
    """An `AsyncLLM` in this process. close() leaves it open unless it is owned."""

    def __init__(self, llm: AsyncLLM, *, name: str, is_owned: bool = False):
        from moejet.reasoning.specs import strategy_names  # which loads torch

        try:
            tokenizer: Tokenizer | None = llm.tokenizer
        except ValueError:
            tokenizer = None
        self._llm = llm
        self._is_owned = is_owned
        self._prompts = PromptMaker(tokenizer, llm.max_context)
        self.card = ModelCard(
            name=name,
            max_context=llm.max_context,
            vocab_size=llm.model_config.vocab_size,
            default_sampling=llm.default_sampling(),
            tokenizer=tokenizer,
            strategies=strategy_names() if tokenizer is not None else (),
            loaded_as=llm.config.model,
            description=llm.describe(),
        )

    async def start(self, job: Job) -> Stream:
        stream = self._llm.generate(
            job.token_ids, job.params, request_id=job.request_id, priority=job.priority
        )
        return await stream.start()

    async def solve(self, job: SolveJob) -> StrategyRun:
        from moejet.server.local_strategy import LocalStrategy

        return await LocalStrategy.start(self._llm, job, self._prompts)

    async def score(self, token_ids: list[int], num_top: int = 0) -> list[TokenLogprobs]:
        return await self._llm.score_top(token_ids, num_top)

    def progress(self, request_id: str) -> tuple[int, int, int] | None:
        return self._llm.progress(request_id)

    async def end_thinking(self, request_id: str) -> bool:
        return await self._llm.end_thinking(request_id)

    async def abort(self, request_id: str) -> bool:
        return await self._llm.abort(request_id)

    def health(self) -> dict[str, Any]:
        return self._llm.health()

    def counters(self) -> dict[str, Any]:
        return self._llm.counters()

    async def close(self) -> None:
        if self._is_owned:
            await self._llm.close(drain=False)
