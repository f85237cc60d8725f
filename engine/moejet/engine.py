"""The synchronous engine: add_request, step, abort. `LLM` drives it; `AsyncLLM` does so on a thread of its own.

A request of n samples becomes n `Request`s that share id and prompt. Each step schedules, runs the model, samples, and
commits: appends the tokens, applies the stop rules, and reports what each sample gained.
"""

from __future__ import annotations

import itertools
import logging
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from moejet.batch import Batch
from moejet.block_pool import BlockPool
from moejet.commit import Gained, commit_token
from moejet.config import EngineConfig, ModelConfig
from moejet.decode_traffic import DecodeTraffic
from moejet.engine_counters import EngineCounters
from moejet.group import Group
from moejet.model_cost import ModelCost
from moejet.output import OutputAssembler
from moejet.request import Request, RequestState, SamplingParams, StreamDelta
from moejet.request_rules import RequestRules
from moejet.runner import Runner
from moejet.sample_state import PolicyFailure, SampleState
from moejet.sampler import BadLogitsError, SampledToken, derive_seed
from moejet.scheduler import Scheduler
from moejet.step_compute import StepComputer
from moejet.step_head import StepHead
from moejet.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_MAX_SCORED_BYTES = 1 << 28  # of a step's fp32 logits that only scores need


class Engine:
    """Runs requests over one model. Not thread-safe."""

    def __init__(
        self,
        runner: Runner,
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
        self.step_head: StepHead | None = None
        self.prefix_key: dict[str, Any] = {}  # what decides about a prefix's latents
        self.at_close = ExitStack()  # what is called then, the last one first
        self.on_scheduled: Callable[[Batch], None] = lambda batch: None
        self.scheduler = Scheduler(
            block_pool,
            max_batch_tokens=config.max_batch_tokens,
            max_num_requests=config.max_num_requests,
            max_mixed_tokens=config.max_mixed_tokens,
            max_scored_tokens=max(1, _MAX_SCORED_BYTES // (4 * model_config.vocab_size)),
            root=b"" if config.prefix_caching else None,
        )
        eos = tokenizer.eos_token_ids if tokenizer is not None else ()
        self.eos_token_ids = frozenset(eos or model_config.eos_token_ids)
        self._groups: OrderedDict[str, Group] = OrderedDict()
        # Without a reference to the engine, whose memory would stay until garbage is collected.
        drawers = partial(_drawers, self._groups)
        self._computer = StepComputer(runner, drawers, block_size=block_pool.block_size)
        self._ids = itertools.count()
        self.rules = RequestRules(
            model_config,
            tokenizer,
            max_context=max_context,
            eos_token_ids=self.eos_token_ids,
        )
        self.totals = EngineCounters()  # as far as the engine itself counts; see counters
        on_cpu = config.device == "cpu"
        dense_bytes = round(ModelCost.of(model_config, config).step_bytes) if on_cpu else 0
        self.traffic = DecodeTraffic(runner, dense_bytes)
        self._base_seed = secrets.randbits(63) if config.seed is None else config.seed

    @property
    def has_work(self) -> bool:
        return self.scheduler.has_work

    @property
    def counters(self) -> EngineCounters:
        """What has been done so far; any thread may ask."""
        loads, num_bytes = self.runner.expert_loads()
        uses, hits, fetched = self.runner.cache_counts()
        store = self.scheduler.store
        return replace(
            self.totals,
            preemptions=self.scheduler.num_preemptions,
            expert_loads=loads,
            expert_bytes=num_bytes,
            expert_cache_uses=uses,
            expert_cache_hits=hits,
            expert_cache_bytes=fetched,
            decode_steps=self.traffic.steps,
            decode_seconds=self.traffic.seconds,
            decode_bytes=self.traffic.num_bytes,
            cache_evictions=self.block_pool.num_evictions,
            disk_evictions=0 if store is None else store.num_evictions,
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
        self.rules.check_prompt(prompt_token_ids, params)
        number = self.next_number()
        request_id = self._new_id(request_id, number)
        seed = self.seed_of(params, number)
        room = self.max_context - len(prompt_token_ids)
        limit = room if params.max_tokens is None else min(room, params.max_tokens)
        thinking, tags = self.rules.thinking_of(prompt_token_ids)
        token_ids = tuple(prompt_token_ids)
        samples = [
            Request(
                request_id=request_id,
                index=index,
                prompt_token_ids=token_ids,
                params=params,
                seed=derive_seed(seed, index),
                max_total_tokens=len(token_ids) + limit,
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
            policies = self.rules.policies_of(params)
            if policies or params.statistics:
                request.sample_state = SampleState(
                    request,
                    assembler,
                    tokenizer=self.tokenizer,
                    vocab_size=self.model_config.vocab_size,
                    policies=policies,
                    has_statistics=params.statistics,
                )
        self._groups[request_id] = Group(prompt, samples, assemblers)
        self.scheduler.add(samples[0])
        return request_id

    def add_scoring(
        self,
        token_ids: list[int],
        *,
        num_top: int = 0,
        request_id: str | None = None,
        priority: int = 0,
        arrival_s: float | None = None,
    ) -> str:
        """Queues a prompt whose tokens' log-probabilities are wanted: `RequestOutput.prompt_logprobs`, and no answer.

        num_top: how many alternatives are wanted with each (`RequestOutput.prompt_top`).
        Raises ValueError if it cannot be scored.
        """
        self.rules.check_scoring(token_ids)
        number = self.next_number()
        request_id = self._new_id(request_id, number)
        request = Request(
            request_id=request_id,
            index=0,
            prompt_token_ids=tuple(token_ids),
            params=SamplingParams(),
            seed=0,
            max_total_tokens=len(token_ids),
            eos_token_ids=self.eos_token_ids,
            order=number,
            priority=priority,
            arrival_s=time.perf_counter() if arrival_s is None else arrival_s,
            scores=[],
            num_top=num_top,
        )
        assembler = OutputAssembler(self.tokenizer, request.params, think_tags=None, thinking=False)
        self._groups[request_id] = Group(None, [request], [assembler], has_forked=True)
        self.scheduler.add(request)
        return request_id

    def _new_id(self, request_id: str | None, number: int) -> str:
        request_id = request_id or f"request-{number}"
        if request_id in self._groups:
            raise ValueError(f"request_id={request_id!r} is already running; choose another")
        return request_id

    def resume(self, branch: Request, assembler: OutputAssembler) -> None:
        """Lets a held branch run until it ends or has `max_total_tokens`; with those it has, it is only computed."""
        self._groups[branch.request_id] = Group(None, [branch], [assembler], has_forked=True)
        self.scheduler.rewind(branch)
        self.scheduler.resume(branch)

    def progress(self, request_id: str) -> tuple[int, int, int] | None:
        """(tokens of the prompt that are computed, all of them, those that were found), of its first sample.

        Any thread may ask.
        """
        group = self._groups.get(request_id)
        if group is None:
            return None
        request = group.samples[0]
        num_computed = min(request.num_computed_tokens, request.num_prompt_tokens)
        return num_computed, request.num_prompt_tokens, request.num_cached_tokens

    def next_number(self) -> int:
        """Of requests, in the order in which they arrive."""
        return next(self._ids)

    def seed_of(self, params: SamplingParams, number: int) -> int:
        """The seed that was asked for, or one that follows from the engine's and the request's number."""
        return derive_seed(self._base_seed, number + 1) if params.seed is None else params.seed

    def step(self) -> list[StreamDelta]:
        """Runs one batch and returns what every touched sample gained. [] if there is nothing to do.

        A request that cannot be computed ends with a delta that says why, and the others go on. Raises only if the
        engine as a whole does not work.
        """
        batch = self.scheduler.schedule()
        if batch is None:
            return []
        self.on_scheduled(batch)
        self.traffic.begin()
        parts, culprits = self._computer.compute_isolating(batch, self.probe, self.step_head)
        num_of_prompts = self.totals.prefill_tokens
        deltas: list[StreamDelta] = []
        self.totals.steps += 1
        for part in parts:
            self._count(part.batch)
            self.scheduler.advance(part.batch)
            deltas += self._commit(part.requests, part.tokens) + self._end_computed(part.batch)
        self.traffic.end(is_decode=self.totals.prefill_tokens == num_of_prompts)
        for request_id, error in culprits.items():
            logger.error("request %s cannot be computed and ends", request_id, exc_info=error)
            deltas += self._end_failed(request_id, error, is_step_error=True)
        self.totals.generated_tokens += sum(len(delta.token_ids) for delta in deltas)
        return deltas

    def probe(self) -> None:
        """One forward pass of one token outside the schedule; raises if even that does not work."""
        if self.block_pool.num_free == 0:
            return  # those that fill the cache will show it
        with self.scratch_request([0]) as request:
            batch = Batch.build([request], [1], block_size=self.block_pool.block_size)
            # Copies that are due come first: its block may be the source of one.
            batch.block_copies = self.scheduler.copies
            logits = self.runner.execute(batch)
        if not bool(torch.isfinite(logits).all()):
            raise FloatingPointError("the probe's logits are not finite")

    def _end_computed(self, batch: Batch) -> list[StreamDelta]:
        """Ends branches and scored prompts that were to be computed and no more."""
        ended = [
            r
            for r in batch.requests
            if r.state is RequestState.RUNNING
            and not r.wants_tokens
            and r.num_computed_tokens == len(r.token_ids)
        ]
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
        for request, assembler in group.members():
            if request.state is not RequestState.FINISHED:
                self.scheduler.finish(request, "abort")
                gained = Gained()
                if not request.is_branch:
                    gained.add(assembler.flush())
                deltas.append(self._close(group, request, gained))
        return deltas

    def end_thinking(self, request_id: str) -> bool:
        """Lets the samples of a request that think, or have yet to begin, answer with their next token.

        It is as if their budget (`moejet.policy.ThinkingBudget`) were spent. False if no sample thinks.
        """
        group = self._groups.get(request_id)
        has_ended = False
        for request, assembler in group.members() if group is not None else ():
            begins = assembler.may_open_thinking and request.num_prompt_tokens == len(
                request.token_ids
            )
            if request.state is RequestState.FINISHED or not (assembler.is_thinking or begins):
                continue
            if request.sample_state is None:
                request.sample_state = SampleState(
                    request,
                    assembler,
                    tokenizer=self.tokenizer,
                    vocab_size=self.model_config.vocab_size,
                )
            request.sample_state.end_thinking()
            has_ended = True
        return has_ended

    def discard(self, request_id: str) -> None:
        """Ends a request without building its output: for when a step failed and building might fail too."""
        group = self._groups.pop(request_id, None)
        for request in group.samples if group is not None else ():
            self.scheduler.finish(request, "abort")

    def close(self) -> None:
        """Aborts every request and releases the threads."""
        with self.at_close:
            for request_id in list(self._groups):
                self.abort(request_id)
            for request in list(self.scheduler.held):
                self.scheduler.drop(request)

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
        totals = self.totals
        for request, query_len in zip(batch.requests, batch.query_lens, strict=True):
            of_prompt = max(0, request.num_prompt_tokens - request.num_computed_tokens)
            totals.prefill_tokens += min(query_len, of_prompt)
            totals.decode_tokens += max(0, query_len - of_prompt)
            if request.index == 0 and not request.is_counted:
                request.is_counted = True
                totals.prompt_tokens += request.num_prompt_tokens
                totals.cached_tokens += request.num_cached_tokens
                totals.disk_tokens += request.num_disk_tokens

    def _commit(self, requests: list[Request], tokens: list[SampledToken]) -> list[StreamDelta]:
        deltas: list[StreamDelta] = []
        now = time.perf_counter()
        for request in requests:
            if request.state is RequestState.FINISHED:
                continue  # a sample in another part of a divided step has failed
            group = self._groups[request.request_id]
            if request.index > 0 and not group.has_forked:
                request.first_scheduled_s = group.samples[0].first_scheduled_s
                self.scheduler.fork(group.samples[0], request)
        for request, token in zip(requests, tokens, strict=True):
            if request.state is RequestState.FINISHED:
                continue  # another sample of its request has failed in this step
            group = self._groups[request.request_id]
            group.has_forked = True
            request.first_token_s = request.first_token_s or now
            try:
                gained = commit_token(request, group.assemblers[request.index], token)
            except PolicyFailure as failure:
                is_step_error = isinstance(failure.error, BadLogitsError)
                deltas += self._end_failed(
                    request.request_id, failure.error, is_step_error=is_step_error
                )
                continue
            except Exception as error:
                # Its neighbours have been computed and must get their tokens.
                logger.exception("request %s is broken and ends", request.request_id)
                self.discard(request.request_id)
                deltas.append(group.close_broken(request, error))
                continue
            deltas.append(self._delta(group, request, gained))
        return deltas

    def _end_failed(
        self, request_id: str, error: Exception, *, is_step_error: bool
    ) -> list[StreamDelta]:
        """Ends all samples of a request, with what they have, because of one that cannot go on."""
        group = self._groups.get(request_id)
        if group is None:
            return []
        try:
            deltas = self.abort(request_id)
        except Exception:
            logger.exception("the output of request %s cannot be built", request_id)
            self.discard(request_id)
            deltas = [group.close_broken(group.samples[0], error)]
        return [replace(delta, error=error, is_step_error=is_step_error) for delta in deltas]

    def _delta(self, group: Group, request: Request, gained: Gained) -> StreamDelta:
        if gained.finish_reason is None:
            return group.delta(request, gained)
        self.scheduler.finish(request, gained.finish_reason, gained.stop_reason)
        return self._close(group, request, gained)

    def _close(self, group: Group, request: Request, gained: Gained) -> StreamDelta:
        delta = group.close(request, gained)
        if not request.is_branch:
            # They refer to each other, and a grammar's matcher would stay until garbage is collected.
            request.sample_state = None
        if group.has_ended:
            del self._groups[request.request_id]
        return delta


def _drawers(groups: Mapping[str, Group], request: Request) -> list[Request]:
    """Who draws a token from this request's row: at the end of a prompt, all its samples do."""
    if request.state is RequestState.FINISHED or not request.wants_tokens:
        return []  # aborted while the step ran, or not to go on
    group = groups[request.request_id]
    return [request] if group.has_forked else group.samples
