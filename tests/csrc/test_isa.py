"""Detection, choice and separation of instruction sets."""

import functools
import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from moejet import _C

NAMES = ("scalar", "avx2", "avx512", "avx512_bf16", "amx", "amx_emulated")


def test_cpu_info_describes_every_set() -> None:
    info = _C.cpu_info()
    assert tuple(info["isas"]) == NAMES
    assert info["isas"]["scalar"]["usable"]
    for state in info["isas"].values():
        assert state["usable"] == (state["reason"] == "")
        assert state["usable"] or not state["automatic"]
        assert state["compiled"] or not state["usable"]


def test_required_sets_are_usable(request: pytest.FixtureRequest) -> None:
    for name in request.config.getoption("--require"):
        state = _C.cpu_info()["isas"][name]
        assert state["usable"], f"{name}: {state['reason']}"


def test_auto_is_the_widest_usable_and_never_emulated() -> None:
    isas = _C.cpu_info()["isas"]
    widest = [name for name in NAMES[:5] if isas[name]["automatic"]][-1]
    assert _C.resolve_isa() == widest
    assert _C.resolve_isa("auto", "amx") == widest


def test_a_limit_only_lowers() -> None:
    assert _C.resolve_isa("auto", "scalar") == "scalar"
    assert _C.resolve_isa("scalar", "amx") == "scalar"
    with pytest.raises(ValueError, match="above max_isa='scalar'"):
        _C.resolve_isa("avx2", "scalar")
    with pytest.raises(ValueError, match="above max_isa='avx2'"):
        _C.resolve_isa("amx_emulated", "avx2")


def test_names_are_never_downgraded(isa: str) -> None:
    assert _C.resolve_isa(isa) == isa


def test_unusable_names_are_refused_with_the_reason() -> None:
    for name, state in _C.cpu_info()["isas"].items():
        if not state["usable"]:
            with pytest.raises(ValueError, match=re.escape(state["reason"])):
                _C.resolve_isa(name)


@pytest.mark.parametrize("arguments", [("sse",), ("auto", "avx1024"), ("auto", "amx_emulated")])
def test_unknown_names_are_refused(arguments: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match=arguments[-1]):
        _C.resolve_isa(*arguments)


# Instructions beyond what the sets ask of a processor: AVX512_BF16, VBMI, VBMI2, VPOPCNTDQ, BITALG,
# GFNI, VP2INTERSECT, FP16.
BEYOND_AVX512 = (
    r"vdpbf16|vcvtne2?ps2bf16|vperm([it]2)?b\s|vpmultishift|vpsh[lr]dv?[wdq]|vp(compress|expand)[bw]"
    r"|vpopcnt|vpshufbit|gf2p8|vp2intersect|v(add|sub|mul|div|fn?m\w+)[ps]h\s"
)
# What one set's functions must not, and must, contain. Byte 62 begins every EVEX instruction, also
# those on low registers; a mnemonic with v needs AVX.
EVEX = r":\t([26]\w )*62 "
FORBIDDEN = {
    "baseline": r"\tv[a-z]|%[yzt]mm|tilecfg",
    "scalar": r"\tv[a-z]|%[yzt]mm|tilecfg",
    "avx2": rf"{EVEX}|%[zt]mm|tilecfg|vpdp|{BEYOND_AVX512}",
    "avx512": rf"%tmm|tilecfg|{BEYOND_AVX512}",
    "amx_emulated": rf"%tmm|tilecfg|{BEYOND_AVX512}",
    "amx": BEYOND_AVX512,
    "avx512_bf16": r"%tmm|tilecfg",
}
REQUIRED = {
    "baseline": ("ret", "cpuid"),
    "scalar": ("ret",),
    "avx2": ("vpmaddubsw", "vfmadd231ps"),
    "avx512": ("vpdpbusd",),
    "amx_emulated": ("vpdpbusd",),
    "amx": ("vpdpbusd", "ldtilecfg", "tdpbf16ps", "tdpbssd", "tilestored", "tilerelease"),
    "avx512_bf16": ("vpdpbusd", "vdpbf16ps"),
}


def binutils(*command: str) -> str:
    """The output of objdump or nm, or a skip."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("other architectures have the scalar kernels only")
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} (binutils) is not installed")
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def code_of_sets() -> dict[str, str]:
    """The extension's disassembly by instruction set; all other functions are "baseline"."""
    code: dict[str, list[str]] = {}
    listing = binutils("objdump", "-d", "-C", "--insn-width=15", "-j", ".text", str(_C.__file__))
    for function in listing.split("\n\n"):
        title = function.lstrip().partition("\n")[0]
        sets = set(re.findall(r"\bmoejet::(\w+)::", title)) & set(FORBIDDEN)
        assert len(sets) <= 1, title
        code.setdefault(sets.pop() if sets else "baseline", []).append(function)
    if set(code) == {"baseline"}:
        pytest.skip("the extension has been stripped: its functions cannot be told apart")
    return {name: "\n\n".join(functions) for name, functions in code.items()}


@pytest.mark.parametrize("name", FORBIDDEN)
def test_no_instruction_leaks_into_a_narrower_set(name: str) -> None:
    code = code_of_sets()[name]
    leak = re.search(rf"^.*({FORBIDDEN[name]}).*$", code, flags=re.MULTILINE)
    assert leak is None, leak
    for instruction in REQUIRED[name]:
        assert instruction in code


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("baseline", "  10:\tc5 fc 58 c0          \tvaddps %ymm0,%ymm0,%ymm0"),
        ("scalar", "  10:\tc5 f8 58 c0          \tvaddps %xmm0,%xmm0,%xmm0"),
        ("avx2", "  10:\t62 f3 7d 28 25 c0 ff \tvpternlogd $0xff,%ymm0,%ymm0,%ymm0"),
        ("avx2", "  10:\t64 62 f1 7c 48 10 00 \tvmovups %fs:(%rax),%zmm0"),
        ("avx2", "  10:\tc4 e2 7d 50 c0       \tvpdpbusd %ymm0,%ymm0,%ymm0"),
        ("avx512", "  10:\t62 f2 7e 48 52 c0    \tvdpbf16ps %zmm0,%zmm0,%zmm0"),
        ("avx512", "  10:\t62 f2 7d 48 8d c0    \tvpermb %zmm0,%zmm0,%zmm0"),
        ("avx512", "  10:\tc4 e2 7b 49 c0       \ttilezero %tmm0"),
        ("amx", "  10:\t62 f5 7c 48 58 c0    \tvaddph %zmm0,%zmm0,%zmm0"),
    ],
)
def test_leaks_would_be_seen(name: str, line: str) -> None:
    assert re.search(FORBIDDEN[name], line)


@pytest.mark.parametrize("name", NAMES)
def test_shared_symbols_carry_their_set(name: str) -> None:
    # The linker keeps one copy of each weak symbol: one without the set's namespace could be used
    # by code for narrower processors.
    build = Path(__file__).parents[2] / "build"
    found = sorted(build.glob(f"**/_C.dir/csrc/isa/{name}.cpp.o"), key=lambda p: p.stat().st_mtime)
    if not found:
        pytest.skip("no object files under build/: the extension was built elsewhere")
    lines = binutils("nm", "-C", "--defined-only", str(found[-1])).splitlines()
    weak = [line for line in lines if re.search(r" [WVu] ", line) and "DW.ref" not in line]
    namespace = f"moejet::{name.removeprefix('ceilings_')}::"
    assert [line for line in weak if namespace not in line] == []
