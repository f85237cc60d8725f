"""Detection, choice and separation of instruction sets."""

import platform
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from moejet import _C

NAMES = ("scalar", "avx2", "avx512", "amx", "amx_emulated")


def test_cpu_info_describes_every_set() -> None:
    info = _C.cpu_info()
    assert tuple(info["isas"]) == NAMES
    assert info["isas"]["scalar"]["usable"]
    for state in info["isas"].values():
        assert state["usable"] == (state["reason"] == "")
        assert state["compiled"] or not state["usable"]


def test_required_sets_are_usable(request: pytest.FixtureRequest) -> None:
    for name in request.config.getoption("--require"):
        state = _C.cpu_info()["isas"][name]
        assert state["usable"], f"{name}: {state['reason']}"


def test_auto_is_the_widest_usable_and_never_emulated() -> None:
    isas = _C.cpu_info()["isas"]
    widest = [name for name in NAMES[:4] if isas[name]["usable"]][-1]
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


# What one instruction set's object file must not, and must, contain.
FORBIDDEN = {
    "scalar": r"%ymm|%zmm|%tmm",
    "avx2": r"%zmm|%tmm|%ymm(1[6-9]|2\d|3[01])",
    "avx512": r"%tmm|tilecfg",
    "amx_emulated": r"%tmm|tilecfg",
    "amx": r"(?!)",
    "ceilings_scalar": r"%ymm|%zmm|%tmm",
    "ceilings_avx2": r"%zmm|%tmm|%ymm(1[6-9]|2\d|3[01])",
    "ceilings_avx512": r"%tmm|tilecfg|vdpbf16ps",
    "ceilings_avx512_bf16": r"%tmm|tilecfg",
    "ceilings_amx": r"(?!)",
}
REQUIRED = {
    "scalar": ("ret",),
    "avx2": ("vpmaddubsw", "vfmadd231ps"),
    "avx512": ("vpdpbusd",),
    "amx_emulated": ("vpdpbusd",),
    "amx": ("vpdpbusd", "ldtilecfg", "tdpbf16ps", "tilestored", "tilerelease"),
    "ceilings_scalar": ("ret",),
    "ceilings_avx2": ("vpmaddubsw", "vfmadd231ps"),
    "ceilings_avx512": ("vpdpbusd", "vfmadd231ps"),
    "ceilings_avx512_bf16": ("vdpbf16ps",),
    "ceilings_amx": ("ldtilecfg", "tdpbf16ps", "tdpbssd", "tilerelease"),
}


def object_file(name: str) -> Path:
    """The newest object file of csrc/isa/<name>.cpp, from whichever build directory."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("other architectures have the scalar kernels only")
    if shutil.which("objdump") is None or shutil.which("nm") is None:
        pytest.skip("binutils are not installed")
    build = Path(__file__).parents[2] / "build"
    found = sorted(build.glob(f"**/_C.dir/csrc/isa/{name}.cpp.o"), key=lambda p: p.stat().st_mtime)
    if not found:
        pytest.skip("no object files under build/: the extension was built elsewhere")
    return found[-1]


@pytest.mark.parametrize("name", FORBIDDEN)
def test_no_instruction_leaks_into_a_narrower_set(name: str) -> None:
    command = ["objdump", "-d", "--no-show-raw-insn", str(object_file(name))]
    code = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    leak = re.search(rf"^.*({FORBIDDEN[name]}).*$", code, flags=re.MULTILINE)
    assert leak is None, leak
    for instruction in REQUIRED[name]:
        assert instruction in code


@pytest.mark.parametrize("name", FORBIDDEN)
def test_shared_symbols_carry_their_set(name: str) -> None:
    # The linker keeps one copy of each weak symbol: one without the set's namespace could be used
    # by code for narrower processors.
    command = ["nm", "-C", "--defined-only", str(object_file(name))]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    weak = [line for line in lines if re.search(r" [WVu] ", line) and "DW.ref" not in line]
    namespace = f"moejet::{name.removeprefix('ceilings_')}::"
    assert [line for line in weak if namespace not in line] == []
