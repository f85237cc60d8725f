"""The Python entry point: load a model, generate, chat, stream, score.

>>> from moejet import LLM, SamplingParams
>>> with LLM() as llm:
...     out = llm.chat([{"role": "user", "content": "Start with 17, add 25, then multiply by 3."}])
...     print(out[0].outputs[0].reasoning, out[0].outputs[0].content)
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, cast

from moejet import session
from moejet.advance import Advance
from moejet.branch import Branch, Segment, Until
from moejet.choices import describe_choices
from moejet.config import EngineConfig, ModelConfig
from moejet.engine import Engine
from moejet.loading import build_engine, load_engine
from moejet.model_cost import ModelCost
from moejet.presets import parse_preset
from moejet.prompt_reader import Message, PromptReader, kind
from moejet.request import RequestOutput, SamplingParams, StreamDelta
from moejet.session import Session
from moejet.timing import step_overhead, time_decode, time_prefill
from moejet.tokenizer import Tokenizer
from moejet.validation import require_ids, require_path, require_type, short

TINY_REASONER = "tiny-reasoner"


class LLM:
    """A loaded model. Use it as a context manager, or call close().

    model: "tiny-reasoner" (embedded in the package), a directory with a Hugging Face checkpoint, a GGUF file, or
    a hub id.
    Engine options are the fields of `moejet.EngineConfig`; an unknown one raises ValueError with a suggestion.
    Calls from several threads take turns.
    """

    def __init__(self, model: str | Path = TINY_REASONER, **engine_options: Any):
        config = EngineConfig.create(model=str(model), **engine_options)
        self._setup(load_engine(config))

    def _setup(self, engine: Engine) -> None:
        self.engine = engine
        self.prompts = PromptReader(engine.tokenizer)
        self._mail: dict[str, deque[StreamDelta]] = {}
        self._lock = threading.RLock()
        self._closed = False

    @classmethod
    def synthetic(cls, shape: str | ModelConfig, **engine_options: Any) -> LLM:
        """A model of the given shape with random weights and no tokenizer, for benchmarks.

        shape: a name of `moejet.presets.PRESETS`, optionally with ":layers=N" to keep the first N layers only, or a
        configuration of your own.
        """
        model_config = parse_preset(shape) if isinstance(shape, str) else shape
        require_type("shape", model_config, ModelConfig, "or the name of a preset")
        name = shape if isinstance(shape, str) else shape.model_type
        config = EngineConfig.create(model=f"synthetic:{name}", **engine_options)
        llm = cls.__new__(cls)
        llm._setup(build_engine(config, model_config))
        return llm

    @property
    def config(self) -> EngineConfig:
        return self.engine.config

    @property
    def model_config(self) -> ModelConfig:
        return self.engine.model_config

    @property
    def max_context(self) -> int:
        """Tokens that one request may have, prompt and answer together."""
        return self.engine.max_context

    @property
    def tokenizer(self) -> Tokenizer:
        """The checkpoint's tokenizer. Raises ValueError for a synthetic model, which has none."""
        return self.prompts.tokenizer

    def describe(self) -> str:
        """In one line: formats, memory, threads, context, and whether a GPU helps."""
        return describe_choices(self.engine)

    def default_sampling(self) -> SamplingParams:
        """What the checkpoint's generation_config.json recommends; temperature 1 where it is silent."""
        return self.engine.default_params

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[int] | Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Completes prompts (texts or token ids); all of them run together. Results come in the order given."""
        batch = self._as_prompts(prompts)
        return self._run_all([self.prompts.tokenise(p) for p in batch], sampling_params)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **template_kwargs: Any,
    ) -> list[RequestOutput]:
        """Answers one conversation or a list of them, through the checkpoint's chat template.

        template_kwargs go to the template, e.g. enable_thinking=False where it knows that.
        """
        if not isinstance(messages, Sequence) or isinstance(messages, str):
            raise ValueError(f"messages must be a list of messages, not {kind(messages)}")
        many = (
            bool(messages)
            and isinstance(messages[0], Sequence)
            and not isinstance(messages[0], str)
        )
        conversations = messages if many else [messages]
        prompts = [
            self.prompts.render(cast(Sequence[Message], conversation), template_kwargs)
            for conversation in conversations
        ]
        return self._run_all(prompts, sampling_params)

    def stream(
        self, prompt: str | Sequence[int], sampling_params: SamplingParams | None = None
    ) -> Generator[StreamDelta, None, None]:
        """Yields what each step adds; closing the iterator early aborts the request."""
        return self._stream(self.prompts.tokenise(prompt), sampling_params)

    def stream_chat(
        self,
        messages: Sequence[Message],
        sampling_params: SamplingParams | None = None,
        **template_kwargs: Any,
    ) -> Generator[StreamDelta, None, None]:
        """Like `stream`, for one conversation."""
        return self._stream(self.prompts.render(messages, template_kwargs), sampling_params)

    def branch(
        self, prompt: str | Sequence[int] | Sequence[Message], **template_kwargs: Any
    ) -> Branch:
        """A context that can be forked, appended to and advanced step by step; see `moejet.branch`.

        prompt: a text, token ids, or a conversation, which goes through the chat template.
        """
        return Branch(self, self.read_prompt(prompt, **template_kwargs)[1])

    def read_prompt(
        self, prompt: str | Sequence[int] | Sequence[Message], **template_kwargs: Any
    ) -> tuple[str | None, list[int]]:
        """A prompt's text, None if it was given as token ids, and its tokens. Messages go through the chat template."""
        return self.prompts.read(prompt, template_kwargs)

    def advance(
        self,
        branches: Sequence[Branch],
        *,
        until: Until = None,
        max_tokens: int | None = None,
        params: SamplingParams | None = None,
    ) -> list[Segment]:
        """Lets branches go on together, each until its own condition; what each gained comes back in their order.

        until: a string or a token id that the new part shall contain, several of them, or a function of the new text
        and tokens · max_tokens: of each branch, 0 computes what was appended and samples nothing
        """
        params = self.default_sampling() if params is None else params
        with self.exclusive():
            common = Advance(self, branches, until=until, max_tokens=max_tokens, params=params)
            return common.segments([output.outputs[0] for output in self.run(common.starts)])

    def score(self, token_ids: Sequence[int]) -> list[float]:
        """Log-probability of each token given those before it: len(token_ids) - 1 values, the first token has none."""
        ids = require_ids("token_ids", token_ids)
        scores = self.run([partial(self.engine.add_scoring, ids)])[0].prompt_logprobs
        assert scores is not None
        return list(scores)

    def counters(self) -> dict[str, int]:
        """Totals since the model was loaded: tokens, steps, preemptions, experts read; see `EngineCounters`."""
        return asdict(self.engine.counters)

    def save_session(
        self, path: str | Path, conversation: Sequence[Message] | Sequence[int]
    ) -> Session:
        """Writes the latents of a conversation, given as messages or token ids, to one file, atomically.

        What is not in the cache any more is computed. After `load_session` the next turn computes only what is new.
        """
        path = require_path("path", path)
        messages = None
        if not isinstance(conversation, Sequence) or isinstance(conversation, str | bytes):
            raise ValueError(
                f"conversation={short(conversation)} must be a list of messages, or of token ids"
            )
        if conversation and all(isinstance(item, Mapping) for item in conversation):
            messages = cast(Sequence[Message], conversation)
            text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=False)
            tokens = self.tokenizer.encode(text, add_special_tokens=False)
        else:
            tokens = require_ids("conversation", conversation)
            if not tokens:
                raise ValueError("conversation=[] is empty: the prompt is empty; give messages")
        with self.exclusive() as engine:
            if not self.config.prefix_caching:
                raise ValueError("sessions need prefix_caching=True")
            self._run_all([(None, tokens)], SamplingParams(temperature=0.0, max_tokens=1))
            return session.save(engine, path, tokens, messages)

    def load_session(self, path: str | Path) -> Session:
        """Reads a saved conversation into the cache and returns it.

        Raises ValueError, naming what differs, if it was saved with another model or other settings, or is damaged.
        """
        path = require_path("path", path)
        with self.exclusive() as engine:
            return session.load(engine, path)

    @property
    def cost(self) -> ModelCost:
        """Bytes and operations per token of this model in its formats."""
        return ModelCost.of(self.model_config, self.config)

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of all weights, of those that one decoded token reads, and of one cached token."""
        cost = self.cost
        return {
            "total": round(cost.weight_bytes),
            "active_per_token": round(cost.decode_bytes(context=0)),
            "latent_per_token": cost.latent_bytes,
        }

    def bench_prefill(self, num_tokens: int, depth: int = 0) -> float:
        """Seconds to compute num_tokens of prompt behind `depth` tokens, which are random latents, not computed."""
        with self.exclusive() as engine:
            return time_prefill(engine, num_tokens, depth)

    def bench_decode(self, num_tokens: int, depth: int = 0, batch: int = 1) -> float:
        """Seconds to decode num_tokens in each of `batch` sequences at once, behind `depth` tokens as above."""
        with self.exclusive() as engine:
            return time_decode(engine, num_tokens, depth, batch)

    def bench_overhead(self, batch: int = 1) -> float:
        """Seconds per generated token that an engine step spends outside the native forward pass."""
        with self.exclusive() as engine:
            return step_overhead(engine, batch)

    @classmethod
    def over(cls, engine: Engine) -> LLM:
        """One that somebody else steps, who passes on what comes (`post`); for use on that thread, and never closed."""
        llm = cls.__new__(cls)
        llm._setup(engine)
        return llm

    def hand_over(self) -> Engine:
        """Gives the engine to another owner, who closes it; this object is closed."""
        with self.exclusive() as engine:
            if engine.has_work:
                raise ValueError("this LLM has open streams: close them first")
            self._closed = True
            return engine

    def close(self) -> None:
        """Aborts what runs and ends the threads; weights go with the object. Calling it twice is harmless."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self.engine.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextmanager
    def exclusive(self, *, even_closed: bool = False) -> Iterator[Engine]:
        """The engine, for one thread at a time."""
        with self._lock:
            if self._closed and not even_closed:
                raise ValueError("this LLM is closed: create a new one")
            yield self.engine

    def _as_prompts(self, prompts: Any) -> list[Any]:
        if isinstance(prompts, str):
            return [prompts]
        if not isinstance(prompts, Sequence):
            raise ValueError(
                f"prompts must be text, a list of texts, or lists of token ids, not {kind(prompts)}"
            )
        items = list(prompts)
        if not items:
            raise ValueError("no prompts given: the list is empty, give at least one")
        if all(isinstance(item, int) for item in items):
            return [items]
        return items

    def _run_all(
        self,
        prompts: list[tuple[str | None, list[int]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    ) -> list[RequestOutput]:
        if sampling_params is None:
            sampling_params = self.default_sampling()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prompts)
        if not isinstance(sampling_params, Sequence) or not all(
            isinstance(p, SamplingParams) for p in sampling_params
        ):
            raise ValueError(
                f"sampling_params must be SamplingParams or a list of them, not {kind(sampling_params)}"
            )
        if len(sampling_params) != len(prompts):
            raise ValueError(
                f"sampling_params={short(sampling_params)} has {len(sampling_params)} entries "
                f"for {len(prompts)} prompts: give one for all or one for each"
            )
        return self.run(
            [
                partial(self.engine.add_request, tokens, params, prompt=text)
                for (text, tokens), params in zip(prompts, sampling_params, strict=True)
            ]
        )

    def run(self, starts: Sequence[Callable[[], str]]) -> list[RequestOutput]:
        """Calls functions that start requests and steps until all have ended; if one fails, all are aborted."""
        with self.exclusive():
            ids = self.begin(starts)
            outputs: dict[str, RequestOutput] = {}
            try:
                while len(outputs) < len(ids):
                    for request_id, result in self.wait(ids).items():
                        if isinstance(result, Exception):
                            raise result
                        outputs[request_id] = result
                return [outputs[request_id] for request_id in ids]
            finally:
                self.abandon(ids)

    def begin(self, starts: Sequence[Callable[[], str]]) -> list[str]:
        """Calls functions that start requests; if one fails, all are aborted. The requests go to `wait` in the end."""
        with self.exclusive():
            ids: list[str] = []
            try:
                for start in starts:
                    ids.append(start())
                    self._mail[ids[-1]] = deque()
            except BaseException:
                self.abandon(ids)
                raise
            return ids

    def wait(
        self, request_ids: Collection[str], *, max_steps: int | None = None
    ) -> dict[str, RequestOutput | Exception]:
        """Steps until at least one of these requests has ended, and tells how; each is told once.

        {} if none has after max_steps.
        """
        for number in count():
            with self.exclusive():
                ended = self.ended(request_ids)
                if ended or number == max_steps:
                    return ended
                self._step()
        raise AssertionError("unreachable")

    def abandon(self, request_ids: Collection[str]) -> None:
        """Aborts those of these requests that still run and forgets what nobody has asked about."""
        with self.exclusive(even_closed=True) as engine:
            for request_id in request_ids:
                if self._mail.pop(request_id, None) is not None and not self._closed:
                    engine.abort(request_id)

    def ended(self, request_ids: Collection[str]) -> dict[str, RequestOutput | Exception]:
        """Those of these requests that have ended, and how; each is told once."""
        return {
            request_id: result
            for request_id in request_ids
            if (result := self._read(request_id)) is not None
        }

    def post(self, deltas: Iterable[StreamDelta]) -> None:
        """Hands the engine's deltas to whoever waits for them, here or in an open stream."""
        for delta in deltas:
            if delta.request_id in self._mail:
                self._mail[delta.request_id].append(delta)

    def _read(self, request_id: str) -> RequestOutput | Exception | None:
        """The end of a request, if it has come."""
        mail = self._mail.get(request_id, ())
        while mail:
            delta = mail.popleft()
            if (result := delta.error or delta.output) is not None:
                del self._mail[request_id]
                return result
        return None

    def _step(self) -> None:
        self.post(self.engine.step())

    def _stream(
        self, prompt: tuple[str | None, list[int]], params: SamplingParams | None
    ) -> Generator[StreamDelta, None, None]:
        text, tokens = prompt
        params = self.default_sampling() if params is None else params
        require_type("sampling_params", params, SamplingParams)
        with self.exclusive() as engine:
            engine.rules.check_prompt(tokens, params)
        return self._deltas(text, tokens, params)

    def _deltas(
        self, prompt: str | None, tokens: list[int], params: SamplingParams
    ) -> Generator[StreamDelta, None, None]:
        with self.exclusive() as engine:
            request_id = engine.add_request(tokens, params, prompt=prompt)
            mail = self._mail[request_id] = deque()
        finished = False
        try:
            while not finished:
                with self.exclusive():
                    while not mail:
                        self._step()
                    delta = mail.popleft()
                if delta.error is not None:
                    raise delta.error
                finished = delta.output is not None
                yield delta
        finally:
            with self._lock:
                self._mail.pop(request_id, None)
                if not finished and not self._closed:
                    self.engine.abort(request_id)
