"""The source distribution and the wheel: what is in them, what they need, where they load."""

import importlib.metadata
import os
import platform
import re
import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.metadata import Metadata
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import moejet

pytestmark = pytest.mark.xdist_group("packaging")  # what they build, they build once
ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "engine" / "moejet"
MIB = 1 << 20


def files_of(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if name[-1] != "/"}


@pytest.fixture(scope="module")
def files(wheel) -> dict[str, bytes]:
    return files_of(wheel)


@pytest.fixture(scope="module")
def metadata(files) -> Metadata:
    [text] = [data for name, data in files.items() if name.endswith(".dist-info/METADATA")]
    return Metadata.from_email(text, validate=True)


def sources() -> dict[str, bytes]:
    """The package as it lies in the tree, by its name in a wheel; symlinks followed."""
    return {
        os.path.join("moejet", os.path.relpath(directory, PACKAGE), name).replace("/./", "/"): Path(
            directory, name
        ).read_bytes()
        for directory, _, names in os.walk(PACKAGE, followlinks=True)
        if not directory.endswith("__pycache__")
        for name in names
        if not name.endswith(".so")
    }


def test_a_wheel_holds_the_package_and_nothing_else(files):
    about = {name for name in files if name.startswith(f"moejet-{moejet.__version__}.dist-info/")}
    assert {name.partition("/")[2] for name in about} == {
        *("METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE")
    }
    extension = {name for name in files if name.endswith(".so")}
    assert len(extension) == 1
    assert re.fullmatch(r"moejet/_C\..*\.so", *extension)
    expected = sources()
    assert files.keys() - about - extension == expected.keys()
    for name, data in expected.items():
        assert files[name] == data, name
    for name in ("py.typed", "_C.pyi", "kernels/mla_decode.py", "server/page/index.html"):
        assert f"moejet/{name}" in files
    assert files["moejet/assets/tiny_reasoner/model.safetensors"]


def test_a_source_distribution_is_the_repository(sdist):
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
    assert members.pop("PKG-INFO")
    assert members["engine/moejet/kernels"].linkname == "../../kernels"
    if not (ROOT / ".git").exists():
        pytest.skip("not a repository")
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    files = {name for name in listed.split("\0") if name and os.path.lexists(ROOT / name)}
    assert members.keys() == {name for name in files if not name.startswith(".ci/")}


def test_the_source_distribution_makes_the_same_wheel(sdist, files, build_wheel, tmp_path):
    """Outside any repository. Compiling is left out: all of csrc/ is there, as the test before this one knows."""
    plain = build_wheel(sdist, tmp_path, "--config-settings=wheel.cmake=false")
    expected = {name: data for name, data in files.items() if not name.endswith(".so")}
    made = files_of(plain)
    assert made.keys() == expected.keys()
    assert [name for name in made if made[name] != expected[name]] == [
        name for name in made if name.endswith(("/WHEEL", "/RECORD"))
    ]


def test_metadata(metadata, sdist):
    assert str(metadata.version) == moejet.__version__
    assert sdist.name == f"moejet-{moejet.__version__}.tar.gz"
    assert metadata.license_files == ["LICENSE"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert metadata.license_expression == project["license"]
    assert metadata.description == (ROOT / "README.md").read_text(encoding="utf-8")
    assert "version" not in project
    assert set(metadata.provides_extra) == set(project["optional-dependencies"])


def test_sizes(wheel, files, sdist):
    """A guard against what slips in; the embedded model is half of each."""
    assert wheel.stat().st_size < 7 * MIB
    assert sdist.stat().st_size < 7 * MIB
    assert sum(len(data) for data in files.values()) < 14 * MIB


@pytest.fixture(scope="module")
def extension(files, tmp_path_factory) -> dict[str, list[str]]:
    [data] = [data for name, data in files.items() if name.endswith(".so")]
    path = tmp_path_factory.mktemp("extension") / "_C.so"
    path.write_bytes(data)
    text = subprocess.run(
        ["readelf", "--wide", "--dynamic", "--version-info", path],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return {
        "libraries": re.findall(r"\(NEEDED\).*\[(.*)\]", text),
        "paths": re.findall(r"\((?:RPATH|RUNPATH)\).*\[(.*)\]", text),
        "versions": re.findall(r"Name: ((?:GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+)", text),
    }


def test_the_extension_needs_the_systems_libraries_only(extension):
    """Neither OpenMP nor CUDA, libpython or torch, nor a directory of the machine that built it."""
    names = {name.partition(".so")[0] for name in extension["libraries"]}
    assert "libc" in names
    assert names <= {
        *("libc", "libm", "libdl", "libpthread", "libstdc++", "libgcc_s"),
        *("ld-linux-x86-64", "ld-linux-aarch64"),
    }
    assert extension["paths"] == []


def test_symbols_are_those_of_manylinux_2_34(extension, is_release):
    """RHEL 9, Ubuntu 22.04, Debian 12 and later. The limits are auditwheel's, whose word a release has as well."""
    library, version = platform.libc_ver()
    if not is_release and (library != "glibc" or version > "2.36"):
        pytest.skip(f"symbols follow the machine that builds: {library} {version}")
    limits = {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (7, 0)}
    assert extension["versions"]
    for symbol in extension["versions"]:
        name, _, version = symbol.partition("_")
        assert tuple(map(int, version.split("."))) <= limits[name], symbol


def closure(metadata: Metadata, extra: str) -> set[str]:
    """What `moejet[extra]` asks for, and what that asks for as far as it is installed here, but for torch.

    torch's wheel on PyPI brings CUDA, which nothing here decides: the one for CPUs comes from an index of its own.
    """
    names: set[str] = set()
    todo = [(requirement, extra) for requirement in metadata.requires_dist or []]
    while todo:
        requirement, asked_for = todo.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": asked_for}):
            continue
        name = canonicalize_name(requirement.name)
        if name in names:
            continue
        names.add(name)
        if name == "torch":
            continue
        try:
            further = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        todo += [
            (Requirement(text), each) for text in further for each in ("", *requirement.extras)
        ]
    return names


@pytest.mark.parametrize(
    "extra", ["", "gpu", "server", "hf", "grammar", "math", "plot", "bench", "browser", "clients"]
)
def test_only_the_gpu_extra_asks_for_what_runs_on_a_gpu(metadata, extra):
    names = closure(metadata, extra)
    assert {"torch", "numpy", "safetensors"} <= names
    assert (extra != "server") or {"fastapi", "starlette", "pydantic-core"} <= names
    for_gpus = {name for name in names if re.search("nvidia|cuda|triton|cupy|rocm", name)}
    assert for_gpus == ({"triton"} if extra == "gpu" else set())
