"""Options and fixtures shared by all tests."""

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from moejet.testing.hub import StandInHub

# A job in the background inherits that Ctrl-C is ignored, and so would the programs that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Packed weights are kept only where a test asks for it.
os.environ["MOEJET_CACHE"] = "off"
# Where a GPU is, only tests of it use it.
os.environ["MOEJET_DEVICE"] = "cpu"
# A loaded machine makes any example slow; in CI the same examples come every time.
settings.register_profile("moejet", deadline=None, derandomize=os.environ.get("CI") == "true")
settings.load_profile("moejet")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require",
        action="append",
        default=[],
        metavar="ISA",
        help="fail instead of skip where this instruction set, or 'gpu', cannot run (repeatable)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_tests:
        import torch

        if not torch.cuda.is_available() and "gpu" not in config.getoption("--require"):
            for item in gpu_tests:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    # pytest-xdist would run only one of the tests that share a name, and it puts the group into the name.
    names = Counter(item.nodeid for item in items)
    if twice := [name for name, count in names.items() if count > 1]:
        raise pytest.UsageError(f"{len(twice)} names belong to several tests, as {twice[0]}")


@pytest.hookimpl(trylast=True)
def pytest_collection_finish(session: pytest.Session) -> None:
    if getattr(session.config.option, "loadgroup", False):
        ungrouped = [
            item.nodeid
            for item in session.items
            if item.get_closest_marker("xdist_group") and "@" not in item.nodeid.split("]")[-1]
        ]
        if ungrouped:
            raise pytest.UsageError(f"pytest-xdist does not keep groups together: {ungrouped[0]}")


@pytest.fixture(scope="session")
def usable_isa(pytestconfig: pytest.Config) -> Callable[[str], str]:
    """Returns an instruction set's name if it can run here; else skips, or fails under --require."""

    def check(name: str) -> str:
        from moejet import _C

        state = _C.cpu_info()["isas"][name]
        if not state["usable"]:
            if name in pytestconfig.getoption("--require"):
                pytest.fail(f"{name} is required here, but {state['reason']}")
            pytest.skip(f"{name}: {state['reason']}")
        return name

    return check


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """get(family, **overrides of config.json): a tiny checkpoint, its weights rounded to bf16; not to be changed."""
    made: dict[tuple[object, ...], Path] = {}

    def get(family: str, **overrides: object) -> Path:
        import torch

        from moejet.testing.checkpoints import tiny_checkpoint

        key = (family, *sorted(overrides.items()))
        if key not in made:
            path = tmp_path_factory.mktemp(family)
            made[key] = tiny_checkpoint(path, family, dtype=torch.bfloat16, **overrides)
        return made[key]

    return get


@pytest.fixture(scope="session")
def expected_greedy() -> Callable[[Path, list[list[int]], list[list[int]], int], list[list[int]]]:
    """get(path, prompts, made, n): what transformers' `n` greedy tokens are, however wrong `made` is.

    `made` is what a test got: where it is right, one pass per prompt confirms it.
    """
    known: dict[tuple[object, ...], list[int]] = {}

    def get(path: Path, prompts: list[list[int]], made: list[list[int]], n: int) -> list[list[int]]:
        from moejet.testing.checkpoints import reference_greedy

        result = []
        for prompt, guess in zip(prompts, made, strict=True):
            key = (path, n, *prompt)
            if key not in known:
                known[key] = reference_greedy(path, prompt, n, guess=guess)
            result.append(known[key])
        return result

    return get


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """A model hub on this machine, which huggingface_hub talks to during the test."""
    from huggingface_hub import constants

    server = StandInHub()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        server.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    # Waiting between attempts is left out; what counts here is how many there are.
    monkeypatch.setattr("time.sleep", lambda _: None)
    yield server
    server.close()
