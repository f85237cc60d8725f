"""`moejet bench ceilings`: what this machine can do at most, the figures that all others divide by.

Memory: reads of a buffer far larger than the caches, with one thread and with all. Arithmetic:
multiply-adds (two operations each) on random operands in registers. Figures are medians; what the
machine lacks is listed with the reason.
"""

import argparse
from typing import TYPE_CHECKING, Any

from moejet import topology
from moejet.cli import options
from moejet.cli.environment import describe_environment, summary
from moejet.cli.results import add_json_option, line_writer
from moejet.cli.terminal import note
from moejet.progress import counted

if TYPE_CHECKING:
    from moejet.ceilings import Ceiling


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moejet bench ceilings`."""
    parser.epilog = __doc__
    add_json_option(parser)
    options.add_threads_option(parser, "-t")
    parser.add_argument(
        "--seconds",
        type=options.positive,
        default=0.5,
        metavar="X",
        help="for each figure (default 0.5)",
    )
    parser.add_argument(
        "--megabytes",
        type=options.count,
        metavar="N",
        help="memory to read (default: by cache size)",
    )


def execute(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if args.seconds > 60:
        raise ValueError(f"--seconds={args.seconds:g} must be at most 60")
    options.quiet_openmp()
    from moejet.ceilings import Meter, measure_ceilings, read_buffer_bytes
    from moejet.experts.cpu_experts import create_pool

    num_bytes = args.megabytes << 20 if args.megabytes else read_buffer_bytes()
    caches = topology.all_caches_bytes(topology.allowed_cpus())
    pool = create_pool(args.num_threads)
    try:
        environment = describe_environment(Meter(pool, num_bytes=num_bytes))
        ceilings = measure_ceilings(pool, seconds=args.seconds, num_bytes=num_bytes)
    finally:
        pool.close()
    facts: dict[str, Any] = {
        "bench": "ceilings",
        **environment,
        "buffer_bytes": num_bytes,
        "last_level_cache_bytes": caches,
        "ceilings": [ceiling.as_dict() for ceiling in ceilings],
    }
    with line_writer(args.json) as write:
        write(facts)
    if args.json == "-":
        return 0
    print(render(ceilings))
    for reason in dict.fromkeys(c.reason for c in ceilings if c.reason):
        names = dict.fromkeys(c.name for c in ceilings if c.reason == reason)
        note(f"{', '.join(names)}: {reason}")
    note(f"{num_bytes / 2**20:.0f} MiB read · {summary(environment)}")
    if caches is not None and num_bytes < 2 * caches:
        note(
            f"the caches hold {caches / 2**20:.0f} MiB: too near for a memory rate, free some memory"
        )
    return 0


def render(ceilings: "list[Ceiling]") -> str:
    """A row per ceiling, a column per thread count."""
    threads = sorted({ceiling.threads for ceiling in ceilings})
    heads = [counted(n, "thread") for n in threads]
    rows = [["ceiling", *heads, "unit", "best way"]]
    for name in dict.fromkeys(ceiling.name for ceiling in ceilings):
        by_threads = {c.threads: c for c in ceilings if c.name == name}
        last = by_threads[threads[-1]]
        values = [_value(by_threads[n].value) for n in threads]
        rows.append([name, *values, last.unit, last.variant or ""])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rows.insert(1, ["-" * width for width in widths])
    cells = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in cells)


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}" if value >= 10 else f"{value:.3f}"
