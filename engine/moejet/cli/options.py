"""Options that several commands share, and how they become SamplingParams and an LLM."""

import argparse
import os
import re
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejet.config import (
    ARITHMETICS,
    CACHE_DTYPES,
    DENSE_FORMATS,
    DEVICES,
    EXPERT_FORMATS,
    ISAS,
)
from moejet.validation import near_miss, short

if TYPE_CHECKING:
    from moejet.llm import LLM
    from moejet.request import SamplingParams

DEFAULT_MODEL = "tiny-reasoner"
_MAX_SECONDS = 1e6

# Option -> (SamplingParams field, type, help). Options that are not given keep the model's default.
SAMPLING: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "--temperature": ("temperature", float, "0 takes the likeliest token"),
    "--top-k": ("top_k", int, "choose among the K likeliest tokens; 0: all"),
    "--top-p": ("top_p", float, "choose among the likeliest tokens of this total probability"),
    "--min-p": ("min_p", float, "drop tokens below this share of the likeliest one's probability"),
    "--repetition-penalty": (
        "repetition_penalty",
        float,
        "divide the score of tokens seen; 1: off",
    ),
    "--presence-penalty": ("presence_penalty", float, "subtract once from tokens already written"),
    "--frequency-penalty": ("frequency_penalty", float, "subtract for each time a token occurred"),
    "--seed": ("seed", int, "makes the sampling repeatable"),
    "--max-tokens": ("max_tokens", int, "stop after this many tokens, thinking included"),
}


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """Add one option per SamplingParams field that makes sense for a single answer."""
    group = parser.add_argument_group(
        "sampling", "Where an option is not given, the model's generation_config.json decides."
    )
    for option, (field, kind, text) in SAMPLING.items():
        group.add_argument(option, dest=field, type=kind, metavar=_metavar(kind), help=text)
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="stop at this text (repeatable)"
    )
    group.add_argument(
        "--stop-in-reasoning", action="store_true", help="let --stop end the thinking as well"
    )
    group.add_argument(
        "--ignore-eos", action="store_true", help="go on after the end-of-text token"
    )


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add the EngineConfig fields that a user sets by hand."""
    group = parser.add_argument_group("engine")
    add_format_options(group)
    group.add_argument(
        "--packed-cache",
        choices=("auto", "on", "off", "verify"),
        help="keep packed weights on disk for the next start (default auto: if they are large; "
        "verify: compare checksums on loading; MOEJET_CACHE says where)",
    )
    group.add_argument(
        "--prefix-disk-gib",
        type=float,
        metavar="GIB",
        help="keep what was computed of long contexts on disk, up to GIB (default 0: do not)",
    )
    group.add_argument(
        "--max-context", type=int, metavar="N", help="room for prompt and answer, in tokens"
    )
    add_threads_option(group)
    add_isa_option(group)
    add_arithmetic_option(group)
    add_device_options(group)
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit on the model hub")


def add_format_options(group: argparse._ActionsContainer) -> None:
    """Add the packed formats of weights and the type of the cache."""
    group.add_argument(
        "--expert-format",
        choices=("auto", "native", *EXPERT_FORMATS),
        help="how routed experts are kept in memory (default auto: int4_g32, or the checkpoint's own "
        "format, native, if that has about 4 bits)",
    )
    group.add_argument(
        "--dense-format",
        choices=("auto", "native", *DENSE_FORMATS),
        help="type of all other weights (default auto: int8, or native for quantised GGUF files)",
    )
    add_cache_option(group)


def add_cache_option(group: argparse._ActionsContainer) -> None:
    """Add --cache-dtype."""
    group.add_argument(
        "--cache-dtype",
        choices=CACHE_DTYPES,
        help="type of the latent cache (default bf16); fp8 takes 0.57 of its bytes",
    )


def add_threads_option(group: argparse._ActionsContainer, *short_names: str) -> None:
    """Add --threads."""
    group.add_argument(
        *short_names,
        "--threads",
        dest="num_threads",
        type=count,
        metavar="N",
        help="CPU threads (default: physical cores that this process may use)",
    )


def add_isa_option(group: argparse._ActionsContainer) -> None:
    """Add --isa; the choices are those of the CPU kernels."""
    group.add_argument(
        "--isa", choices=("auto", *ISAS), help="CPU instruction set (default auto: the widest)"
    )


def add_arithmetic_option(group: argparse._ActionsContainer) -> None:
    """Add --arithmetic."""
    group.add_argument(
        "--arithmetic",
        choices=ARITHMETICS,
        help="what AMX multiplies int4_g32 and int8 weights in (default bf16); int8 is faster and "
        "less exact; changes nothing without AMX",
    )


def add_device_options(group: argparse._ActionsContainer) -> None:
    """Add where the model runs, and how much of a GPU it may take."""
    group.add_argument(
        "--device",
        choices=DEVICES[:3],
        help="where everything but routed experts runs (default auto: a GPU if there is one)",
    )
    group.add_argument(
        "--vram",
        dest="vram_gib",
        type=float,
        metavar="GIB",
        help="GPU memory to use at most (default: what is free)",
    )
    group.add_argument(
        "--gpu-experts",
        type=int,
        metavar="N",
        help="routed experts, of all layers together, that live on the GPU (default: as many as fit)",
    )
    add_expert_cache_option(group)
    group.add_argument(
        "--stream-prefill-tokens",
        type=number_or_auto,
        metavar="N",
        help="prompts of so many tokens a step or more copy experts from RAM to the GPU; 0: never "
        "(default auto: where that is faster)",
    )


def add_expert_cache_option(group: argparse._ActionsContainer) -> None:
    """Add --expert-cache."""
    group.add_argument(
        "--expert-cache",
        type=number_or_auto,
        metavar="N",
        help="experts in RAM of which the GPU may have a copy, those used most; auto: half of the "
        "memory that is left for experts (default 0)",
    )


def counts(text: str) -> list[int]:
    """argparse type: numbers such as 128,512."""
    try:
        values = [int(part) for part in text.split(",")]
    except ValueError:
        values = [-1]
    if min(values) < 0:
        raise argparse.ArgumentTypeError("must be a list of whole numbers such as 128,512")
    return values


def number_or_auto(text: str) -> int | str:
    """argparse type: a number, or auto."""
    if text == "auto":
        return text
    return count(text, 0, "auto or a whole number")


def count(text: str, low: int = 1, wanted: str = "a whole number of at least 1") -> int:
    """argparse type: a whole number."""
    # Of no more digits than Python reads.
    if not text.isdecimal() or len(text) > 30 or int(text) < low:
        raise argparse.ArgumentTypeError(f"must be {wanted}")
    return int(text)


def positive(text: str) -> float:
    """argparse type: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError("must be a number above 0")
    return value


def seconds(text: str) -> float:
    """argparse type: seconds, 0 included, that a clock can count."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= _MAX_SECONDS:
        raise argparse.ArgumentTypeError(f"must be a number between 0 and {_MAX_SECONDS:g} seconds")
    return value


def input_file(text: str) -> Path:
    """argparse type: a file that can be read."""
    path = _path(text)
    if not path.exists():
        raise argparse.ArgumentTypeError("does not exist: check the path")
    if path.is_dir():
        raise argparse.ArgumentTypeError("is a directory: give a file")
    if not os.access(path, os.R_OK):
        raise argparse.ArgumentTypeError("cannot be read: check its permissions")
    return path


def output_file(text: str) -> Path:
    """argparse type: a file that can be written, whether it exists or not."""
    path = _path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError("is a directory: give a file")
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"needs the directory {path.parent}: create it first")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise argparse.ArgumentTypeError("cannot be written: check the permissions")
    return path


def directory(text: str) -> Path:
    """argparse type: a directory, whether it exists or not."""
    path = _path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError("is a file: give a directory")
    return path


def lines_file(text: str) -> str:
    """argparse type: a file to append to, or - for stdout."""
    return text if text == "-" else str(output_file(text))


def _path(text: str) -> Path:
    """A path that the operating system would look up."""
    if not text:
        raise argparse.ArgumentTypeError("must be a path, not empty")
    try:
        os.stat(text)
    except FileNotFoundError:
        pass
    except ValueError:
        raise argparse.ArgumentTypeError("must be a path without such a character") from None
    except OSError as error:
        reason = (error.strerror or "").lower()
        raise argparse.ArgumentTypeError(f"must be another path: {reason}") from None
    return Path(text)


def preset(text: str) -> str:
    """argparse type: the shape of a published model."""
    from moejet.presets import parse_preset

    try:
        parse_preset(text)
    except ValueError as error:
        message = str(error).removeprefix(f"shape={short(text)} ")
        raise argparse.ArgumentTypeError(message) from None
    return text


def names_of(known: Collection[str]) -> Callable[[str], list[str]]:
    """argparse type: one or several of the known names, with commas between them."""

    def parse(text: str) -> list[str]:
        for part in text.split(","):
            if part not in known:
                message = f"holds {short(part)}, which is not one of {', '.join(known)}"
                raise argparse.ArgumentTypeError(message + near_miss(part, known))
        return text.split(",")

    return parse


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The engine options that were given, as keyword arguments for LLM."""
    names = (
        "expert_format",
        "dense_format",
        "cache_dtype",
        "packed_cache",
        "prefix_disk_gib",
        "max_context",
        "num_threads",
        "isa",
        "arithmetic",
        "device",
        "vram_gib",
        "gpu_experts",
        "expert_cache",
        "stream_prefill_tokens",
        "revision",
    )
    return {n: v for n in names if (v := getattr(args, n, None)) is not None}


def open_llm(model: str, options: dict[str, Any]) -> "LLM":
    """Load a model. The one place where commands that generate text import the engine."""
    return engine_class()(model, **options)


def quiet_openmp() -> None:
    """Make torch's threads sleep when idle. Has to come before torch is imported.

    torch's OpenMP threads spin after each operation unless told otherwise before torch is loaded.
    They would spin on the CPUs that our expert threads need next; on a busy machine that costs a
    factor of ten.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def engine_class() -> "type[LLM]":
    """Import LLM, and torch with it, in the state that suits a program of our own."""
    quiet_openmp()
    from moejet.llm import LLM

    return LLM


def sampling_changes(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given. Raises ValueError for impossible ones, before anything is loaded."""
    from moejet.request import SamplingParams

    changes = {
        field: value
        for field, _, _ in SAMPLING.values()
        if (value := getattr(args, field)) is not None
    }
    if args.stop:
        changes["stop"] = tuple(args.stop)
    changes |= {n: True for n in ("stop_in_reasoning", "ignore_eos") if getattr(args, n)}
    for name in ("n", "logprobs"):
        if getattr(args, name, None) is not None:
            changes[name] = getattr(args, name)
    SamplingParams(**changes)
    return changes


def sampling_params(args: argparse.Namespace, llm: "LLM") -> "SamplingParams":
    """The model's default sampling with the given options on top."""
    return replace(llm.default_sampling(), **sampling_changes(args))


def looks_like_model(text: str) -> bool:
    """True for "org/name" and for paths: text that was hardly meant as a prompt."""
    return bool(re.fullmatch(r"[A-Za-z][\w.-]*/[\w.-]*[A-Za-z][\w.-]*|[./~][^\s]*/[^\s]*", text))


def _metavar(kind: Callable[[str], Any]) -> str:
    return "N" if kind is int else "X"
