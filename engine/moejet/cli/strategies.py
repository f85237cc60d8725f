"""`moejet run --strategy`: a prompt answered by a strategy, with its progress and what it has cost on stderr."""

import argparse
import json
import math
import secrets
import shutil
import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing, contextmanager
from typing import TYPE_CHECKING, Any, cast

from moejet.cli import options
from moejet.cli.effort import resolve_strategy, template_of
from moejet.cli.terminal import AnswerWriter, note
from moejet.cli.tree import print_tree
from moejet.progress import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

    from moejet.config import ModelConfig
    from moejet.llm import LLM
    from moejet.reasoning.result import Progress, Result
    from moejet.request import SamplingParams


def check_options(args: argparse.Namespace) -> None:
    """Raises ValueError for options that mean nothing, or something else, with a strategy."""
    for name, option, remedy in (
        ("n", "-n", "vote:N and others take the number of samples"),
        ("logprobs", "--logprobs", "leave it out"),
    ):
        if getattr(args, name) is not None:
            given = f"{option}={getattr(args, name)}"
            raise ValueError(f"{given} does not go with --strategy: {remedy}")
    check_specs([resolve_strategy(args.strategy.strip(), args.effort)])


def check_specs(specs: Sequence[str]) -> None:
    """What can be known to be wrong with specifications before anything is loaded."""
    options.quiet_openmp()
    from moejet.reasoning.specs import check_spec

    for spec in specs:
        check_spec(spec)


def run_strategy(
    llm: "LLM", model: str, prompt: Any, params: "SamplingParams", args: argparse.Namespace
) -> None:
    """prompt: messages, or a text that goes through no chat template."""
    from moejet.reasoning.result import Result
    from moejet.reasoning.solver import stream
    from moejet.reasoning.specs import parse_strategy

    spec = resolve_strategy(args.strategy.strip(), args.effort)
    is_quiet = args.quiet or args.json
    result: Result | None = None
    told = ""
    with models_by_name(llm, model, args) as load:
        events = stream(
            llm,
            prompt,
            parse_strategy(spec, llm, load=load),
            params=params,
            seed=secrets.randbits(63) if args.seed is None else args.seed,
            template_kwargs={} if args.raw else template_of(args.effort, llm),
        )
        # Closing the generator ends the run, also when Ctrl-C or a closed pipe ends the loop.
        with closing(cast("Generator[Progress | Result, None, None]", events)) as events:
            for event in events:
                if isinstance(event, Result):
                    result = event
                elif not is_quiet and event.message != told:  # a step tells of each of its nodes
                    told = event.message
                    note(told)
    assert result is not None
    if args.json:
        found = {"model": model, "strategy": spec, **result.as_dict()}
        print(json.dumps(found, allow_nan=False))
        return
    if result.nodes and not is_quiet:
        print_tree(result.nodes, sys.stderr, width=shutil.get_terminal_size((100, 24)).columns)
    writer = AnswerWriter(sys.stdout, hide_thinking=args.hide_thinking)
    if args.raw:
        writer.push("", result.text)
    else:
        writer.push(result.reasoning or "", result.content)
    writer.finish()
    if not is_quiet:
        note(figures(result, llm.model_config))


@contextmanager
def models_by_name(
    llm: "LLM", model: str, args: argparse.Namespace
) -> "Iterator[Callable[[str], LLM]]":
    """Loads second models that a strategy names, each once, with the first one's options."""
    with ExitStack() as stack:
        loaded = {model: llm}

        def load(name: str) -> "LLM":
            if name not in loaded:
                chosen = {**options.engine_options(args), "revision": None}
                loaded[name] = stack.enter_context(options.open_llm(name, chosen))
            return loaded[name]

        yield load


def figures(result: "Result", model: "ModelConfig") -> str:
    """One line: what the run has cost, and how sure the strategy is."""
    from moejet.reasoning.cost import expert_reads

    usage = result.usage
    parts = [f"prompt {counted(usage.prompt_tokens, 'token')}"]
    parts += [f"{counted(usage.generated_tokens, 'token')} ({usage.thinking_tokens} of thinking)"]
    if injected := usage.injected_tokens + usage.appended_tokens:
        parts += [f"{injected} injected"]
    parts += [counted(usage.branches, "branch", "es"), counted(usage.steps, "step")]
    reads = expert_reads(usage, model)
    if reads is not None:
        loads = f"{usage.expert_loads:.0f} expert loads ({usage.expert_bytes / 1e6:.1f} MB)"
        parts += [loads, str(reads)]
    parts += [f"{usage.seconds:.1f} s"]
    if not math.isnan(result.confidence):
        parts += [f"confidence {result.confidence:.2f}"]
    if result.is_exhausted:
        parts += ["the budget ended it"]
    if result.candidate.finish_reason == "length":
        parts += ["cut off: token limit reached"]
    return " · ".join(parts)
