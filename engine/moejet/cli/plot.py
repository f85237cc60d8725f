"""Pictures of measurements, all in one style: rooflines, tokens per second over depth, accuracy over tokens.

They are drawn from rows as benchmarks write them. matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejet.cli import options
from moejet.cli.results import line_writer, written
from moejet.cli.table import Row, keep

if TYPE_CHECKING:
    from moejet.reasoning.eval_plot import Point

PICTURES = (".png", ".pdf", ".svg")
# Okabe and Ito's colours, which nearly everybody can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = "osD^vP*X"
_STYLE: dict[str, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "font.size": 9,
    "grid.alpha": 0.25,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.markersize": 5,
    "savefig.dpi": 150,
    "svg.fonttype": "none",  # a twentieth of the size, and the text can be read
    "svg.hashsalt": "moejet",
}


def add_plot_option(group: argparse._ActionsContainer, what: str) -> None:
    """--plot OUT.png; `check_plot` before anything is measured."""
    group.add_argument(
        "--plot",
        type=options.output_file,
        metavar="OUT.png",
        help=f"draw {what} (needs matplotlib: pip install 'moejet[plot]')",
    )


@contextmanager
def measured(
    rows: Iterable[Row], json: str | Path | None, plot: Path | None
) -> Iterator[tuple[Iterator[Row], list[Row]]]:
    """Rows that are written as --json asks while they are measured, and those so far; at the end --plot's picture."""
    kept: list[Row] = []
    with line_writer(json) as write:
        yield keep(written(rows, write), kept), kept
    if plot is not None:
        save_rows(kept, plot)


def check_plot(path: Path | None) -> None:
    """Raises before anything is measured what would be raised afterwards. None: no picture is wanted."""
    if path is None:
        return
    if path.suffix not in PICTURES:
        raise ValueError(f"--plot {path} must end with one of {', '.join(PICTURES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("--plot needs matplotlib: pip install 'moejet[plot]'") from error


@contextmanager
def _picture(path: Path, size: tuple[float, float], description: str | None) -> Iterator[Any]:
    """A figure that is written to `path` at the end, with the description in its metadata."""
    check_plot(path)
    import matplotlib
    from matplotlib.figure import Figure

    style: Any = _STYLE  # the stubs want a literal of every key
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size, layout="constrained")
        yield figure
        key = {".svg": "Description", ".png": "Description", ".pdf": "Subject"}[path.suffix]
        metadata: dict[str, Any] = {} if description is None else {key: description}
        if path.suffix == ".svg":
            metadata["Date"] = None  # the same picture is the same file
        figure.savefig(path, metadata=metadata)


def _styles() -> Iterator[dict[str, Any]]:
    """Colours and markers for one series after another, the same pair only after 56."""
    pairs = zip(itertools.cycle(_COLOURS), itertools.cycle(_MARKERS), strict=False)
    return ({"color": colour, "marker": marker} for colour, marker in pairs)


def roofline_points(rows: Sequence[Row]) -> list[Row]:
    """Of `bench moe` or `bench gpu` rows: series, label, operations per byte, TFLOP/s, and the ceilings."""
    points = []
    for row in rows:
        if row.get("ms_p50") is None:  # a wrong answer is not timed
            continue
        if row["bench"] == "gpu":
            series, label, operations = str(row["kernel"]), str(row["case"]), row["flops"]
            read, peak, name = row["copy_gbps"], row["matmul_tflops"], "torch's bf16 product"
        else:
            series, label, operations = _series(row, rows), str(row["tokens"]), row["operations"]
            read, peak, name = row["read_gbps"], row["ceiling_tflops"], row["ceiling"]
        points.append(
            {
                "series": series,
                "label": label,
                "intensity": operations / row["bytes"],
                "tflops": row["tflops"],
                "read_gbps": read,
                "peak": peak,
                "ceiling": name,
            }
        )
    return points


def _series(row: Row, rows: Sequence[Row]) -> str:
    """The format, and what else is not the same in all rows."""
    names = [name for name in ("shape", "isa", "threads") if len({r[name] for r in rows}) > 1]
    return " ".join([row["format"], *(str(row[name]) for name in names)])


def save_roofline(
    points: Sequence[Row], path: Path, title: str, *, description: str | None = None
) -> None:
    """Measured rates over operations per byte, below what memory and each arithmetic allowed in the same run.

    Ceilings are medians of those beside the cases; the band of memory reads is from the slowest to the fastest one.
    """
    with _picture(path, (7.5, 4.6), description) as figure:
        axes = figure.subplots()
        axes.set(xscale="log", yscale="log", title=title)
        axes.set(xlabel="operations per byte of weights", ylabel="TFLOP/s, TOP/s")
        _draw_ceilings(axes, points)
        styles = _styles()
        for name in dict.fromkeys(point["series"] for point in points):
            mine = sorted((p for p in points if p["series"] == name), key=lambda p: p["intensity"])
            x, y = [p["intensity"] for p in mine], [p["tflops"] for p in mine]
            axes.plot(x, y, label=name, linewidth=0.8, **next(styles))
            if len(points) <= 40:
                for point, at in zip(mine, zip(x, y, strict=True), strict=True):
                    axes.annotate(
                        point["label"], at, (4, -9), textcoords="offset points", fontsize=6
                    )
        axes.legend(loc="lower right")


def _draw_ceilings(axes: Any, points: Sequence[Row]) -> None:
    intensities = [p["intensity"] for p in points]
    x = [min(intensities) / 2, max(intensities) * 2]
    reads = [p["read_gbps"] for p in points]
    peaks: dict[str, list[float]] = {}
    for point in points:
        if point["peak"]:
            peaks.setdefault(point["ceiling"], []).append(point["peak"])
    top = max((statistics.median(found) for found in peaks.values()), default=math.inf)
    low, middle, high = min(reads), statistics.median(reads), max(reads)
    # The slope ends where it meets the highest ceiling.
    knee = min(x[1], 1e3 * top / middle)
    slope = [x[0], knee]
    axes.fill_between(
        slope, [v * low / 1e3 for v in slope], [v * high / 1e3 for v in slope], color="0.85"
    )
    axes.plot(slope, [v * middle / 1e3 for v in slope], "--", color="0.3", linewidth=1)
    axes.annotate(
        f"memory reads {middle:.1f} GB/s",
        (x[0], x[0] * low / 1e3),
        (4, -5),
        textcoords="offset points",
        va="top",
        fontsize=7,
    )
    for name, found in peaks.items():
        value = statistics.median(found)
        start = 1e3 * value / middle
        axes.plot([min(start, x[1]), x[1]], [value, value], "--", color="0.3", linewidth=1)
        axes.annotate(
            f"{name} {value:.2f}",
            (x[1], value),
            (0, 3),
            textcoords="offset points",
            ha="right",
            fontsize=7,
        )


def depth_points(rows: Sequence[Row]) -> list[Row]:
    """Of `moejet bench` rows: prefill or decode, name of the series, depth, tokens/s and their spread."""
    told = ("model", "format", "threads", "isa", "num_tokens", "batch")
    points = []
    for row in rows:
        kind = str(row["test"])[:2]
        alike = [r for r in rows if str(r["test"])[:2] == kind]
        parts = [str(row["format"])] if len({r["model"] for r in rows}) == 1 else [row["model"]]
        for name in told:
            if len({r[name] for r in alike}) > 1 and str(row[name]) not in parts:
                text = {"threads": "{} threads", "num_tokens": "{} tokens", "batch": "batch {}"}
                parts.append(text.get(name, "{}").format(row[name]))
        points.append(
            {
                "kind": kind,
                "series": ", ".join(parts),
                "depth": row["depth"],
                "tokens_per_s": row["tokens_per_s"],
                "sd": row["tokens_per_s_sd"] or 0.0,
            }
        )
    return points


def save_depth(
    points: Sequence[Row], path: Path, title: str, *, description: str | None = None
) -> None:
    """Tokens per second over the tokens that are in the context already, prefill and decode side by side."""
    words = {"pp": "prefill", "tg": "decode"}
    kinds = [kind for kind in words if any(p["kind"] == kind for p in points)]
    with _picture(path, (3.9 * len(kinds), 3.4), description) as figure:
        figure.suptitle(title, fontsize=10)
        for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
            mine = [p for p in points if p["kind"] == kind]
            styles = _styles()
            for name in dict.fromkeys(p["series"] for p in mine):
                some = sorted((p for p in mine if p["series"] == name), key=lambda p: p["depth"])
                axes.errorbar(
                    [p["depth"] for p in some],
                    [p["tokens_per_s"] for p in some],
                    yerr=[p["sd"] for p in some],
                    label=name,
                    capsize=3,
                    linewidth=1,
                    **next(styles),
                )
            axes.set(xlabel="tokens in the context", ylabel="tokens/s", title=words[kind])
            axes.set_ylim(bottom=0)
            axes.legend(loc="best")


def save_accuracy(
    points: Sequence[Point],
    path: Path,
    title: str,
    *,
    ylabel: str = "accuracy (pass@1), 95 % intervals",
    description: str | None = None,
) -> None:
    """Each strategy's accuracy, with its interval, over the tokens that it takes."""
    with _picture(path, (7.5, 4.2), description) as figure:
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        axes = figure.subplots()
        beside = Counter[float]()
        for point, style in zip(points, _styles(), strict=False):
            # Strategies that share their samples take the same tokens: side by side, all of them are seen.
            aside = 1.04 ** beside[point.tokens]
            beside[point.tokens] += 1
            below, above = point.accuracy - point.low, point.high - point.accuracy
            axes.errorbar(
                [point.tokens * aside],
                [point.accuracy],
                yerr=[[below], [above]],
                linestyle="none",
                capsize=3,
                elinewidth=0.8,
                label=point.name,
                **style,
            )
        axes.set(xscale="log", xlabel="tokens of a run", ylabel=ylabel, title=title)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def save_rows(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """The picture that belongs to the rows of one benchmark."""
    some = [dict(row) for row in rows]
    first = some[0]
    if first["bench"] == "model":
        models = ", ".join(dict.fromkeys(str(row["model"]) for row in some))
        save_depth(depth_points(some), path, f"{models} on {_machine(first)}")
        return
    points = roofline_points(some)
    if not points:
        raise ValueError(f"--plot {path}: no case gave a right answer, there is nothing to draw")
    shapes = ", ".join(dict.fromkeys(str(row.get("shape", "kernels")) for row in some))
    machine = first["gpu"] if first["bench"] == "gpu" else _machine(first)
    save_roofline(points, path, f"{shapes} on {machine}")


def _machine(row: Row) -> str:
    return f"{row['cpu']}, {row['threads']} threads"
