"""Entry point of the `moejet` command: finds the command, runs it, turns errors into one line.

Exit codes: 0 done · 1 the machine or the network would not · 2 the user's input · 130 Ctrl-C ·
141 the reader of our output went away. Unknown exceptions are bugs and keep their traceback.
"""

import argparse
import difflib
import io
import logging
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import moejet
from moejet.environment import env_log_level
from moejet.expected_errors import EXPECTED_ERRORS, describe_error

# Command -> (module, one line of help). Modules are imported when their command is used.
COMMANDS = {
    "run": ("moejet.cli.run", "answer one prompt"),
    "chat": ("moejet.cli.chat", "hold a conversation in the terminal"),
    "pull": ("moejet.cli.pull", "download a model, or check one that is here"),
    "eval": ("moejet.cli.eval", "measure strategies on a file of problems"),
    "bench": ("moejet.cli.bench", "measure tokens per second"),
    "plan": ("moejet.cli.plan", "say where the memory goes and how fast a model will be"),
    "cache": ("moejet.cli.cache", "list, check or remove packed weights and prefixes on disk"),
    "serve": ("moejet.cli.serve", "serve a model to OpenAI's and Anthropic's clients"),
    "doctor": ("moejet.cli.doctor", "check this machine and this installation"),
}
# Second words that make another command of the first.
SUBCOMMANDS = {
    "bench ceilings": ("moejet.cli.bench_ceilings", "measure what this machine can do at most"),
    "bench moe": ("moejet.cli.bench_moe", "measure one layer of routed experts"),
    "bench gpu": ("moejet.cli.bench_gpu", "measure the GPU kernels"),
    "bench compare": ("moejet.cli.bench_compare", "compare two files of results"),
}


class CommandParser(argparse.ArgumentParser):
    """ArgumentParser with our error line, and with near misses named for unknown options."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"moejet: error: {message} (try '{self.prog} --help')\n")

    def parse(self, argv: Sequence[str]) -> argparse.Namespace:
        """Parse with options and positionals in any order; unknown ones end the program."""
        words = list(argv)
        cut = words.index("--") if "--" in words else len(words)
        args, unknown = self.parse_known_intermixed_args(words[:cut])
        for text in unknown:
            if text.startswith("-") and len(text) > 1:
                name = text.partition("=")[0]
                self.error(f"unknown option {name}{near_miss(name, self._option_string_actions)}")
        self._add_literal_words(args, words[cut + 1 :], unknown)
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}")
        return args

    def _add_literal_words(
        self, args: argparse.Namespace, words: list[str], unknown: list[str]
    ) -> None:
        """Give the words after "--" to the positional; argparse's intermixed parsing loses them."""
        positional = next(iter(self._get_positional_actions()), None)
        for word in words:
            value = None if positional is None else getattr(args, positional.dest)
            if positional is not None and positional.nargs == "*":
                setattr(args, positional.dest, [*(value or []), word])
            elif positional is not None and value == positional.default:
                setattr(args, positional.dest, word)
            else:
                unknown.append(word)


def near_miss(name: str, known: Sequence[str] | dict[str, Any]) -> str:
    """ "; did you mean X?" for the known name nearest to `name`, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else ""


def split_command(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """The command, of one or two words, and what follows it. Wrong second words end the program."""
    first, *rest = arguments
    words = [name.split()[1] for name in SUBCOMMANDS if name.split()[0] == first]
    if not words or not rest or rest[0].startswith("-"):
        return first, rest
    if rest[0] not in words:
        hint = near_miss(rest[0], words) or f"; known: {', '.join(words)}"
        build_parser(first).error(f"unexpected argument {rest[0]!r}{hint}")
    return f"{first} {rest[0]}", rest[1:]


def build_parser(command: str) -> CommandParser:
    """The parser of one command."""
    module, summary = (COMMANDS | SUBCOMMANDS)[command]
    description = summary[0].upper() + summary[1:] + "."
    for name, (_, text) in SUBCOMMANDS.items():
        if name.startswith(f"{command} "):
            description += f"\n'moejet {name}': {text}; see 'moejet {name} --help'."
    parser = CommandParser(
        prog=f"moejet {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    import_module(module).add_options(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line in `argv` (default: sys.argv) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    # A terminal or pipe that cannot show a character gets "?", not a UnicodeEncodeError.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        try:
            code = _dispatch(arguments)
        except SystemExit as stop:  # argparse: --help, --version and bad options
            code = stop.code if isinstance(stop.code, int) else 0
        sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        _silence_stdout()
        return 141
    return code


def _silence_stdout() -> None:
    # Python flushes stdout once more at exit; give it a place to go.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> int:
    try:
        level = env_log_level()
    except ValueError as error:
        return fail(str(error), 2)
    logging.basicConfig(level=level, format="moejet: %(levelname)s: %(name)s: %(message)s")
    try:
        if not arguments or arguments[0] not in COMMANDS:
            return _without_command(arguments)
        command, rest = split_command(arguments)
        args = build_parser(command).parse(rest)
        code: int = import_module((COMMANDS | SUBCOMMANDS)[command][0]).execute(args)
        return code
    except EXPECTED_ERRORS as error:
        if isinstance(error, BrokenPipeError):
            raise
        logging.getLogger(__name__).debug("the command failed", exc_info=True)
        return fail(*describe_error(error))


def fail(message: str, code: int) -> int:
    print(f"moejet: error: {message}", file=sys.stderr)
    return code


def _without_command(arguments: list[str]) -> int:
    lines = "\n".join(f"  {name:<9}{summary}" for name, (_, summary) in COMMANDS.items())
    parser = CommandParser(
        prog="moejet",
        usage="moejet COMMAND [options]",
        description="Runs DeepSeek-class mixture-of-experts reasoners on this machine.",
        epilog=f"commands:\n{lines}\n\n'moejet COMMAND --help' explains a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"moejet {moejet.__version__}")
    if not arguments:
        parser.print_help()
        return 0
    if not arguments[0].startswith("-"):
        known = ", ".join(COMMANDS)
        hint = near_miss(arguments[0], COMMANDS) or f"; commands: {known}"
        parser.error(f"unknown command {arguments[0]!r}{hint}")
    parser.parse(arguments)
    raise AssertionError(f"parser.parse accepted {arguments=} without a command")
