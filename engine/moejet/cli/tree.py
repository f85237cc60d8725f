"""The tree of a search as lines of text."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from moejet.cli.terminal import shown, style

if TYPE_CHECKING:
    from moejet.reasoning.result import Node

_MARKS = {"open": "·", "kept": "○", "pruned": "✗", "finished": "●", "chosen": "★"}
_STYLES = {"pruned": "dim", "chosen": "green"}
MAX_LINES = 200


def print_tree(nodes: "Sequence[Node]", out: TextIO, *, width: int = 100) -> None:
    """Draws a line per node; pruned nodes are dim and the way to the answer is green where `out` can show it.

    Children are below their parent in the order of their numbers; nodes whose parent is not there are roots.
    """
    for line, state in _lines(nodes, width):
        line = shown(line) if out.isatty() else line
        print(style(line, _STYLES[state], out) if state in _STYLES else line, file=out)
    out.flush()


def _lines(nodes: "Sequence[Node]", width: int) -> Iterator[tuple[str, str]]:
    """Lines and the states of their nodes. Depth-first without recursion: a search may be deep."""
    numbers = {node.number for node in nodes}
    children: dict[int, list[Node]] = defaultdict(list)
    for node in sorted(nodes, key=lambda node: node.number):
        is_root = node.parent not in numbers or node.parent == node.number
        children[-1 if is_root else node.parent].append(node)
    stack: list[tuple[Node, str, str]] = [(root, "", "") for root in reversed(children[-1])]
    count = 0
    while stack:
        node, first, rest = stack.pop()
        count += 1
        if count > MAX_LINES:
            yield f"... {len(nodes) - MAX_LINES} more", "open"
            return
        yield _cut(f"{first}{_label(node)}", width), node.state
        below = children[node.number] if node.number >= 0 else []
        for place, child in reversed(list(enumerate(below))):
            is_last = place == len(below) - 1
            stack.append(
                (child, rest + ("└─ " if is_last else "├─ "), rest + ("   " if is_last else "│  "))
            )


def _label(node: "Node") -> str:
    parts = [_MARKS[node.state]]
    if node.score is not None and math.isfinite(node.score):
        parts.append(f"{node.score:.2f}")
    if node.visits:
        parts.append(f"{node.visits}x")
    return " ".join([*parts, *node.text.split()])


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
