"""POST /v1/completions: plain text or token ids, in and out, with the prompts' own log-probabilities if asked for."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from moejet.request import SamplingParams, TokenLogprobs
from moejet.server.backend import Backend, Job
from moejet.server.errors import ApiError, wrong
from moejet.server.generation import ChoiceEnd, Piece, Plan, Progress, StrategyStep, Totals
from moejet.server.protocol.answers import Answer
from moejet.server.protocol.common import (
    Context,
    finite,
    progress,
    response_grammar,
    sampling_params,
    structured_grammar,
    timings,
    token_text,
    usage,
)
from moejet.server.protocol.fields import HARMLESS, CountOrZero, NumLogprobs, SamplingFields, one_of
from moejet.server.sse import DONE, KEEP_ALIVE
from moejet.server.sse import event as _event
from moejet.server.tool_calls import ContentDelta
from moejet.tokenizer import Tokenizer
from moejet.validation import short

_DEFAULT_TOKENS = 16  # as OpenAI's
_MAX_LOGPROBS = 20


class CompletionRequest(SamplingFields):
    """Prompts to be continued."""

    harmless = {**HARMLESS, "suffix": one_of("")}  # noqa: RUF012 (a class variable of the base)

    model: str | None = None
    prompt: str | list[int] | list[str] | list[list[int]]
    max_tokens: CountOrZero | None = None
    logprobs: NumLogprobs | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    response_format: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class CompletionPlan:
    """plan: without jobs where the prompts themselves are all that is wanted."""

    plan: Plan
    prompts: list[list[int]]
    n: int
    echo: bool
    num_logprobs: int | None
    scores: list[list[TokenLogprobs]] = field(default_factory=list)

    async def score(self, backend: Backend) -> None:
        """Log-probabilities of the prompts' own tokens, if they are wanted."""
        if not self.echo or self.num_logprobs is None:
            return
        for token_ids in self.prompts:
            enough = len(token_ids) > 1
            self.scores.append(await backend.score(token_ids, self.num_logprobs) if enough else [])


def completion_plan(
    request: CompletionRequest, context: Context, request_id: str
) -> CompletionPlan:
    """Blocks for as long as tokenising takes."""
    context.check_model(request.model)
    prompts = _prompts(request, context)
    num_logprobs = request.logprobs
    if num_logprobs is not None and not 0 <= num_logprobs <= _MAX_LOGPROBS:
        raise wrong(f"logprobs={num_logprobs} must be between 0 and {_MAX_LOGPROBS}", "logprobs")
    max_tokens = _DEFAULT_TOKENS if request.max_tokens is None else request.max_tokens
    echo = bool(request.echo)
    if max_tokens == 0 and not echo:
        raise wrong("max_tokens=0 asks for nothing: it needs echo=true", "max_tokens")
    params = sampling_params(
        request,
        context,
        max_tokens=max_tokens or 1,
        logprobs=num_logprobs,
        grammar=response_grammar(request.response_format, "response_format")
        or structured_grammar(request.structured_outputs),
    )
    jobs = [] if max_tokens == 0 else _jobs(prompts, params, request_id, request.priority or 0)
    plan = Plan(
        request_id=request_id,
        dialect="completions",
        jobs=jobs,
        wants_progress=bool(request.return_progress),
        is_logged=context.config.log_prompts,
    )
    return CompletionPlan(plan, prompts, params.n, echo, num_logprobs)


def _jobs(
    prompts: list[list[int]], params: SamplingParams, request_id: str, priority: int
) -> list[Job]:
    ids = [request_id if len(prompts) == 1 else f"{request_id}-{i}" for i in range(len(prompts))]
    return [
        Job(job_id, token_ids, params, priority=priority)
        for job_id, token_ids in zip(ids, prompts, strict=True)
    ]


def _prompts(request: CompletionRequest, context: Context) -> list[list[int]]:
    prompt: Any = request.prompt
    limit = context.config.max_prompts
    is_many = isinstance(prompt, list) and bool(prompt) and not isinstance(prompt[0], int)
    given: list[Any] = prompt if is_many else [prompt]
    if len(given) > limit:
        raise wrong(f"prompt holds {len(given)} prompts, and {limit} are allowed", "prompt")
    specials = request.add_special_tokens is not False
    prompts = []
    for i, one in enumerate(given):
        where = f"prompt[{i}]" if is_many else "prompt"
        if isinstance(one, str):
            token_ids = context.prompts.of_text(one, where, add_special_tokens=specials)
        else:
            vocab_size = context.card.vocab_size
            bad = next((t for t in one if not 0 <= t < vocab_size), None)
            if bad is not None:
                raise wrong(
                    f"{where} holds {short(bad)}: token ids must be between 0 and {vocab_size - 1}",
                    where,
                )
            token_ids = context.prompts.checked(list(one), where)
        if not token_ids:
            raise wrong(f"{where}={short(one)} is empty: it needs at least one token", where)
        prompts.append(token_ids)
    return prompts


class CompletionRenderer:
    """OpenAI's text completions."""

    keep_alive = KEEP_ALIVE

    def __init__(
        self,
        completion: CompletionPlan,
        request: CompletionRequest,
        *,
        model: str,
        tokenizer: Tokenizer | None,
    ):
        self._completion = completion
        self._model = model
        self._tokenizer = tokenizer
        options = request.stream_options
        self._wants_usage = bool(options and options.include_usage)
        self._offsets: dict[int, int] = {}  # characters of each choice so far

    def begin(self) -> list[bytes]:
        if not self._completion.echo:
            return []
        chunks = []
        for choice in range(len(self._completion.prompts) * self._completion.n):
            text, logprobs = self._echo(choice)
            chunks.append(self._chunk(choice, text, logprobs))
        if not self._completion.plan.jobs:
            chunks += [self._chunk(choice, "", None, "length") for choice in range(len(chunks))]
        return chunks

    def event(self, event: Piece | ChoiceEnd | Progress | StrategyStep) -> list[bytes]:
        if isinstance(event, StrategyStep):
            return []
        if isinstance(event, Progress):
            return [_event({**self._head(), "choices": [], **progress(event)})]
        logprobs = self._logprobs(event.choice, event.tokens.logprobs)
        if isinstance(event, ChoiceEnd):
            return [self._chunk(event.choice, "", logprobs, event.finish_reason, event.stop_reason)]
        assert isinstance(event.event, ContentDelta), "text is not parsed"
        return [self._chunk(event.choice, event.event.text, logprobs)]

    def end(self, totals: Totals) -> list[bytes]:
        if not self._wants_usage:
            return [DONE]
        last = {**self._head(), "choices": [], "timings": timings(totals)}
        return [_event({**last, "usage": self._usage(totals)}), DONE]

    def failure(self, error: ApiError) -> list[bytes]:
        return [_event(error.body("openai")), DONE]

    def body(self, answers: list[Answer], totals: Totals) -> dict[str, Any]:
        choices = []
        for choice in range(len(self._completion.prompts) * self._completion.n):
            text, logprobs = self._echo(choice) if self._completion.echo else ("", None)
            answer = answers[choice] if answers else Answer(choice, finish_reason="length")
            more = self._logprobs(choice, tuple(answer.logprobs))
            choices.append(
                {
                    "index": choice,
                    "text": text + "".join(answer.content),
                    "logprobs": _joined(logprobs, more),
                    "finish_reason": answer.finish_reason,
                    "stop_reason": answer.stop_reason,
                }
            )
        usage_part = {"usage": self._usage(totals), "timings": timings(totals)}
        return {**self._head(), "choices": choices, **usage_part}

    def _usage(self, totals: Totals) -> dict[str, Any]:
        found = usage(totals)
        if not self._completion.plan.jobs:
            found["prompt_tokens"] = sum(map(len, self._completion.prompts))
            found["total_tokens"] = found["prompt_tokens"]
        return found

    def _head(self) -> dict[str, Any]:
        plan = self._completion.plan
        return {
            "id": plan.request_id,
            "object": "text_completion",
            "created": plan.created,
            "model": self._model,
        }

    def _chunk(
        self,
        choice: int,
        text: str,
        logprobs: dict[str, Any] | None,
        reason: str | None = None,
        stop_reason: str | int | None = None,
    ) -> bytes:
        entry = {
            "index": choice,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": reason,
            "stop_reason": stop_reason,
        }
        return _event({**self._head(), "choices": [entry]})

    def _echo(self, choice: int) -> tuple[str, dict[str, Any] | None]:
        """The prompt's text, and its tokens' log-probabilities, of which the first has none."""
        index = choice // self._completion.n
        token_ids = self._completion.prompts[index]
        text = self._tokenizer.decode(token_ids) if self._tokenizer is not None else ""
        if not self._completion.scores:
            return text, None
        first = [TokenLogprobs(token_ids[0], 0.0)]
        logprobs = self._logprobs(choice, (*first, *self._completion.scores[index]))
        assert logprobs is not None, "scores are there because they were asked for"
        logprobs["token_logprobs"][0] = logprobs["top_logprobs"][0] = None
        return text, logprobs

    def _logprobs(self, choice: int, entries: tuple[TokenLogprobs, ...]) -> dict[str, Any] | None:
        if self._completion.num_logprobs is None or not entries:
            return None
        texts, offsets = [], []
        at = self._offsets.get(choice, 0)
        for entry in entries:
            texts.append(token_text(self._tokenizer, entry.token_id))
            offsets.append(at)
            at += len(texts[-1])
        self._offsets[choice] = at
        return {
            "tokens": texts,
            "token_logprobs": [finite(entry.logprob) for entry in entries],
            "top_logprobs": [self._top(entry) for entry in entries],
            "text_offset": offsets,
        }

    def _top(self, entry: TokenLogprobs) -> dict[str, float]:
        """The alternatives and, as OpenAI has it, the token itself if it is none of them."""
        found = {token_text(self._tokenizer, i): finite(value) for i, value in entry.top}
        found.setdefault(token_text(self._tokenizer, entry.token_id), finite(entry.logprob))
        return found


def _joined(first: dict[str, Any] | None, second: dict[str, Any] | None) -> dict[str, Any] | None:
    if first is None or second is None:
        return first or second
    return {key: first[key] + second[key] for key in first}
