"""The options of `moejet serve`, and what they say about the server and its engine."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejet.cli import options
from moejet.config import EngineConfig
from moejet.environment import env_api_key
from moejet.ticket import check_limits

if TYPE_CHECKING:
    from moejet.server.config import ServerConfig

_EPILOG = """\
examples:
  moejet serve                                     the embedded tiny reasoner, for this machine only
  moejet serve ./DeepSeek-V3 --port 8080
  MOEJET_API_KEY=secret moejet serve org/name --host 0.0.0.0
"""
_ENGINE_LIMITS = ("max_queued_requests", "max_queued_tokens", "step_timeout_s", "memory_gbps")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moejet serve`."""
    parser.usage = "moejet serve [options] [MODEL]"
    parser.epilog = _EPILOG
    parser.add_argument(
        "model",
        nargs="?",
        default=options.DEFAULT_MODEL,
        metavar="MODEL",
        help="directory, GGUF file or hub id (org/name, org/name:QUANT); default: the embedded tiny reasoner",
    )
    _add_server_options(parser)
    _add_limits(parser)
    options.add_engine_options(parser)


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default %(default)s)"
    )
    group.add_argument(
        "--port", type=int, default=8000, metavar="N", help="default %(default)s; 0: any free one"
    )
    group.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="ask clients for this key (repeatable); others can see it in the list of processes, so better "
        "set MOEJET_API_KEY",
    )
    group.add_argument(
        "--api-key-file",
        type=options.input_file,
        metavar="FILE",
        help="ask for one of the keys in FILE, one per line",
    )
    group.add_argument(
        "--insecure", action="store_true", help="let others reach this server without a key"
    )
    group.add_argument(
        "--served-model-name",
        metavar="NAME",
        help="name of the model (default: the last part of MODEL)",
    )
    group.add_argument(
        "--reasoning-field",
        choices=("both", "reasoning_content", "reasoning"),
        default="both",
        help="where answers carry the thinking (default %(default)s)",
    )
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web page that may call this server, such as https://example.org (repeatable)",
    )
    group.add_argument(
        "--allowed-host",
        action="append",
        metavar="NAME",
        help="name under which clients address this server (repeatable; default: localhost and addresses)",
    )
    group.add_argument(
        "--share-cache",
        action="store_true",
        help="let clients with different keys find each other's cached prefixes, which shows by their time",
    )
    group.add_argument(
        "--no-access-log", action="store_true", help="do not log a line per request on stderr"
    )
    group.add_argument(
        "--log-prompts", action="store_true", help="write prompts and answers to the log"
    )
    group.add_argument(
        "--no-strategies",
        action="store_true",
        help="refuse reasoning_strategy, which lets one request have many answers computed",
    )
    group.add_argument(
        "--max-strategy-samples",
        type=int,
        default=64,
        metavar="N",
        help="samples that a strategy may ask for (default %(default)s)",
    )
    group.add_argument(
        "--effort-strategies",
        action="store_true",
        help="let reasoning_effort high and above stand for a vote of several samples",
    )
    group.add_argument(
        "--drain-timeout",
        type=options.seconds,
        default=60.0,
        metavar="SECONDS",
        help="for running requests when the server is told to end (default %(default)g)",
    )
    group.add_argument(
        "--header-timeout",
        type=options.positive,
        default=20.0,
        metavar="SECONDS",
        help="for a request's headers; a connection without them is closed then (default %(default)g)",
    )
    group.add_argument(
        "--max-restarts",
        type=int,
        default=7,
        metavar="N",
        help="times in a row that the engine's process is started again after it has died; then it takes SIGUSR1 "
        "(default %(default)s)",
    )
    group.add_argument(
        "--no-worker", action="store_true", help="run the engine in the server's own process"
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("load")
    for option, kind, text in (
        ("--max-num-requests", int, "samples that run together (default 64)"),
        ("--max-queued-requests", int, "requests that may wait; more get 503 (default 512)"),
        ("--max-queued-tokens", int, "tokens of prompts that may wait (default 1048576)"),
        ("--max-batch-tokens", int, "tokens per step (default 2048)"),
        ("--cache-tokens", int, "room of the latent cache, shared by all requests"),
        ("--seed", int, "base of the seeds of requests that bring none"),
    ):
        group.add_argument(option, type=kind, metavar="N", help=text)
    group.add_argument(
        "--step-timeout",
        dest="step_timeout_s",
        type=float,
        metavar="SECONDS",
        help="a step that takes longer counts as hung (default 600)",
    )
    group.add_argument(
        "--bandwidth",
        dest="memory_gbps",
        type=float,
        metavar="GB/S",
        help="with which memory can be read, for the share of it in /metrics (default: measured at the start, in a "
        "second, for weights of a GiB or more; 0: not wanted)",
    )
    group.add_argument(
        "--deterministic",
        action="store_const",
        const=True,
        help="answers that depend on nothing but the request and its seed; slower",
    )


def server_config(args: argparse.Namespace) -> "ServerConfig":
    """Address, name, keys and manners of the server."""
    from moejet.server.config import ServerConfig

    hosts = tuple(name.lower() for name in args.allowed_host) if args.allowed_host else None
    return ServerConfig(
        host=args.host,
        port=args.port,
        model_name=args.served_model_name or Path(args.model).name,
        api_keys=_api_keys(args),
        insecure=args.insecure,
        cors_origins=tuple(args.cors_origin),
        allowed_hosts=hosts,
        reasoning_field=args.reasoning_field,
        header_timeout_s=args.header_timeout,
        log_prompts=args.log_prompts,
        share_cache=args.share_cache,
        strategies=not args.no_strategies,
        max_strategy_samples=args.max_strategy_samples,
        effort_strategies=args.effort_strategies,
    )


def _api_keys(args: argparse.Namespace) -> tuple[str, ...]:
    keys = [*args.api_key]
    if (key := env_api_key()) is not None:
        keys.append(key)
    if args.api_key_file is not None:
        lines = args.api_key_file.read_text(encoding="utf-8").splitlines()
        found = [line.strip() for line in lines if line.strip()]
        if not found:
            raise ValueError(f"--api-key-file={args.api_key_file} holds no key: write one per line")
        keys += found
    return tuple(dict.fromkeys(keys))


def engine_options(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options of the engine, and its limits, checked before there is a process for it."""
    engine = options.engine_options(args)
    for name in ("max_num_requests", "max_batch_tokens", "cache_tokens", "seed", "deterministic"):
        if (value := getattr(args, name)) is not None:
            engine[name] = value
    EngineConfig.create(model=args.model, **engine)
    limits = {n: v for n in _ENGINE_LIMITS if (v := getattr(args, n)) is not None}
    check_limits(**limits)
    return engine, limits
