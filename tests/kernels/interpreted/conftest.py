"""Kernels under Triton's interpreter, which an environment variable chooses before Triton is imported."""

import os
import threading
from types import SimpleNamespace

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]


@pytest.fixture(autouse=True)
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter keeps a program's place in its grid for all threads; simulated streams launch on their own.

    It also looks through the language for what to replace whenever one kernel calls another: here once per launch.
    """
    from triton import language
    from triton.runtime import interpreter

    run, lock = interpreter.InterpretedFunction.run, threading.Lock()
    replace, replaced = interpreter._patch_lang, set[frozenset[int]]()

    def run_alone(*args, **kwargs):
        with lock:
            try:
                return run(*args, **kwargs)
            finally:
                replaced.clear()

    def replace_once(fn):
        names = fn.__globals__.values()
        seen = frozenset(
            id(value) for value in names if value is language or value is language.core
        )
        if seen in replaced:
            return SimpleNamespace(restore=lambda: None)
        replaced.add(seen)
        return replace(fn)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", run_alone)
    monkeypatch.setattr(interpreter, "_patch_lang", replace_once)


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
