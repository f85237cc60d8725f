"""Result lines of benchmarks: one JSON object per line, appended to a file or printed, and read again."""

import argparse
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moejet.cli import options
from moejet.cli.table import Row


def add_json_option(parser: argparse.ArgumentParser, default: str | None = None) -> None:
    """--json FILE, as every benchmark has it. default "-": for those that show nothing else."""
    text = "append one JSON line per result to FILE, '-': print them"
    text += " (default)" if default == "-" else ""
    parser.add_argument(
        "--json", type=options.lines_file, metavar="FILE", default=default, help=text
    )


@contextmanager
def line_writer(file: str | Path | None) -> Iterator[Callable[[Row], None]]:
    """What `add_json_option` asks for; each line is in the file at once. None writes nothing."""
    if file is None:
        yield lambda row: None
    elif str(file) == "-":
        yield lambda row: print(json.dumps(row), flush=True)
    else:
        with open(file, "a", encoding="utf-8") as out:
            yield lambda row: print(json.dumps(row), file=out, flush=True)


def written(rows: Iterable[Row], write: Callable[[Row], None]) -> Iterator[Row]:
    """The same rows, each of them written first."""
    for row in rows:
        write(row)
        yield row


def read_results(file: str | Path) -> list[Row]:
    """The objects of a file: one per line, or all of it one list or object (`moejet bench -o json`).

    Raises ValueError with file and line where it is something else, or empty.
    """
    path = Path(file)
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a file of result lines: {error}") from None
    if not text.strip():
        raise ValueError(
            f"{path} is empty: name a file of result lines (`--json FILE`, `-o jsonl`)"
        )
    try:
        whole = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        numbered = [(n, line) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        return [_parse(line, f"{path}, line {number}") for number, line in numbered]
    rows = whole if isinstance(whole, list) else [whole]
    return [_checked(row, f"{path}, result {number}") for number, row in enumerate(rows, 1)]


def _parse(line: str, where: str) -> Row:
    try:
        return _checked(json.loads(line), where)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{where} is not JSON: {error}") from None


def _checked(row: object, where: str) -> Row:
    if not isinstance(row, dict) or not isinstance(row.get("bench"), str):
        shown = json.dumps(row)
        shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
        raise ValueError(
            f'{where} is not a result: {shown} has to be an object with the key "bench"'
        )
    return row
