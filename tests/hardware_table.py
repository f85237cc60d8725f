"""The README's table of what runs on which hardware, from what the code asks for, the tests cover and was measured.

`python tests/hardware_table.py` writes it between its markers; a test holds that it is current. Sources: what each
instruction set needs is in csrc/isa.cpp, what it multiplies in `moejet.ceilings`, which ones the kernel tests run is in
tests/csrc/conftest.py, GPUs are in kernels/card.py, and bench/results/ says where anything was measured.
"""

import json
import re
from collections import defaultdict
from pathlib import Path

from moejet.ceilings import arithmetic_of, bounding_ceiling
from moejet.config import ISAS
from moejet.kernels.card import CARDS

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- hardware: written by `python tests/hardware_table.py` -->"
END = "<!-- /hardware -->"
PROCESSORS = {
    "amx": "Intel Xeon from 2023",
    "avx512_bf16": "AMD Zen 4 and later",
    "avx512": "Intel Xeon from 2019",
    "avx2": "almost every x86-64 since 2013",
    "scalar": "anything else, other architectures too; very slow",
}
HEADER = (
    "",
    "such as",
    "needs",
    "int4, int8 weights in",
    "fp8, bf16 weights in",
    "tests",
    "measured",
)


def needs() -> dict[str, str]:
    """Instruction set -> the CPU features that csrc/isa.cpp asks for."""
    source = (ROOT / "csrc/isa.cpp").read_text(encoding="utf-8")
    asked = defaultdict(list)
    for name, variable in re.findall(r'need\(f\.\w+, "(\w+)", &(\w+)\)', source):
        asked[variable].append(name.upper())
    result = {"scalar": "", "avx512": ", ".join(asked["r"])}  # r: of missing_avx512
    for variable, enum in re.findall(
        r"&\s(\w+) = reasons\[static_cast<int>\(Isa::k(\w+)\)\]", source
    ):
        builds_on = re.search(rf"\b{variable} = missing_avx512\(f\);", source)
        isa = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", enum).lower()
        result[isa] = ", ".join(asked[variable]) + (" and what `avx512` needs" if builds_on else "")
    return result


def arithmetic(isa: str, weight_format: str) -> str:
    """What products of a prompt are computed in."""
    kinds = {}
    for tiles in ("bf16", "int8"):
        kind = arithmetic_of(isa, weight_format, tiles)
        if kind == "bf16" and "bf16" not in (bounding_ceiling(isa, kind) or ""):
            kind = "fp32"  # multiply-adds of values that were bf16
        kinds[kind] = tiles
    default, *others = kinds
    return default + "".join(f", {kind} with `--arithmetic {kind}`" for kind in others)


def tested(isa: str) -> str:
    source = (ROOT / "tests/csrc/conftest.py").read_text(encoding="utf-8")
    names = re.findall(r'"(\w+)"', re.search(r"^ISAS = \((.*)\)", source, re.MULTILINE)[1])
    how = ["every kernel against float64"] if isa in names else []
    return ", ".join(how + ["emulated elsewhere"] * (f"{isa}_emulated" in names)) or "no"


def measured() -> tuple[dict[str, str], dict[int, str]]:
    """By instruction set and by compute capability, where there are results: the machine, linked to its lines."""
    on_cpu: dict[str, str] = {}
    on_gpu: dict[int, str] = {}
    for path in sorted((ROOT / "bench/results").glob("*.jsonl")):
        for row in map(json.loads, path.read_text(encoding="utf-8").splitlines()):
            link = f"(bench/results/{path.name})"
            if row.get("bench") in ("model", "moe"):
                on_cpu.setdefault(row["isa"], f"[{row['cpu']}]{link}")
            if "capability" in row:
                on_gpu.setdefault(row["capability"], f"[{row['gpu']}]{link}")
    return on_cpu, on_gpu


def table() -> str:
    asked, (on_cpu, on_gpu) = needs(), measured()
    rows = [HEADER, ("---",) * len(HEADER)]
    for isa in reversed(ISAS):
        formats = [arithmetic(isa, weights) for weights in ("int4_g32", "bf16")]
        rows.append(
            (f"`{isa}`", PROCESSORS[isa], asked[isa], *formats, tested(isa), on_cpu.get(isa, "no"))
        )
    for machine in dict.fromkeys(on_gpu.get(capability, "no") for capability in CARDS):
        cards = [card for c, card in CARDS.items() if on_gpu.get(c, "no") == machine]
        names = ", ".join(card.name for card in cards)
        numbers = ", ".join(f"{card.capability / 10:.1f}" for card in cards)
        tests = "every kernel compiled, and interpreted on the CPU"
        rows.append(
            ("NVIDIA", names, f"compute capability {numbers}", "bf16", "bf16", tests, machine)
        )
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def with_table(text: str) -> str:
    """The README with the table as it has to be."""
    before, _, rest = text.partition(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(with_table(readme.read_text(encoding="utf-8")), encoding="utf-8")
