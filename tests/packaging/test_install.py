"""The wheel in an empty environment, away from the sources, without a compiler."""

import json
import subprocess
import sys
import sysconfig
import urllib.request
from pathlib import Path

import pytest

import moejet

pytestmark = pytest.mark.xdist_group("packaging")
ROOT = Path(__file__).resolve().parents[2]
QUESTION = "Start with 17, add 25."


class Environment:
    """A virtual environment whose packages are its own, then those that the tests run with."""

    def __init__(self, path: Path):
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", path], check=True)
        self.bin = path / "bin"
        self.home = path / "home"
        self.home.mkdir()
        [self.packages] = path.glob("lib/python*/site-packages")
        # Directories named here come after the environment's own, and their .pth files count for nothing.
        borrowed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
        (self.packages / "dependencies.pth").write_text("\n".join(sorted(borrowed)))

    def start(self, program: str, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.bin / program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
            text=True,
            cwd=self.home,
            # No compiler on this path.
            env={
                "PATH": str(self.bin),
                "HOME": str(self.home),
                "MOEJET_DEVICE": "cpu",
                "OMP_NUM_THREADS": "1",
            },
        )

    def run(self, program: str, *arguments: str) -> str:
        process = self.start(program, *arguments)
        out, error = process.communicate(timeout=300)
        assert process.returncode == 0, error
        return out


@pytest.fixture(scope="module")
def environment(wheel, install, tmp_path_factory) -> Environment:
    made = Environment(tmp_path_factory.mktemp("environment") / "venv")
    install(wheel, made.bin / "python")
    return made


def test_the_installed_package_is_complete(environment):
    code = """
import json, sys, importlib.metadata, moejet
from moejet import _C, kernels
from moejet.presets import PRESETS
print(json.dumps([moejet.__file__, _C.__file__, *kernels.__path__, importlib.metadata.version("moejet"), sys.path]))
"""
    *places, version, paths = json.loads(environment.run("python", "-c", code))
    for place in places:
        assert Path(place).is_relative_to(environment.packages)
    assert version == moejet.__version__
    assert not [path for path in paths if path and Path(path).is_relative_to(ROOT / "engine")]


def test_the_command_line(environment):
    assert environment.run("moejet", "--version").strip() == f"moejet {moejet.__version__}"
    assert "moejet COMMAND" in environment.run("moejet", "--help")
    result = json.loads(environment.run("moejet", "run", QUESTION, "--temperature", "0", "--json"))
    assert result["finish_reason"] == "stop"
    assert "42" in result["content"]


def test_the_server_answers(environment):
    server = environment.start("moejet", "serve", "--port", "0")
    try:
        line = server.stdout.readline()
        assert " is served at http://127.0.0.1:" in line, server.communicate()
        url = line.split()[-1]
        body = {"model": "tiny-reasoner", "messages": [{"role": "user", "content": QUESTION}]}
        request = urllib.request.Request(
            f"{url}/v1/chat/completions",
            json.dumps({**body, "temperature": 0}).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            [choice] = json.load(response)["choices"]
        assert "42" in choice["message"]["content"]
        with urllib.request.urlopen(url, timeout=60) as response:
            assert b"<script" in response.read()
        server.terminate()
        assert server.wait(timeout=60) == 0
    finally:
        server.kill()
        server.communicate()
