"""The benchmark of leaks in a small version: that it runs, and that nothing leaks."""

import importlib.util
import json
import resource
import sys
from pathlib import Path

import pytest

pytest.importorskip("uvicorn")

PATH = Path(__file__).resolve().parents[2] / "bench" / "serve_leaks.py"


def load():
    spec = importlib.util.spec_from_file_location("serve_leaks", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["serve_leaks"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def same_file_limit():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_fifty_rounds_and_a_hundred_idle_sockets_leave_nothing(capsys):
    arguments = ["--rounds", "50", "--sockets", "100", "--header-timeout", "1"]
    code = load().main(arguments)
    found = json.loads(capsys.readouterr().out)
    assert found["leaks"] == []
    assert found["idle"]["closed"] == 100
    assert sum(found["rounds"].values()) == 50
    assert found["after_idle"]["tasks"] == found["before"]["tasks"]
    # The engine's blocks, requests and samples are all given back.
    for name in ("running", "waiting", "requests", "held_share"):
        assert found["after_idle"][name] == 0
    assert found["idle"]["health_ms"]["p50"] < 1000
    assert (code, found["exit_code"], found["tracebacks"]) == (0, 0, 0)
