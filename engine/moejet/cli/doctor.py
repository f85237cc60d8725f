"""`moejet doctor`: what this machine and this installation are, and what to do about problems.

Exit code 0: moejet can run here (warnings may remain); 1: something prevents it.
"""

import argparse
import json
import sys
import sysconfig
from dataclasses import asdict
from typing import Any

from moejet.cli.checks import Report, examine
from moejet.cli.terminal import style
from moejet.progress import counted

_MARKS = {"ok": ("ok", "green"), "info": ("", "dim"), "warning": ("warn", "yellow")}
_MARKS |= {"error": ("fail", "red")}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moejet doctor`."""
    parser.epilog = "exit code: 0 if moejet can run here, 1 if something prevents it\n"
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def execute(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    report = examine()
    print(json.dumps(to_json(report), indent=2) if args.json else render(report))
    return 0 if report.usable else 1


def render(report: Report) -> str:
    """The report for people: a block per section, remedies under their lines, a verdict."""
    lines: list[str] = []
    section = ""
    for check in report.checks:
        if check.section != section:
            section = check.section
            lines += ["", style(section, "bold", sys.stdout)]
        mark, colour = _MARKS[check.status]
        shown = style(f"{mark:>4}", colour, sys.stdout) if mark else "    "
        lines.append(f"{shown}  {check.name:<16} {check.value}")
        if check.remedy:
            lines.append(f"{'':22} -> {check.remedy}")
    errors = sum(check.status == "error" for check in report.checks)
    warnings = sum(check.status == "warning" for check in report.checks)
    verdict = "moejet can run here" if report.usable else "moejet cannot run here"
    lines += ["", f"{verdict}: {counted(errors, 'error')}, {counted(warnings, 'warning')}"]
    return "\n".join(lines).lstrip("\n")


def to_json(report: Report) -> dict[str, Any]:
    """The object that --json prints: usable, problems with remedies, and the facts as data."""
    problems = [asdict(c) for c in report.checks if c.status in ("error", "warning")]
    return {
        "usable": report.usable,
        "problems": problems,
        "platform": sysconfig.get_platform(),
        **report.facts,
    }
