"""`moejet bench compare A B`: two files of result lines, case by case.

Lines belong together that measured the same: benchmark, shape, format, instruction set, threads,
machine. "ratio" is how much better B is (above 1: faster, or more of what is wanted). "noise" is
what repetitions spread on both sides; where memory or arithmetic itself was faster or slower beside
one of them, a difference up to that much is the machine's as well. "B is" the same within both,
else better or worse; "?" where nothing was repeated, so that nobody knows. Several lines of one
case in a file count as repetitions.

Exit code 1 with --fail-below X: a case is worse beyond the noise and its ratio is below X ("?" counts as beyond).
"""

import argparse
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moejet.cli import options
from moejet.cli.bench_kinds import KINDS, MACHINE, Kind, Metric
from moejet.cli.results import read_results
from moejet.cli.table import Column, Row, write_table
from moejet.cli.terminal import note

_GB_READ = ("read_gbps", "copy_gbps", "memory_read_gbps")  # beside the case, if that is known
_OTHER_CEILING = 0.1  # relative: from there on the machine was another one
_PEAK = ("ceiling_tflops", "matmul_tflops")


@dataclass(frozen=True, slots=True)
class Case:
    """What one file says about one case: the median of its lines, and what bounded them."""

    value: float
    spread: float | None
    read_gbps: float | None
    peak: float | None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A case in both files; ratio above 1: B is better. noise: relative, None where nothing was repeated.

    read_gbps, peak: what memory and arithmetic could do beside it.
    """

    bench: str
    case: dict[str, Any]
    metric: str
    a: float
    b: float
    ratio: float
    noise: float | None
    read_gbps_a: float | None
    read_gbps_b: float | None
    peak_a: float | None
    peak_b: float | None
    verdict: str


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `moejet bench compare`."""
    parser.usage = "moejet bench compare [options] A B"
    parser.epilog = __doc__
    parser.add_argument("files", nargs="*", metavar="A B", help="result lines, before and after")
    parser.add_argument(
        "--fail-below",
        type=options.positive,
        metavar="X",
        help="exit code 1 for a ratio below X, such as 0.9",
    )
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md")


def execute(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code."""
    if len(args.files) != 2:
        raise ValueError(f"{len(args.files)} files given: name two, before and after")
    limit = args.fail_below
    if limit is not None and not 0 < limit < math.inf:
        raise ValueError(f"--fail-below {limit} must be above 0, such as 0.9")
    a, b = (read_results(file) for file in args.files)
    found, warnings = compare(a, b, *args.files)
    failed = [
        c for c in found if limit is not None and c.ratio < limit and c.verdict in ("worse", "?")
    ]
    if args.output == "json":
        facts = {"comparisons": [asdict(c) for c in found], "warnings": warnings}
        print(json.dumps({**facts, "failed": [{"bench": c.bench, **c.case} for c in failed]}))
    else:
        _write(found)
    for warning in warnings:
        note(f"warning: {warning}")
    for comparison in failed:
        case = describe(comparison.bench, comparison.case)
        note(f"below {limit:g}: {case} ({comparison.metric}, ratio {comparison.ratio:.3f})")
    return 1 if failed else 0


def _write(found: Sequence[Comparison]) -> None:
    """A table in which a case is called by what tells it from others; what all have in common follows."""
    common: dict[str, dict[str, Any]] = {}
    for bench in dict.fromkeys(c.bench for c in found):
        cases = [c.case for c in found if c.bench == bench]
        same = {k: v for k, v in cases[0].items() if all(case[k] == v for case in cases)}
        common[bench] = same if len(cases) > 1 else {}
    rows = []
    for c in found:
        own = {key: value for key, value in c.case.items() if key not in common[c.bench]}
        rows.append({**asdict(c), "case": describe(c.bench, own)})
    write_table(_COLUMNS, rows)
    for bench, same in common.items():
        if same:
            note(f"all lines of {describe(bench, same)}")


def compare(
    a: Sequence[Row], b: Sequence[Row], name_a: str = "A", name_b: str = "B"
) -> tuple[list[Comparison], list[str]]:
    """All cases that are in both, and what has to be known beside them. ValueError: there are none."""
    warnings = _differences(a, b)
    found: list[Comparison] = []
    for bench in dict.fromkeys(row["bench"] for row in [*a, *b]):
        if bench not in KINDS:
            warnings.append(
                f"lines of {bench!r} are left out: they have no single figure to compare"
            )
            continue
        kind = KINDS[bench]
        parts_a, parts_b = _parts(a, bench, kind, name_a), _parts(b, bench, kind, name_b)
        if not parts_a or not parts_b:
            name = name_b if parts_a else name_a
            warnings.append(f"{name} has no figures of {bench!r}")
            continue
        keys = _common_keys(kind, parts_a, parts_b, warnings)
        cases_a, cases_b = (_cases(parts, kind, keys) for parts in (parts_a, parts_b))
        for mine, others, name in ((cases_a, cases_b, name_a), (cases_b, cases_a, name_b)):
            only = [describe(bench, _case_of(keys, key)) for key in mine if key not in others]
            if only:
                more = "" if len(only) <= 3 else f" and {len(only) - 3} more"
                warnings.append(f"only in {name}: {'; '.join(only[:3])}{more}")
        for key, before in cases_a.items():
            if key in cases_b:
                case = _case_of(keys, key)
                found.append(_comparison(bench, case, kind, before, cases_b[key]))
    if not found:
        raise ValueError(
            f"{name_a} and {name_b} have no case in common: compare results of the same benchmark with the "
            f"same options ({'; '.join(warnings)})"
        )
    return found, warnings + _other_ceilings(found)


def _other_ceilings(found: Sequence[Comparison]) -> list[str]:
    """Of cases beside which memory or arithmetic was not as fast: one warning each, with the widest difference."""
    warnings = []
    for what, unit, before, after in (
        ("memory reads", "GB/s", "read_gbps_a", "read_gbps_b"),
        ("arithmetic ceilings", "T/s", "peak_a", "peak_b"),
    ):
        pairs = [(getattr(c, before), getattr(c, after)) for c in found]
        pairs = [p for p in pairs if None not in p and abs(math.log(p[1] / p[0])) > _OTHER_CEILING]
        if pairs:
            a, b = max(pairs, key=lambda p: abs(math.log(p[1] / p[0])))
            warnings.append(
                f"{what} differ in {len(pairs)} of {len(found)} cases: at most {a:.3g} | {b:.3g} {unit}"
            )
    return warnings


def _differences(a: Sequence[Row], b: Sequence[Row]) -> list[str]:
    """What makes a comparison doubtful: machines, commits that are not what ran, versions."""

    def values(rows: Sequence[Row], *keys: str) -> list[str]:
        found = (" ".join(str(row[k]) for k in keys if row.get(k) is not None) for row in rows)
        return sorted({text for text in found if text})

    warnings = []
    for what, keys in (("machines", MACHINE), ("kernels of the system", ("kernel",))):
        before, after = values(a, *keys), values(b, *keys)
        if before != after:
            warnings.append(f"{what} differ: {', '.join(before)} | {', '.join(after)}")
    versions = [
        {json.dumps(row.get("versions"), sort_keys=True) for row in rows} for rows in (a, b)
    ]
    if versions[0] != versions[1]:
        warnings.append(f"versions differ: {' '.join(versions[0])} | {' '.join(versions[1])}")
    for name, rows in (("A", a), ("B", b)):
        commits = {str(row["commit"])[:10] for row in rows if row.get("dirty")}
        if commits:
            warnings.append(
                f"{name} was measured with local changes to {', '.join(sorted(commits))}"
            )
    return warnings


def _parts(rows: Sequence[Row], bench: str, kind: Kind, name: str) -> list[tuple[Row, Metric]]:
    found: list[tuple[Row, Metric]] = []
    for row in rows:
        if row["bench"] == bench:
            try:
                measured = [(part, kind.metric(part)) for part in kind.parts(row)]
            except (KeyError, TypeError, AttributeError, ValueError) as error:
                shown = f"no {error}" if isinstance(error, KeyError) else error
                raise ValueError(
                    f"{name}: the line of {bench!r} from {row.get('time')} is not whole: {shown}"
                ) from None
            found += [(part, metric) for part, metric in measured if metric is not None]
    return found


def _common_keys(
    kind: Kind,
    a: Sequence[tuple[Row, Metric]],
    b: Sequence[tuple[Row, Metric]],
    warnings: list[str],
) -> tuple[str, ...]:
    """The keys that tell cases apart. Those that one file does not have, and one machine each, are not among them."""
    keys = []
    for key in kind.keys:
        sides = [any(key in row for row, _ in rows) for rows in (a, b)]
        if all(sides):
            keys.append(key)
        elif any(sides):
            warnings.append(f"only {'A' if sides[0] else 'B'} says {key!r}: taken for the same")
    machines = [{tuple(row.get(k) for k in MACHINE) for row, _ in rows} for rows in (a, b)]
    if any(len(some) > 1 for some in machines):
        keys += MACHINE
    return tuple(keys)


def _cases(
    parts: Sequence[tuple[Row, Metric]], kind: Kind, keys: Sequence[str]
) -> dict[tuple[str, ...], Case]:
    groups: dict[tuple[str, ...], list[tuple[Row, Metric]]] = {}
    for row, metric in parts:
        key = tuple(json.dumps(row.get(k), sort_keys=True) for k in keys)
        groups.setdefault(key, []).append((row, metric))
    return {key: _case(group, kind.is_timed) for key, group in groups.items()}


def _case(lines: Sequence[tuple[Row, Metric]], is_timed: bool) -> Case:
    values = [metric.value for _, metric in lines]
    middle = statistics.median(values)
    spreads = [metric.spread for _, metric in lines if metric.spread is not None]
    if len(values) > 1:
        spreads.append((max(values) - min(values)) / 2 / middle)
    timed = [row for row, _ in lines] if is_timed else []
    reads = [v for row in timed if (v := _first(row, _GB_READ))]
    peaks = [v for row in timed if (v := _first(row, _PEAK))]
    return Case(
        middle,
        max(spreads, default=None),
        statistics.median(reads) if reads else None,
        statistics.median(peaks) if peaks else None,
    )


def _first(row: Row, keys: Sequence[str]) -> float | None:
    for key in keys:
        if isinstance(row.get(key), int | float):
            return float(row[key])
    return None


def _comparison(bench: str, case: dict[str, Any], kind: Kind, a: Case, b: Case) -> Comparison:
    ratio = b.value / a.value if kind.higher_is_better else a.value / b.value
    noise = None if a.spread is None or b.spread is None else a.spread + b.spread
    verdict = "?"
    if noise is not None:
        pairs = ((a.read_gbps, b.read_gbps), (a.peak, b.peak))
        machine = [1.0, *(after / before for before, after in pairs if before and after)]
        low, high = min(machine) / (1 + noise), max(machine) * (1 + noise)
        verdict = "worse" if ratio < low else "better" if ratio > high else "same"
    return Comparison(
        bench,
        case,
        kind.name,
        a.value,
        b.value,
        ratio,
        noise,
        a.read_gbps,
        b.read_gbps,
        a.peak,
        b.peak,
        verdict,
    )


def _case_of(keys: Sequence[str], values: Sequence[str]) -> dict[str, Any]:
    return {key: json.loads(value) for key, value in zip(keys, values, strict=True)}


def describe(bench: str, case: Mapping[str, Any]) -> str:
    """Such as "moe deepseek-v3 int4_g32 tokens=64 threads=2"; sizes that the shape's name implies are left out."""
    implied = ("hidden_size", "intermediate_size", "num_experts_per_tok")
    shown = {k: v for k, v in case.items() if v is not None and k not in implied}
    words = (f"{k}={v}" if isinstance(v, int | float) else str(v) for k, v in shown.items())
    return " ".join([bench, *words])


_COLUMNS: list[Column] = [
    ("case", 40, lambda row: str(row["case"])),
    ("of", 8, lambda row: str(row["metric"])),
    ("A", 9, lambda row: f"{row['a']:.4g}"),
    ("B", 9, lambda row: f"{row['b']:.4g}"),
    ("ratio", 6, lambda row: f"{row['ratio']:.3f}"),
    ("noise", 6, lambda row: "?" if row["noise"] is None else f"{row['noise']:.1%}"),
    ("reads GB/s", 11, lambda row: _reads(row)),
    ("B is", 6, lambda row: str(row["verdict"])),
]


def _reads(row: Row) -> str:
    pair = (row["read_gbps_a"], row["read_gbps_b"])
    return " → ".join("-" if value is None else f"{value:.1f}" for value in pair)
