"""What is tested: the files in MOEJET_DIST, where `make dist` has put them, or others built here from the same tree.

A wheel built here takes the objects in build/, which `make install` has left there, and compiles only what is newer.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_RELEASE = os.environ.get("MOEJET_DIST")


def _run(*arguments: str | Path) -> None:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=1200,
        env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="session")
def is_release() -> bool:
    return _RELEASE is not None


@pytest.fixture(scope="session")
def install() -> Callable[[Path, Path], None]:
    """install(wheel, python): the wheel alone, for another Python."""
    options = ("--no-deps", "--no-index", "--no-compile")
    return lambda wheel, python: _run("-m", "pip", "--python", python, "install", *options, wheel)


@pytest.fixture(scope="session")
def build_wheel() -> Callable[..., Path]:
    """build_wheel(source, directory, *options): what pip makes of a source tree or a source distribution."""

    def build(source: Path, directory: Path, *options: str) -> Path:
        common = ("--no-build-isolation", "--no-deps", "--no-cache-dir", "-w", directory)
        _run("-m", "pip", "wheel", *common, *options, source)
        [path] = directory.glob("*.whl")
        return path

    return build


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = ROOT / _RELEASE if _RELEASE else tmp_path_factory.mktemp("sdist")
    if not _RELEASE:
        code = (
            "import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])"
        )
        _run("-c", code, directory)
    [path] = directory.glob("*.tar.gz")
    return path


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory, build_wheel: Callable[..., Path]) -> Path:
    if not _RELEASE:
        return build_wheel(ROOT, tmp_path_factory.mktemp("wheel"))
    [path] = (ROOT / _RELEASE).glob("*.whl")
    return path
