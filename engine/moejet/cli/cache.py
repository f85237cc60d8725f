"""`moejet cache`: packed weights and prefixes on disk, listed, checked, removed.

Prefixes are blocks of the latent cache, many files per model and setting, which make one entry here.
Exit code of verify: 0 if all files are sound, 1 if one is damaged (it is then removed).
"""

import argparse
import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from moejet import atomic_file, block_file, prefix_store
from moejet.cli.table import write_table
from moejet.environment import env_cache_dir
from moejet.weights import packed_files, packed_header

_ACTIONS = ("list", "prune", "verify")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moejet cache`."""
    parser.epilog = (
        "prune without options removes what can never be used again: files of another version and "
        "what interrupted writers left; MOEJET_CACHE names the directory\n\n"
        "list marks packed weights whose source, the checkpoint they were made from, is gone,\n"
        "changed, or on a disk that is not mounted. They are kept, because a disk comes back and a\n"
        "copy of the checkpoint can use them, unless --gone (not those of unmounted disks) or --keep\n"
        "(these first) says otherwise.\n"
    )
    parser.add_argument("action", nargs="?", default="list", choices=_ACTIONS)
    parser.add_argument(
        "--model", metavar="NAME", help="prune, verify: only files of models whose name holds NAME"
    )
    parser.add_argument("--all", action="store_true", help="prune: remove every file")
    parser.add_argument(
        "--gone", action="store_true", help="prune: also files whose source is gone or has changed"
    )
    parser.add_argument(
        "--keep",
        type=float,
        metavar="GIB",
        help="prune: also those without their source and the least recently used, down to GIB",
    )
    parser.add_argument("--dry-run", action="store_true", help="prune: only say what would go")
    parser.add_argument("--json", action="store_true", help="list: print one JSON array")


def execute(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    directory = env_cache_dir()
    if directory is None:
        raise ValueError("MOEJET_CACHE='off' switches the cache off: unset it, or name a directory")
    if args.keep is not None and not 0 <= args.keep < float("inf"):
        raise ValueError(f"--keep={args.keep} must be a number of GiB, 0 or more")
    found = [*_entries(directory), *_prefixes(directory / "prefix")]
    entries = [e for e in found if args.model is None or args.model in e["model"]]
    entries.sort(key=lambda e: e["used"])
    if args.action == "list":
        return _list(directory, entries, as_json=args.json)
    if args.action == "verify":
        return _verify(entries)
    return _prune(directory, entries, args)


def _entries(directory: Path) -> list[dict[str, Any]]:
    """What is known of every file, the least recently used first.

    problem: why it cannot be used · source: `packed_header.source_state`.
    """
    entries = []
    for file in packed_files.cache_files(directory):
        stat = file.stat()
        entry = {
            "file": str(file),
            "model": file.stem,
            "gib": stat.st_blocks * 512 / 2**30,
            "used": stat.st_mtime,
            "format": "",
            "problem": "",
            "source": "",
        }
        try:
            header = _header(file)
            entry |= {"model": header.model, "format": header.key.get("expert_format", "")}
            entry["problem"] = packed_header.stale_reason(header)
            entry["source"] = packed_header.source_state(header)
        except (ValueError, OSError) as error:
            entry["problem"] = str(error)
        entries.append(entry)
    return entries


def _prefixes(root: Path) -> list[dict[str, Any]]:
    """One entry for each directory of segments."""
    entries = []
    for directory in prefix_store.segment_directories(root):
        found = [entry for entry in prefix_store.segments(root) if entry[0].parent == directory]
        entries.append(
            {
                "file": str(directory),
                "model": directory.name.rpartition("-")[0],
                "gib": sum(size for _, size, _ in found) / 2**30,
                "used": max((used for _, _, used in found), default=0) / 1e9,
                "format": "prefixes",
                "problem": "" if found else "empty",
                "source": "",
            }
        )
    return entries


def _is_gone(entry: dict[str, Any]) -> bool:
    return entry["source"] in ("gone", "changed")


def _files_of(entry: dict[str, Any]) -> list[Path]:
    path = Path(entry["file"])
    return sorted(path.glob(f"*{prefix_store.SUFFIX}")) if entry["format"] == "prefixes" else [path]


def _header(file: Path) -> packed_header.Header:
    fd = os.open(file, os.O_RDONLY)
    try:
        return packed_header.read_header(fd)
    finally:
        os.close(fd)


def _list(directory: Path, entries: list[dict[str, Any]], *, as_json: bool) -> int:
    if as_json:
        print(json.dumps(entries, indent=2))
        return 0
    width = max((len(e["model"]) for e in entries), default=5)
    write_table(
        [
            ("model", width, lambda e: e["model"]),
            ("format", 8, lambda e: e["format"]),
            ("GiB", 8, lambda e: f"{e['gib']:.2f}"),
            ("last used", 16, lambda e: _day(e["used"])),
            ("problem", 7, lambda e: e["problem"] or (e["source"] and f"source {e['source']}")),
        ],
        entries,
    )
    total = sum(e["gib"] for e in entries)
    print(f"{directory}: {len(entries)} files, {total:.2f} GiB")
    gone = [e for e in entries if _is_gone(e)]
    if gone:
        size = sum(e["gib"] for e in gone)
        print(
            f"source gone or changed: {len(gone)} files, {size:.2f} GiB: moejet cache prune --gone"
        )
    leftover = _abandoned(directory)
    if leftover:
        size = sum(f.stat().st_blocks * 512 for f in leftover) / 2**30
        print(f"interrupted writers left {len(leftover)} files, {size:.2f} GiB: moejet cache prune")
    return 0


def _verify(entries: list[dict[str, Any]]) -> int:
    damaged = 0
    for entry in entries:
        was_damaged = damaged
        for file in _files_of(entry):
            try:
                if entry["format"] == "prefixes":
                    block_file.verify(file)
                else:
                    _verify_weights(file)
            except FileNotFoundError:
                pass  # its owner removed it meanwhile
            except ValueError as error:
                damaged += 1
                file.unlink(missing_ok=True)
                print(f"{file}: {error}; removed, it will be written again", file=sys.stderr)
        if damaged == was_damaged:
            print(f"{entry['file']}: sound")
    return 1 if damaged else 0


def _verify_weights(file: Path) -> None:
    fd = os.open(file, os.O_RDONLY)
    try:
        packed_header.verify_blobs(fd, packed_header.read_header(fd))
    finally:
        os.close(fd)


def _abandoned(directory: Path) -> list[Path]:
    """What interrupted writers left."""
    files = packed_files.abandoned_files(directory)
    for part in prefix_store.segment_directories(directory / "prefix"):
        files += atomic_file.abandoned_files(part, prefix_store.SUFFIX)
    return files


def _prune(directory: Path, entries: list[dict[str, Any]], args: argparse.Namespace) -> int:
    chosen = [e for e in entries if args.all or e["problem"] or (args.gone and _is_gone(e))]
    rest = [e for e in entries if e not in chosen]
    rest.sort(key=lambda e: not _is_gone(e))  # otherwise as they are, by their last use
    while args.keep is not None and rest and sum(e["gib"] for e in rest) > args.keep:
        chosen.append(rest.pop(0))
    files = [file for e in chosen for file in _files_of(e)] + _abandoned(directory)
    freed = sum(f.stat().st_blocks * 512 for f in files) / 2**30
    for file in files:
        print(f"{'would remove' if args.dry_run else 'removed'} {file}")
        if not args.dry_run:
            file.unlink(missing_ok=True)
    for entry in chosen:
        if entry["format"] == "prefixes" and not args.dry_run:
            with suppress(OSError):  # somebody wrote into it meanwhile
                Path(entry["file"]).rmdir()
    print(f"{'would free' if args.dry_run else 'freed'} {freed:.2f} GiB")
    return 0


def _day(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
