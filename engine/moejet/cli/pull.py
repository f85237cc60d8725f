"""`moejet pull`: a model from the hub to this machine, checked file by file; prints where it is.

The directory goes to stdout, everything else to stderr.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejet.cli import options
from moejet.cli.terminal import note
from moejet.hub import (
    Counter,
    HubError,
    HubFile,
    Orphan,
    Reporter,
    TransferProgress,
    cache_root,
    find_orphans,
    is_offline,
    local_snapshot,
    pull,
    remove_orphans,
    verify_snapshot,
)
from moejet.progress import ProgressLine, counted, gib

_EPILOG = """\
examples:
  moejet pull org/name
  moejet pull org/name-GGUF:Q4_K_M
  moejet pull org/name --verify
  moejet pull --sweep --dry-run

An interrupted download goes on where it stopped when the command is run again. The variables
HF_ENDPOINT, HF_TOKEN, HF_HOME, HF_HUB_CACHE and HF_HUB_OFFLINE are honoured.
"""
_SECONDS_BETWEEN_LINES = 30.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moejet pull`."""
    parser.usage = "moejet pull [options] [MODEL]"
    parser.epilog = _EPILOG
    parser.add_argument(
        "model", nargs="?", metavar="MODEL", help="hub id (org/name, org/name:QUANT)"
    )
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit (default main)")
    parser.add_argument(
        "--cache-dir", type=options.directory, metavar="DIR", help="default: the Hugging Face cache"
    )
    parser.add_argument(
        "--include",
        action="append",
        metavar="PATTERN",
        help="fetch files that match, such as '*.safetensors', instead of the usual weights "
        "(repeatable)",
    )
    parser.add_argument("--quant", metavar="NAME", help="GGUF repositories: which quantisation")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--offline", action="store_true", help="find the model here; no network")
    what.add_argument(
        "--verify", action="store_true", help="read what is here and compare hashes; no network"
    )
    what.add_argument(
        "--sweep",
        action="store_true",
        help="remove what interrupted downloads and old revisions left, of MODEL or of all models",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="only show what would be fetched or removed"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, at the end")
    parser.add_argument("-q", "--quiet", action="store_true", help="nothing on stderr but errors")


def execute(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    _check_options(args)
    if args.sweep:
        return _sweep(args)
    if args.verify:
        return _verify(args)
    if args.offline or is_offline():
        path = local_snapshot(args.model, args.revision, args.cache_dir)
        return _finish(args, path, {"commit": path.name, "offline": True})
    return _pull(args)


def _check_options(args: argparse.Namespace) -> None:
    if args.model is None and not args.sweep:
        raise ValueError("the model is missing: moejet pull org/name")
    if args.model is not None and args.model.count("/") != 1:
        raise ValueError(f"{args.model!r} is not a hub id: give org/name")
    if args.model is not None and ":" in args.model and (args.verify or args.sweep):
        raise ValueError(
            f"{args.model!r}: --verify and --sweep look at all of a model: give org/name"
        )
    if args.model is not None and Path(args.model).is_dir():
        note(f"{args.model} is also a directory here, which other commands take for the model")
    if (args.include or args.quant) and (args.sweep or args.verify or args.offline):
        raise ValueError("--include and --quant choose what to download; they go with nothing else")
    if args.dry_run and (args.verify or args.offline):
        raise ValueError("--dry-run goes with a download or with --sweep")
    if args.revision is not None and args.sweep:
        raise ValueError("--revision does not go with --sweep, which looks at all revisions")


def _pull(args: argparse.Namespace) -> int:
    result = pull(
        args.model,
        args.revision,
        args.cache_dir,
        include=args.include or (),
        quant=args.quant,
        weights=not args.dry_run,
        reporter=Reporter() if args.quiet else _Printer(args.model, list_files=args.dry_run),
    )
    fields = {
        "commit": result.commit,
        "bytes": result.num_bytes,
        "bytes_fetched": result.bytes_fetched,
        "dry_run": args.dry_run,
        "files": [{"path": f.path, "size": f.size, "hash": f.blob} for f in result.files],
    }
    if not (args.quiet or args.dry_run):
        note(f"complete: {counted(len(result.files), 'file')}, {gib(result.num_bytes)}, checked")
    return _finish(args, result.path, fields)


def _finish(args: argparse.Namespace, path: Path, fields: dict[str, Any]) -> int:
    if args.json:
        print(json.dumps({"model": args.model, "path": str(path), **fields}))
    elif not args.dry_run:
        print(path)
    return 0


def _verify(args: argparse.Namespace) -> int:
    path = local_snapshot(args.model, args.revision, args.cache_dir)
    total = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    printer = Reporter() if args.quiet else _Printer(args.model)
    counter = Counter(printer, total, 0, "checking")
    try:
        found = verify_snapshot(path, counter.add)
    finally:
        printer.close()
    if args.json:
        fields = {"correct": found.correct, "corrupt": found.corrupt, "unnamed": found.unnamed}
        print(json.dumps({"model": args.model, "path": str(path), **fields}))
    elif not args.quiet:
        note(f"{counted(len(found.correct), 'file')} of {args.model} correct, {gib(total)} read")
        if found.unnamed:
            note(f"{', '.join(found.unnamed)}: no hash to compare with")
    if found.corrupt:
        raise HubError(
            f"{args.model}: {', '.join(found.corrupt)} corrupt and removed; run "
            f"`moejet pull {args.model}` to fetch again"
        )
    return 0


def _sweep(args: argparse.Namespace) -> int:
    root = cache_root(args.cache_dir)
    orphans = find_orphans(args.cache_dir, args.model)
    total = sum(orphan.size for orphan in orphans)
    if not args.quiet:
        for orphan in orphans:
            note(f"{gib(orphan.size):>12}  {orphan.kind:<12}  {orphan.path.relative_to(root)}")
        note(f"{counted(len(orphans), 'file')} in {root} that nothing needs, {gib(total)}")
    freed = 0 if args.dry_run else remove_orphans(orphans)
    if args.json:
        print(json.dumps({"cache": str(root), "freed": freed, "orphans": _as_json(orphans)}))
    elif orphans and not args.quiet:
        note("nothing removed: --dry-run" if args.dry_run else f"removed, {gib(freed)} set free")
    return 0


def _as_json(orphans: Sequence[Orphan]) -> list[dict[str, Any]]:
    return [{"path": str(o.path), "size": o.size, "kind": o.kind} for o in orphans]


class _Printer(Reporter):
    """A line that is redrawn on terminals; elsewhere a line per file and one every half minute."""

    def __init__(self, model: str, *, list_files: bool = False) -> None:
        self._model = model
        self._list_files = list_files
        self._line = ProgressLine()
        self._printed_at = time.monotonic()

    def plan(self, files: Sequence[HubFile], total: int, present: int) -> None:
        if self._list_files:
            for file in files:
                note(f"{gib(file.size):>12}  {file.path}")
        text = f"{self._model}: {counted(len(files), 'file')}, {gib(total)}"
        self._print(f"{text}, {gib(present)} of it here already" if present else text)

    def progress(self, progress: TransferProgress) -> None:
        self._line.update(progress)
        if not self._line.enabled and time.monotonic() - self._printed_at >= _SECONDS_BETWEEN_LINES:
            self._print(str(progress))

    def file_done(self, file: HubFile, progress: TransferProgress) -> None:
        if not self._line.enabled:
            self._print(f"{file.path}: {gib(file.size)}, hash correct")

    def close(self) -> None:
        self._line.close()

    def _print(self, text: str) -> None:
        self._printed_at = time.monotonic()
        note(text)
