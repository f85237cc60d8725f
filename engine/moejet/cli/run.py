"""`moejet run`: one prompt, answered on stdout while it is generated; figures go to stderr."""

import argparse
import json
import math
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejet.cli import options
from moejet.cli.effort import add_effort_option, template_of, with_level
from moejet.cli.strategies import check_options, run_strategy
from moejet.cli.terminal import AnswerWriter, note, style
from moejet.progress import counted

if TYPE_CHECKING:
    from collections.abc import Iterator

    from moejet.llm import LLM
    from moejet.request import CompletionOutput, RequestOutput, SamplingParams, StreamDelta

_EPILOG = """\
examples:
  moejet run "Start with 17, add 25, then multiply by 3."
  moejet run ./DeepSeek-V2-Lite-Chat "Why is the sky blue?" --max-tokens 300
  moejet run --strategy vote:8 "Take 90, subtract 34, then divide by 7 and add 200."
  echo "Take 40, subtract 15." | moejet run --json
"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moejet run`."""
    parser.usage = "moejet run [options] [MODEL] PROMPT"
    parser.epilog = _EPILOG
    parser.add_argument(
        "words",
        nargs="*",
        metavar="[MODEL] PROMPT",
        help="PROMPT alone asks the embedded tiny reasoner; MODEL is a directory, GGUF file or hub id "
        "(org/name); PROMPT '-' reads standard input, and so does leaving both out",
    )
    parser.add_argument("--system", metavar="TEXT", help="system message before the prompt")
    parser.add_argument("--raw", action="store_true", help="continue the text: no chat template")
    parser.add_argument("--hide-thinking", action="store_true", help="print only the answer")
    parser.add_argument("--json", action="store_true", help="print one JSON object, at the end")
    parser.add_argument(
        "-q", "--quiet", action="store_true", help="no lines about model and speed on stderr"
    )
    add_effort_option(parser)
    parser.add_argument(
        "--strategy",
        metavar="SPEC",
        help="answer by more thinking, such as vote:16, best:8:logprob, adaptive:16 (README: "
        "Reasoning), or auto: what suits --effort",
    )
    options.add_sampling_options(parser)
    parser.add_argument("-n", type=int, metavar="N", help="number of answers")
    parser.add_argument(
        "--logprobs", type=int, metavar="N", help="with --json: the N likeliest tokens per token"
    )
    options.add_engine_options(parser)


def execute(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    model, prompt = _model_and_prompt(args.words)
    if args.logprobs is not None and not args.json:
        raise ValueError("--logprobs needs --json: the plain output has no place for them")
    if args.raw and args.system is not None:
        raise ValueError("--system does not go with --raw: a raw prompt has no messages")
    if args.strategy is not None:
        check_options(args)
    options.sampling_changes(args)
    with options.open_llm(model, options.engine_options(args)) as llm:
        if not (args.json or args.quiet):
            note(llm.describe())
        params = with_level(options.sampling_params(args, llm), args.effort, model, llm)
        if args.strategy is not None:
            asked = prompt if args.raw else _messages(prompt, args)
            run_strategy(llm, model, asked, params, args)
            return 0
        if args.json or params.n > 1:
            output = _generate(llm, prompt, params, args)
            if args.json:
                print(json.dumps(to_json(model, output, params), allow_nan=False))
            else:
                _print_all(output, args)
        else:
            output = _stream(llm, prompt, params, args)
    if not (args.json or args.quiet):
        note(figures(output))
    return 0


def _model_and_prompt(words: list[str]) -> tuple[str, str]:
    if len(words) > 2:
        raise ValueError(
            f"{len(words)} arguments given, at most MODEL and PROMPT expected: "
            "put the prompt into quotes"
        )
    if not words:
        if sys.stdin.isatty():
            raise ValueError('the prompt is missing: moejet run "PROMPT"')
        words = ["-"]
    prompt = words[-1]
    if len(words) == 1 and (options.looks_like_model(prompt) or _is_model_directory(prompt)):
        raise ValueError(
            f"{prompt!r} looks like a model and the prompt is missing: "
            f'moejet run {prompt} "PROMPT", or - as the prompt to read standard input'
        )
    if prompt == "-":
        prompt = sys.stdin.read().removesuffix("\n")
    if not prompt.strip():
        raise ValueError("the prompt is empty")
    return (words[0] if len(words) == 2 else options.DEFAULT_MODEL), prompt


def _is_model_directory(text: str) -> bool:
    # A long prompt is not a path; asking the file system about it would raise.
    return len(text) < 256 and "\0" not in text and (Path(text) / "config.json").is_file()


def _messages(prompt: str, args: argparse.Namespace) -> list[dict[str, str]]:
    system = [{"role": "system", "content": args.system}] if args.system is not None else []
    return [*system, {"role": "user", "content": prompt}]


def _generate(
    llm: "LLM", prompt: str, params: "SamplingParams", args: argparse.Namespace
) -> "RequestOutput":
    if args.raw:
        return llm.generate(prompt, params)[0]
    return llm.chat(_messages(prompt, args), params, **template_of(args.effort, llm))[0]


def _stream(
    llm: "LLM", prompt: str, params: "SamplingParams", args: argparse.Namespace
) -> "RequestOutput":
    deltas: Iterator[StreamDelta] = (
        llm.stream(prompt, params)
        if args.raw
        else llm.stream_chat(_messages(prompt, args), params, **template_of(args.effort, llm))
    )
    writer = AnswerWriter(sys.stdout, hide_thinking=args.hide_thinking)
    output: RequestOutput | None = None
    # Closing the stream aborts the request, also when Ctrl-C or a closed pipe ends the loop.
    with closing(deltas):  # type: ignore[type-var]
        try:
            for delta in deltas:
                if args.raw:
                    writer.push_raw(delta.text)
                else:
                    writer.push(delta.reasoning, delta.content)
                output = delta.output or output
        finally:
            writer.finish()
    if output is None:
        raise RuntimeError("the stream ended without a final output")
    if args.raw and not output.outputs[0].text.endswith("\n"):
        print()
    return output


def _print_all(output: "RequestOutput", args: argparse.Namespace) -> None:
    for answer in output.outputs:
        heading = f"--- {answer.index + 1} of {len(output.outputs)} ---"
        print(style(heading, "bold", sys.stdout))
        writer = AnswerWriter(sys.stdout, hide_thinking=args.hide_thinking)
        if args.raw:
            writer.push("", answer.text)
        else:
            writer.push(answer.reasoning or "", answer.content)
        writer.finish()


def figures(output: "RequestOutput") -> str:
    """One line: tokens and speed of prompt and answer, and why the answer ended early if it did."""
    timings = output.timings
    prompt = _tokens("prompt", timings.prompt_tokens, timings.prompt_tokens_per_s)
    answer = _tokens("answer", timings.completion_tokens, timings.decode_tokens_per_s)
    line = f"{prompt} · {answer}"
    if any(o.finish_reason == "length" for o in output.outputs):
        line += " · cut off: token limit reached"
    return line


def _tokens(name: str, count: int, rate: float | None) -> str:
    text = f"{name} {counted(count, 'token')}"
    # Nothing was timed: a prompt found in the cache, or an answer of one token.
    if rate is None or not math.isfinite(rate) or rate <= 0:
        return text
    return f"{text}, {rate:.0f} tok/s" if rate >= 10 else f"{text}, {rate:.2f} tok/s"


def to_json(model: str, output: "RequestOutput", params: "SamplingParams") -> dict[str, Any]:
    """The object that --json prints: the first answer's fields, and all answers if n > 1."""
    timings = output.timings
    result: dict[str, Any] = {
        "model": model,
        **_answer_json(output.outputs[0], params),
        "timings": {
            "prompt_tokens": timings.prompt_tokens,
            "completion_tokens": timings.completion_tokens,
            "queue_s": _finite(timings.queue_s),
            "prefill_s": _finite(timings.prefill_s),
            "decode_s": _finite(timings.decode_s),
            "time_to_first_token_s": _finite(timings.time_to_first_token_s),
            "prompt_tokens_per_s": _finite(timings.prompt_tokens_per_s),
            "decode_tokens_per_s": _finite(timings.decode_tokens_per_s),
        },
    }
    if params.n > 1:
        result["outputs"] = [_answer_json(answer, params) for answer in output.outputs]
    return result


def _answer_json(answer: "CompletionOutput", params: "SamplingParams") -> dict[str, Any]:
    result: dict[str, Any] = {
        "text": answer.text,
        "reasoning": answer.reasoning,
        "content": answer.content,
        "token_ids": list(answer.token_ids),
        "finish_reason": answer.finish_reason,
        "stop_reason": answer.stop_reason,
    }
    if params.logprobs is not None:
        result["cumulative_logprob"] = _finite(answer.cumulative_logprob)
        result["logprobs"] = [
            {
                "token_id": token.token_id,
                "logprob": _finite(token.logprob),
                "top": [[token_id, _finite(value)] for token_id, value in token.top],
            }
            for token in answer.logprobs or ()
        ]
    return result


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: a token that cannot follow has logprob null."""
    return value if value is not None and math.isfinite(value) else None
