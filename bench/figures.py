"""The README's figures and its table of figures, from the committed result lines.

    python bench/figures.py             # draws bench/figures/*.svg and puts the table into README.md
    python bench/figures.py --check     # exit code 1 if one of them is not of these lines; needs no matplotlib

New lines come from `make bench BENCH_RESULTS=bench/results/zen4_bench.jsonl` and bench/reasoning.py. Each picture
carries the hash of the data that it was drawn from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from suite import latest, table

from moejet.cli.plot import depth_points, roofline_points, save_accuracy, save_depth, save_roofline
from moejet.cli.results import read_results
from moejet.reasoning.eval_plot import Point

ROOT = Path(__file__).resolve().parents[1]
RESULTS, FIGURES, README = ROOT / "bench/results", ROOT / "bench/figures", ROOT / "README.md"
SUITE, REASONING = RESULTS / "zen4_bench.jsonl", RESULTS / "zen4_reasoning.jsonl"
BEGIN, END = "<!-- table of bench/suite.py -->\n", "<!-- end of table -->\n"
# Parts of names of strategies that would only crowd the picture; bench/README.md has all of them. A capped thinking
# cannot answer: at 0.01 it would squeeze the others.
HIDDEN = (
    "capped",
    "each with",
    "self-certainty",
    "weighted",
    "of 4, step head",
    "particles, 16, step head",
)
HIDDEN += ("rollouts, log",)


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture: what is drawn, and by whom."""

    name: str
    title: str
    points: list[Any]
    draw: Callable[..., None]

    @property
    def path(self) -> Path:
        return FIGURES / f"{self.name}.svg"

    @property
    def description(self) -> str:
        """What the file's metadata says; the same data give the same hash."""
        plain = [point if isinstance(point, dict) else astuple(point) for point in self.points]
        data = json.dumps([self.title, plain], sort_keys=True)
        return f"data sha256:{hashlib.sha256(data.encode()).hexdigest()}"

    def is_current(self) -> bool:
        return self.path.is_file() and self.description in self.path.read_text(encoding="utf-8")

    def save(self, directory: Path) -> Path:
        path = directory / self.path.name
        self.draw(self.points, path, self.title, description=self.description)
        return path


def figures() -> list[Figure]:
    """All figures of the README."""
    rows = latest(read_results(SUITE))
    layers = [row for row in rows if row["bench"] == "moe"]
    first = layers[0]
    machine = f"{first['cpu']}, {first['threads']} threads"
    # The model that was measured at several depths.
    single = [row for row in rows if row["bench"] == "model" and row["batch"] == 1]
    model = next(row["model"] for row in single if row["depth"])
    deep = [row for row in single if row["model"] == model]
    strategies = accuracy_points(read_results(REASONING))
    return [
        Figure(
            "roofline",
            f"One layer of {first['shape']}'s experts by tokens in a call, on {machine}",
            roofline_points(layers),
            save_roofline,
        ),
        Figure("depth", f"{model} on {machine}", depth_points(deep), save_depth),
        Figure(
            "accuracy",
            "Strategies of the embedded reasoner",
            strategies,
            save_accuracy,
        ),
    ]


def accuracy_points(lines: list[dict[str, Any]]) -> list[Point]:
    """Of the strategies that are shown, once where runs agree."""
    points: dict[str, Point] = {}
    for run, line in enumerate(lines, 1):
        for row in line["rows"]:
            name = row["strategy"]
            figures = (row["tokens"], row["accuracy"], *row["interval"])
            if name in points and points[name] != Point(name, *figures):
                name = f"{name}, run {run}"
            if not any(word in name for word in HIDDEN):
                points[name] = Point(name, *figures)
    return sorted(points.values(), key=lambda point: point.tokens)


def with_table(text: str) -> str:
    """The README with the table of these lines between its marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md has to have the lines {BEGIN.strip()} and {END.strip()}")
    return before + begin + "\n" + table(read_results(SUITE)) + "\n" + end + after


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args(arguments)
    text = README.read_text(encoding="utf-8")
    if args.check:
        stale = [figure.path.name for figure in figures() if not figure.is_current()]
        stale += ["README.md"] * (with_table(text) != text)
        for name in stale:
            print(f"{name} is not of these results: run `python bench/figures.py`", file=sys.stderr)
        return 1 if stale else 0
    FIGURES.mkdir(exist_ok=True)
    for figure in figures():
        print(figure.save(FIGURES))
    README.write_text(with_table(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
