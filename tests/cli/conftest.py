"""A scripted stand-in for LLM, so that the command line is tested without weights."""

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from moejet import LLM
from moejet.cli import options
from moejet.cli.main import main
from moejet.request import (
    CompletionOutput,
    RequestOutput,
    SamplingParams,
    StreamDelta,
    Timings,
    TokenLogprobs,
)


@dataclass
class FakeLLM:
    """Answers with `reasoning` and `content` in pieces of three characters; records its calls."""

    reasoning: str = "17 + 25 = 42\n"
    content: str = "\n\nThe answer is 126."
    finish_reason: str = "stop"
    completion_tokens: int = 11
    max_prompt_chars: int = 10_000
    on_piece: Callable[[int], None] = lambda index: None
    calls: list[tuple[str, Any, SamplingParams]] = field(default_factory=list)
    opened: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    num_aborts: int = 0
    is_closed: bool = False

    def __enter__(self) -> "FakeLLM":
        return self

    def __exit__(self, *error: object) -> None:
        self.is_closed = True

    def describe(self) -> str:
        return "int8 experts · 1 thread"

    def default_sampling(self) -> SamplingParams:
        return SamplingParams(temperature=0.8, top_p=0.95)

    def chat(self, messages: Any, params: SamplingParams) -> list[RequestOutput]:
        return self._whole("chat", messages, params)

    def generate(self, prompt: Any, params: SamplingParams) -> list[RequestOutput]:
        return self._whole("generate", prompt, params)

    def stream_chat(self, messages: Any, params: SamplingParams) -> Iterator[StreamDelta]:
        return self._pieces("stream_chat", messages, params)

    def stream(self, prompt: Any, params: SamplingParams) -> Iterator[StreamDelta]:
        return self._pieces("stream", prompt, params)

    def _check(self, name: str, prompt: Any, params: SamplingParams) -> None:
        self.calls.append((name, prompt, params))
        if len(str(prompt)) > self.max_prompt_chars:
            raise ValueError("the prompt has 99 tokens, max_context=10: shorten it")

    def _whole(self, name: str, prompt: Any, params: SamplingParams) -> list[RequestOutput]:
        self._check(name, prompt, params)
        return [self._output(params)]

    def _output(self, params: SamplingParams) -> RequestOutput:
        logprobs = (TokenLogprobs(5, -0.5, ((5, -0.5), (6, float("-inf")))),)
        answers = tuple(
            CompletionOutput(
                index=index,
                text=f"{self.reasoning}</think>{self.content}",
                reasoning=self.reasoning.strip() or None,
                content=self.content.strip(),
                token_ids=(5, 6, 7),
                finish_reason=self.finish_reason,  # type: ignore[arg-type]
                logprobs=None if params.logprobs is None else logprobs,
                cumulative_logprob=-0.5,
            )
            for index in range(params.n)
        )
        timings = Timings(23, self.completion_tokens, 0.0, 0.5, 0.25)
        return RequestOutput("0", None, tuple(range(23)), answers, timings)

    def _pieces(self, name: str, prompt: Any, params: SamplingParams) -> Iterator[StreamDelta]:
        self._check(name, prompt, params)
        is_done = False
        parts = [(text, "reasoning") for text in _cut(self.reasoning)]
        parts += [(text, "content") for text in _cut(self.content)]
        try:
            for index, (text, kind) in enumerate(parts):
                self.on_piece(index)
                pair = (text, "") if kind == "reasoning" else ("", text)
                yield StreamDelta("0", 0, text, *pair, token_ids=(index,))
            is_done = True
            yield StreamDelta("0", 0, "", "", "", (), "stop", self._output(params))
        finally:
            self.num_aborts += not is_done


def _cut(text: str) -> list[str]:
    return [text[start : start + 3] for start in range(0, len(text), 3)]


@pytest.fixture
def llm(monkeypatch: pytest.MonkeyPatch) -> FakeLLM:
    """The stand-in, put where commands open their model."""
    fake = FakeLLM()

    def open_fake(model: str, engine_options: dict[str, Any]) -> FakeLLM:
        fake.opened.append((model, engine_options))
        return fake

    monkeypatch.setattr(options, "open_llm", open_fake)
    return fake


@pytest.fixture(scope="module")
def shared() -> Iterator[LLM]:
    with LLM(num_threads=1) as llm:
        yield llm


@pytest.fixture
def tiny(shared: LLM, monkeypatch: pytest.MonkeyPatch) -> LLM:
    """One model for all commands, which do not close it."""
    monkeypatch.setattr(options, "open_llm", lambda model, given: contextlib.nullcontext(shared))
    return shared


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


@dataclass
class Result:
    code: int
    out: str
    err: str


Moejet = Callable[..., Result]


@pytest.fixture
def moejet(monkeypatch: pytest.MonkeyPatch) -> Moejet:
    """Runs the command line: moejet("run", "prompt", stdin="...", terminal=True) -> Result."""

    def run(*arguments: str, stdin: str | None = None, terminal: bool = False) -> Result:
        out, err = (Terminal() if terminal else io.StringIO() for _ in range(2))
        with monkeypatch.context() as patch:
            patch.delenv("NO_COLOR", raising=False)
            patch.setenv("TERM", "xterm")
            patch.setattr("sys.stdin", Terminal() if stdin is None else io.StringIO(stdin))
            patch.setattr("sys.stdout", out)
            patch.setattr("sys.stderr", err)
            code = main(arguments)
        return Result(code, out.getvalue(), err.getvalue())

    return run
