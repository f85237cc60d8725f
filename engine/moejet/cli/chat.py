"""`moejet chat`: a conversation in the terminal, or one message per line from a pipe."""

import argparse
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from moejet.cli import options
from moejet.cli.effort import EFFORTS, add_effort_option, template_of, with_level
from moejet.cli.run import figures
from moejet.cli.terminal import AnswerWriter, note
from moejet.progress import counted
from moejet.validation import near_miss

if TYPE_CHECKING:
    from moejet.llm import LLM
    from moejet.request import RequestOutput, SamplingParams

_HELP = """\
/help    this text
/reset   forget the conversation (the system message stays)
/stats   tokens and speed so far
/effort  LEVEL: how hard to think from here on; without LEVEL, says what it is
/exit    leave (Ctrl-D does the same)
Ctrl-C stops an answer; pressed again before the answer has stopped, it leaves the program."""
_COMMANDS = ("/help", "/reset", "/stats", "/effort", "/exit")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moejet chat`."""
    parser.usage = "moejet chat [options] [MODEL]"
    parser.epilog = f"in the conversation:\n{_HELP}\n"
    parser.add_argument(
        "model",
        nargs="?",
        default=options.DEFAULT_MODEL,
        metavar="MODEL",
        help="directory, GGUF file or hub id (org/name, org/name:QUANT); default: the embedded tiny reasoner",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message of the conversation")
    parser.add_argument("--hide-thinking", action="store_true", help="print only the answers")
    add_effort_option(parser)
    options.add_sampling_options(parser)
    options.add_engine_options(parser)


def execute(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    options.sampling_changes(args)
    with options.open_llm(args.model, options.engine_options(args)) as llm:
        params = options.sampling_params(args, llm)
        conversation = Conversation(
            llm,
            params,
            args.system,
            model=args.model,
            effort=args.effort,
            hide_thinking=args.hide_thinking,
        )
        interactive = sys.stdin.isatty()
        if interactive:
            _enable_line_editing()
            note(llm.describe())
            note(f"{args.model}: /help lists the commands, Ctrl-D leaves")
        for line in _lines(interactive):
            if not conversation.handle(line):
                break
    # A person has seen the refusal; a script that pipes messages in must be told.
    return 2 if conversation.num_refused and not interactive else 0


def _enable_line_editing() -> None:
    # Importing readline gives input() history and editing; some Python builds lack it.
    try:
        import readline  # noqa: F401
    except ImportError:
        note("no line editing: this Python was built without readline")


def _lines(interactive: bool) -> Iterator[str]:
    """The user's lines until end of file. Ctrl-C at the prompt drops the line being typed."""
    if not interactive:
        yield from sys.stdin
        return
    while True:
        try:
            if sys.stdout.isatty():
                yield input("> ")
            else:  # the answers go to a file: keep the prompt out of it
                print("> ", end="", file=sys.stderr, flush=True)
                yield input()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            note("Ctrl-D or /exit leaves")


class Conversation:
    """The messages so far, and what happens with each line that the user enters.

    Only finished turns are kept. Reasoning is left out of the history, as these models are
    trained; a stopped answer stays in it as far as it came, a stopped thought takes the whole
    turn with it.
    """

    def __init__(
        self,
        llm: "LLM",
        params: "SamplingParams",
        system: str | None,
        *,
        model: str,
        effort: str | None,
        hide_thinking: bool,
    ) -> None:
        self._llm = llm
        self._params = params
        self._model = model
        self._effort = effort
        self._hide_thinking = hide_thinking
        self._system = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, str]] = list(self._system)
        self._outputs: list[RequestOutput] = []
        self.num_refused = 0

    def handle(self, line: str) -> bool:
        """Answer a message or obey a command; False ends the conversation."""
        text = line.strip()
        if re.fullmatch(r"/[A-Za-z]\w*", text):
            return self._command(text)
        if re.fullmatch(r"/effort\s+\S+", text):
            self._set_effort(text.split()[1])
            return True
        if text:
            self._turn(text)
        return True

    def _command(self, name: str) -> bool:
        if name == "/help":
            note(_HELP)
        elif name == "/reset":
            self.messages = list(self._system)
            self._outputs.clear()
            note("the conversation is forgotten")
        elif name == "/stats":
            note(self.stats())
        elif name == "/effort":
            note(f"effort: {self._effort or 'not set'}; levels: {', '.join(EFFORTS)}")
        elif name != "/exit":
            hint = near_miss(name, _COMMANDS)
            note(f"unknown command {name}{hint or '; /help lists the commands'}")
        return name != "/exit"

    def _set_effort(self, level: str) -> None:
        if level not in EFFORTS:
            note(f"unknown effort {level}; levels: {', '.join(EFFORTS)}")
            return
        self._effort = level
        note(f"effort: {level}")

    def stats(self) -> str:
        """Turns, tokens and speeds since the start or the last /reset."""
        if not self._outputs:
            return "no answers yet"
        timings = [output.timings for output in self._outputs]
        last = timings[-1]
        written = sum(t.completion_tokens for t in timings)
        decode_s = sum(t.decode_s for t in timings)
        speed = f", {written / decode_s:.4g} tok/s" if decode_s > 0 else ""
        return (
            f"{counted(len(timings), 'answer')}, {written} tokens"
            f"{speed} · the last turn took {last.prompt_tokens + last.completion_tokens} "
            f"tokens of context"
        )

    def _turn(self, text: str) -> None:
        messages = [*self.messages, {"role": "user", "content": text}]
        params = with_level(self._params, self._effort, self._model, self._llm)
        template = template_of(self._effort, self._llm)
        writer = AnswerWriter(sys.stdout, hide_thinking=self._hide_thinking)
        content: list[str] = []
        output: RequestOutput | None = None
        stopped = False
        try:
            deltas = self._llm.stream_chat(messages, params, **template)
            with _stoppable() as stop, closing(deltas) as ds:
                for delta in ds:
                    writer.push(delta.reasoning, delta.content)
                    content.append(delta.content)
                    output = delta.output or output
                    if stop.requested and output is None:
                        stopped = True
                        break
        except ValueError as error:
            writer.finish()
            self._report_refusal(error)
            return
        finally:
            writer.finish()
        answer = "".join(content).strip()
        if output is not None:
            self._outputs.append(output)
            answer = output.outputs[0].content
            note(figures(output))
            self._explain_limit(output)
        if stopped:
            note("stopped" if answer else "stopped; this turn is left out of the conversation")
        elif not answer:
            note("there was no answer; this turn is left out of the conversation")
        if answer:
            self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _report_refusal(self, error: ValueError) -> None:
        """The engine refused the turn, most often for its length; the conversation goes on."""
        self.num_refused += 1
        print(f"moejet: error: {error}", file=sys.stderr)
        if len(self.messages) > len(self._system):
            note("the message was not sent; /reset starts a new conversation with an empty context")

    def _explain_limit(self, output: "RequestOutput") -> None:
        limit = self._params.max_tokens
        written = output.timings.completion_tokens
        if output.outputs[0].finish_reason == "length" and (limit is None or written < limit):
            note("the context is full: /reset starts a new conversation")


class _Stop:
    requested = False


@contextmanager
def _stoppable() -> Iterator[_Stop]:
    """Turn Ctrl-C into a flag, so that the engine is never interrupted inside a step.

    A second Ctrl-C raises KeyboardInterrupt as usual: the way out while a long prompt is read.
    """
    stop = _Stop()

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        if stop.requested:
            raise KeyboardInterrupt
        stop.requested = True

    previous = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, previous)
