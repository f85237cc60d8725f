"""The synchronous engine: add_request, step, abort. `LLM` drives it; a server will wrap it.

A request of n samples becomes n `Request`s that share id and prompt. Each step schedules, runs the model, samples, and
commits: appends the tokens, applies the stop rules, and reports what each sample gained.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from moejet.batch import Batch
from moejet.block_pool import BlockPool
from moejet.commit import Gained, commit_token
from moejet.config import EngineConfig, ModelConfig
from moejet.grammar import GrammarCompiler, GrammarPolicy
from moejet.output import OutputAssembler
from moejet.policy import ThinkingBudget, TokenPolicy
from moejet.reasoning.parser import prompt_opens_thinking
from moejet.request import (
    CompletionOutput,
    EngineCounters,
    Request,
    RequestOutput,
    RequestState,
    SamplingParams,
    StreamDelta,
    Timings,
)
from moejet.runner import ModelRunner
from moejet.sample_state import PolicyFailure, SampleState
from moejet.sampler import BadLogitsError, SampledToken, derive_seed, sample
from moejet.scheduler import Scheduler
from moejet.tokenizer import Tokenizer

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Group:
    """The n samples of one prompt and their text so far."""

    prompt: str | None
    samples: list[Request]
    assemblers: list[OutputAssembler]
    has_forked: bool = False  # the samples after the first begin when the prompt has been computed
    outputs: dict[int, CompletionOutput] = field(default_factory=dict)


class Engine:
    """Runs requests over one model. Not thread-safe."""

    def __init__(
        self,
        runner: ModelRunner,
        model_config: ModelConfig,
        config: EngineConfig,
        *,
        block_pool: BlockPool,
        tokenizer: Tokenizer | None,
        max_context: int,
    ):
        self.runner = runner
        self.model_config = model_config
        self.config = config
        self.tokenizer = tokenizer
        self.max_context = max_context
        self.block_pool = block_pool
        self.default_params = SamplingParams()
        self.prefix_key: dict[str, Any] = {}  # what decides about a prefix's latents
        self.on_close: Callable[[], None] = lambda: None
        self.on_scheduled: Callable[[Batch], None] = lambda batch: None
        self.scheduler = Scheduler(
            block_pool,
            max_batch_tokens=config.max_batch_tokens,
            max_num_requests=config.max_num_requests,
            max_mixed_tokens=config.max_mixed_tokens,
            root=b"" if config.prefix_caching else None,
        )
        eos = tokenizer.eos_token_ids if tokenizer is not None else ()
        self.eos_token_ids = frozenset(eos or model_config.eos_token_ids)
        self._groups: OrderedDict[str, _Group] = OrderedDict()
        self._ids = itertools.count()
        self._num_steps = self._num_prefill_tokens = self._num_decode_tokens = 0
        self._base_seed = secrets.randbits(63) if config.seed is None else config.seed

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def counters(self) -> EngineCounters:
        return EngineCounters(
            steps=self._num_steps,
            prefill_tokens=self._num_prefill_tokens,
            decode_tokens=self._num_decode_tokens,
            cached_tokens=self.scheduler.num_found_tokens,
            preemptions=self.scheduler.num_preemptions,
        )

    def add_request(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        *,
        prompt: str | None = None,
        request_id: str | None = None,
        priority: int = 0,
        arrival_s: float | None = None,
    ) -> str:
        """Queues a prompt and returns its request id. Raises ValueError if it cannot be served as asked.

        priority: requests with smaller numbers run first and are preempted last · arrival_s: since when it has waited,
        on the clock of time.perf_counter (None: since now)
        """
        self.check_prompt(prompt_token_ids, params)
        number = next(self._ids)
        request_id = request_id or f"request-{number}"
        if request_id in self._groups:
            raise ValueError(f"request_id={request_id!r} is already running; choose another")
        seed = self.seed_of(params, number)
        room = self.max_context - len(prompt_token_ids)
        limit = room if params.max_tokens is None else min(room, params.max_tokens)
        thinking, tags = self.thinking_of(prompt, prompt_token_ids)
        samples = [
            Request(
                request_id=request_id,
                index=index,
                prompt_token_ids=tuple(prompt_token_ids),
                params=params,
                seed=derive_seed(seed, index),
                max_total_tokens=len(prompt_token_ids) + limit,
                eos_token_ids=frozenset() if params.ignore_eos else self.eos_token_ids,
                order=number,
                priority=priority,
                arrival_s=time.perf_counter() if arrival_s is None else arrival_s,
            )
            for index in range(params.n)
        ]
        assemblers = [
            OutputAssembler(self.tokenizer, params, think_tags=tags, thinking=thinking)
            for _ in samples
        ]
        for request, assembler in zip(samples, assemblers, strict=True):
            policies = self.policies_of(params)
            if policies or params.statistics:
                request.sample_state = SampleState(
                    request,
                    assembler,
                    tokenizer=self.tokenizer,
                    vocab_size=self.model_config.vocab_size,
                    policies=policies,
                    has_statistics=params.statistics,
                )
        self._groups[request_id] = _Group(prompt, samples, assemblers)
        self.scheduler.add(samples[0])
        return request_id

    def resume(self, branch: Request, assembler: OutputAssembler) -> None:
        """Lets a held branch run until it ends or has `max_total_tokens`; with those it has, it is only computed."""
        self._groups[branch.request_id] = _Group(None, [branch], [assembler], has_forked=True)
        self.scheduler.rewind(branch)
        self.scheduler.resume(branch)

    def thinking_of(
        self, prompt: str | None, token_ids: list[int]
    ) -> tuple[bool, tuple[str, str] | None]:
        """Whether a prompt leaves the model inside its thinking, and the tags around that."""
        if self.tokenizer is None or self.tokenizer.think_tags is None:
            return False, None
        text = prompt if prompt is not None else self.tokenizer.decode(token_ids, False)
        return prompt_opens_thinking(text, *self.tokenizer.think_tags), self.tokenizer.think_tags

    def next_number(self) -> int:
        """Of requests, in the order in which they arrive."""
        return next(self._ids)

    def seed_of(self, params: SamplingParams, number: int) -> int:
        """The seed that was asked for, or one that follows from the engine's and the request's number."""
        return derive_seed(self._base_seed, number + 1) if params.seed is None else params.seed

    def step(self) -> list[StreamDelta]:
        """Runs one batch and returns what every touched sample gained. [] if there is nothing to do."""
        batch = self.scheduler.schedule()
        if batch is None:
            return []
        self.on_scheduled(batch)
        # Nothing is recorded before the tokens are known, so a step that raises can simply be run again.
        logits = self.runner.execute(batch)
        rows, requests = self._sampled_rows(batch)
        try:
            tokens = sample(logits[rows], requests) if requests else []
        except BadLogitsError as error:
            # Its neighbours go on with the next step.
            for request_id in error.request_ids:
                self.abort(request_id)
            raise
        self._count(batch)
        self.scheduler.advance(batch)
        return self._commit(requests, tokens) + self._end_computed(batch)

    def _end_computed(self, batch: Batch) -> list[StreamDelta]:
        """Branches that were to be computed and no more."""
        ended = [r for r in batch.sampled if r.state is RequestState.RUNNING and not _samples(r)]
        return [
            self._delta(self._groups[r.request_id], r, Gained(finish_reason="length"))
            for r in ended
        ]

    def abort(self, request_id: str) -> list[StreamDelta]:
        """Ends a request now; its samples finish with reason "abort" and the text they have. Unknown ids do nothing."""
        group = self._groups.get(request_id)
        if group is None:
            return []
        deltas = []
        for request, assembler in zip(group.samples, group.assemblers, strict=True):
            if request.state is not RequestState.FINISHED:
                self.scheduler.finish(request, "abort")
                tail = ("", "") if request.is_branch else assembler.flush()
                deltas.append(self._close(group, request, tail, ()))
        return deltas

    def discard(self, request_id: str) -> None:
        """Ends a request without building its output: for when a step failed and building might fail too."""
        group = self._groups.pop(request_id, None)
        for request in group.samples if group is not None else ():
            self.scheduler.finish(request, "abort")

    def close(self) -> None:
        """Aborts every request and releases the threads."""
        for request_id in list(self._groups):
            self.abort(request_id)
        for request in list(self.scheduler.held):
            self.scheduler.drop(request)
        self.on_close()

    @contextmanager
    def scratch_request(self, token_ids: list[int]) -> Iterator[Request]:
        """A request outside the schedule, with cache blocks for all its tokens; they are freed at the end."""
        request = Request(
            request_id="scratch",
            index=0,
            prompt_token_ids=tuple(token_ids),
            params=SamplingParams(),
            seed=0,
            max_total_tokens=len(token_ids),
            eos_token_ids=frozenset(),
        )
        if not self.block_pool.extend(request.block_table, len(token_ids)):
            free = self.block_pool.num_free * self.block_pool.block_size
            raise ValueError(
                f"{len(token_ids)} tokens do not fit into the {free} free tokens of the cache: "
                "raise cache_tokens or let running requests finish"
            )
        try:
            yield request
        finally:
            self.block_pool.release(request.block_table)

    def _count(self, batch: Batch) -> None:
        self._num_steps += 1
        for request, query_len in zip(batch.requests, batch.query_lens, strict=True):
            of_prompt = max(0, request.num_prompt_tokens - request.num_computed_tokens)
            self._num_prefill_tokens += min(query_len, of_prompt)
            self._num_decode_tokens += max(0, query_len - of_prompt)

    def _sampled_rows(self, batch: Batch) -> tuple[list[int], list[Request]]:
        """Rows of the logits and whose they are: at the end of a prompt, all samples draw from the same row."""
        rows: list[int] = []
        requests: list[Request] = []
        for row, request in enumerate(batch.sampled):
            if request.state is RequestState.FINISHED or not _samples(request):
                continue  # aborted while the step ran, or not to go on
            group = self._groups[request.request_id]
            begins = [request] if group.has_forked else group.samples
            rows += [row] * len(begins)
            requests += begins
        return rows, requests

    def _commit(self, requests: list[Request], tokens: list[SampledToken]) -> list[StreamDelta]:
        deltas: list[StreamDelta] = []
        now = time.perf_counter()
        for request in requests:
            group = self._groups[request.request_id]
            if request.index > 0 and not group.has_forked:
                request.first_scheduled_s = group.samples[0].first_scheduled_s
                self.scheduler.fork(group.samples[0], request)
        for request, token in zip(requests, tokens, strict=True):
            if (
                request.state is RequestState.FINISHED
            ):  # another sample's policy failed in this step
                continue
            group = self._groups[request.request_id]
            group.has_forked = True
            request.first_token_s = request.first_token_s or now
            try:
                gained = commit_token(request, group.assemblers[request.index], token)
            except PolicyFailure as failure:
                failed = self.abort(request.request_id)
                deltas += [replace(delta, error=failure.error) for delta in failed]
                continue
            except Exception as error:
                # Its neighbours have been computed and must get their tokens.
                logger.exception("request %s is broken and ends", request.request_id)
                deltas.append(self._end_broken(group, request, error))
                continue
            deltas.append(self._delta(group, request, gained))
        return deltas

    def _end_broken(self, group: _Group, request: Request, error: Exception) -> StreamDelta:
        """Ends a request whose text cannot be built; its output has the tokens only."""
        self.discard(request.request_id)
        for sample_ in group.samples:
            output = CompletionOutput(
                index=sample_.index,
                text="",
                reasoning=None,
                content="",
                token_ids=tuple(sample_.output_token_ids),
                finish_reason="abort",
            )
            group.outputs.setdefault(sample_.index, output)
        return StreamDelta(
            request.request_id,
            request.index,
            text="",
            reasoning="",
            content="",
            token_ids=(),
            finish_reason="abort",
            output=self._request_output(group),
            error=error,
        )

    def _delta(self, group: _Group, request: Request, gained: Gained) -> StreamDelta:
        pieces, token_ids = (gained.reasoning, gained.content), tuple(gained.token_ids)
        if gained.finish_reason is not None:
            self.scheduler.finish(request, gained.finish_reason, gained.stop_reason)
            return self._close(group, request, pieces, token_ids)
        return StreamDelta(
            request.request_id,
            request.index,
            text=group.assemblers[request.index].take_text(),
            reasoning=gained.reasoning,
            content=gained.content,
            token_ids=token_ids,
        )

    def _close(
        self,
        group: _Group,
        request: Request,
        pieces: tuple[str, str],
        token_ids: tuple[int, ...],
    ) -> StreamDelta:
        """Builds a sample's output and, when it is the group's last, the request's."""
        assembler = group.assemblers[request.index]
        assert request.finish_reason is not None, f"{request.request_id=}"
        wants = request.params.logprobs is not None
        state = request.sample_state
        statistics = state.statistics if state is not None else None
        group.outputs[request.index] = CompletionOutput(
            index=request.index,
            text=assembler.text,
            reasoning=assembler.reasoning,
            content=assembler.content,
            token_ids=tuple(request.output_token_ids),
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
            logprobs=tuple(request.logprobs) if wants else None,
            cumulative_logprob=request.cumulative_logprob if wants else None,
            statistics=statistics.copy() if statistics and request.params.statistics else None,
        )
        output = None
        if len(group.outputs) == len(group.samples):
            output = self._request_output(group)
            del self._groups[request.request_id]
        return StreamDelta(
            request.request_id,
            request.index,
            text=assembler.take_text(),
            reasoning=pieces[0],
            content=pieces[1],
            token_ids=token_ids,
            finish_reason=request.finish_reason,
            output=output,
        )

    def _request_output(self, group: _Group) -> RequestOutput:
        first = group.samples[0]
        arrival = first.arrival_s
        end = max(r.finished_s for r in group.samples)
        scheduled = min(
            (r.first_scheduled_s for r in group.samples if r.first_scheduled_s), default=end
        )
        first_token = min((r.first_token_s for r in group.samples if r.first_token_s), default=end)
        return RequestOutput(
            request_id=first.request_id,
            prompt=group.prompt,
            prompt_token_ids=first.prompt_token_ids,
            outputs=tuple(group.outputs[i] for i in range(len(group.samples))),
            timings=Timings(
                prompt_tokens=first.num_prompt_tokens,
                completion_tokens=sum(len(r.output_token_ids) for r in group.samples),
                queue_s=scheduled - arrival,
                prefill_s=first_token - scheduled,
                decode_s=end - first_token,
                cached_tokens=first.num_cached_tokens,
            ),
        )

    def check_prompt(self, token_ids: list[int], params: SamplingParams) -> None:
        """Raises ValueError if a prompt cannot be served as asked."""
        if not token_ids:
            raise ValueError("the prompt is empty: it needs at least one token")
        vocab = self.model_config.vocab_size
        bad = next((t for t in token_ids if not 0 <= t < vocab), None)
        if bad is not None:
            raise ValueError(f"prompt token id {bad} is outside the vocabulary of {vocab}")
        if len(token_ids) >= self.max_context:
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens, and a context of max_context="
                f"{self.max_context} leaves no room for an answer; shorten the prompt or raise "
                f"max_context (the model allows {self.model_config.max_position_embeddings})"
            )
        self.check_params(params)

    def check_params(self, params: SamplingParams) -> None:
        """Raises ValueError if this model cannot do what is asked."""
        vocab = self.model_config.vocab_size
        for token_id in (*(params.logit_bias or {}), *params.stop_token_ids):
            if token_id >= vocab:
                raise ValueError(
                    f"token id {token_id} in logit_bias or stop_token_ids is outside the "
                    f"vocabulary of {vocab}"
                )
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this model has none")
        tags = self.tokenizer.think_tags if self.tokenizer is not None else None
        if params.max_thinking_tokens is not None and tags is None:
            raise ValueError(
                f"max_thinking_tokens={params.max_thinking_tokens} needs a model that marks its "
                "thinking with tags, and this one does not"
            )

        if params.grammar is not None:
            self._grammars.compile(params.grammar)

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        vocab_size = self.model_config.vocab_size
        return GrammarCompiler(self.tokenizer, vocab_size, self.eos_token_ids)

    def policies_of(self, params: SamplingParams) -> list[TokenPolicy]:
        """One sample's policies, in the order in which they are asked."""
        policies: list[TokenPolicy] = []
        if params.max_thinking_tokens is not None:
            policies.append(ThinkingBudget(params.max_thinking_tokens))
        if params.policy is not None:
            policy = params.policy()
            if not isinstance(policy, TokenPolicy):
                raise ValueError(
                    f"policy made {policy!r}, which is not a moejet.policy.TokenPolicy"
                )
            policies.append(policy)
        if params.grammar is not None:
            policies.append(GrammarPolicy(self._grammars, params.grammar))
        return policies


def _samples(request: Request) -> bool:
    """Whether more tokens are wanted; of a branch, perhaps only the latents of those it has."""
    return len(request.token_ids) < request.max_total_tokens
