"""Entry point of the `moejet` command: finds the command, runs it, turns errors into one line.

`--debug` is MOEJET_LOG=debug, which prints the traceback before the line as well.
"""

import argparse
import io
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Any, NoReturn

import moejet
from moejet.environment import env_log_level
from moejet.expected_errors import describe_error
from moejet.validation import near_miss, short

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

EXIT_CODES = {
    0: "done",
    1: "the machine or the network would not, or what was checked is not sound",
    2: "wrong input",
    130: "Ctrl-C",
    141: "the reader of the output went away",
}
_WORDS: dict[Any, str] = {int: "a whole number", float: "a number"}


class CommandParser(argparse.ArgumentParser):
    """ArgumentParser with our error line, and with near misses named for unknown options."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"moejet: error: {message} (try '{self.prog} --help')\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse keeps it to itself when help could not be written, as to a full disk."""
        if message and file is sys.stdout and file is not sys.stderr:
            file.write(message)
        else:
            super()._print_message(message, file)

    def _get_value(self, action: argparse.Action, arg_string: str) -> Any:
        try:
            return super()._get_value(action, arg_string)
        except argparse.ArgumentError as error:
            wanted = _WORDS.get(action.type)
            text = f"must be {wanted}" if wanted is not None else error.message
            raise argparse.ArgumentError(
                None, f"{_name(action)}={short(arg_string)} {text}"
            ) from None

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            known = list(map(str, action.choices))
            text = f"{_name(action)}={short(value)} must be one of {', '.join(known)}"
            raise argparse.ArgumentError(None, text + near_miss(value, known))

    def in_options(self, message: str) -> str:
        """A message that begins with a field's name, with the option in its place that sets the field."""
        field = message.partition("=")[0]
        for action in self._actions:
            if action.dest == field and action.option_strings:
                return f"{_name(action)}{message[len(field) :]}"
        return message

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


def _name(action: argparse.Action) -> str:
    """How a user knows an option or an argument."""
    names = action.option_strings or [str(action.metavar or action.dest)]
    return max(names, key=len)


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
    parser.add_argument(
        "--debug", action="store_true", help="log everything, and show where an error came from"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line in `argv` (default: sys.argv) and return its exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        # A terminal or pipe that cannot show a character gets "?", not a UnicodeEncodeError.
        elif isinstance(stream, io.TextIOWrapper):
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
    except OSError as error:  # of the last flush
        _silence_stdout()
        return fail(f"cannot write the output: {describe_error(error)[0]}", 1)
    return code


def _silence_stdout() -> None:
    # Python flushes stdout once more at exit; give it a place to go.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(arguments: list[str]) -> int:
    if "--debug" in arguments:
        os.environ["MOEJET_LOG"] = "debug"  # of other processes, too
    try:
        level = env_log_level()
    except ValueError as error:
        return fail(str(error), 2)
    logging.basicConfig(level=level, format="moejet: %(levelname)s: %(name)s: %(message)s")
    parser: CommandParser | None = None
    try:
        if not arguments or arguments[0] not in COMMANDS:
            return _without_command(arguments)
        command, rest = split_command(arguments)
        parser = build_parser(command)
        args = parser.parse(rest)
        code: int = import_module((COMMANDS | SUBCOMMANDS)[command][0]).execute(args)
        return code
    except BrokenPipeError:
        raise
    except Exception as error:
        if level <= logging.DEBUG:
            traceback.print_exc()
        text, code = describe_error(error)
        return fail(text if parser is None else parser.in_options(text), code)


def fail(message: str, code: int) -> int:
    print(f"moejet: error: {message}", file=sys.stderr)
    return code


def _without_command(arguments: list[str]) -> int:
    lines = "\n".join(f"  {name:<9}{summary}" for name, (_, summary) in COMMANDS.items())
    codes = "\n".join(f"  {code:<9}{text}" for code, text in EXIT_CODES.items())
    parser = CommandParser(
        prog="moejet",
        usage="moejet COMMAND [options]",
        description="Runs DeepSeek-class mixture-of-experts reasoners on this machine.",
        epilog=f"commands:\n{lines}\n\n'moejet COMMAND --help' explains a command.\n\nexit codes:\n{codes}",
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
