"""Symbolic equality by sympy, in a confined process that is reused, and replaced when it hangs.

sympy is an optional dependency (torch brings it). Without it, or without a sandbox, this says "undecided".
"""

from __future__ import annotations

import atexit
import importlib.util
import json
import logging
import os
import selectors
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

from moejet.reasoning.expression import Node
from moejet.reasoning.sandbox import (
    Child,
    SandboxLimits,
    SandboxUnavailableError,
    job_of,
)

WORKER = Path(__file__).with_name("sympy_worker.py")
LIFETIME_S = 3600.0  # of one worker process, and its CPU time
START_S = 60.0

logger = logging.getLogger(__name__)


class SympyProcess:
    """One worker; thread-safe. Starts at the first question."""

    def __init__(self, memory_bytes: int = 512 << 20):
        self.limits = SandboxLimits(
            cpu_s=LIFETIME_S,
            wall_s=LIFETIME_S,
            memory_bytes=memory_bytes,
            modules=("json", "sympy"),
            startup_s=START_S,
        )
        self.starts = 0
        self.timeouts = 0
        self._child: Child | None = None
        self._owner = 0
        self._lock = threading.Lock()
        self._broken = importlib.util.find_spec("sympy") is None
        if self._broken:
            logger.warning(
                "sympy is not installed: equality beyond numbers stays undecided (pip install sympy)"
            )

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.process.pid

    def equal(self, first: Node, second: Node, *, timeout_s: float) -> bool | None:
        """Whether the difference is zero; None if that cannot be decided in time."""
        question = json.dumps([tree_of(first), tree_of(second)])
        with self._lock:
            for _ in range(2):  # a worker that has met its lifetime in between is replaced once
                if not self._ready():
                    return None
                try:
                    reply = self._ask(question, timeout_s)
                except BrokenPipeError:
                    self._stop()
                    continue
                if not reply:  # hung, or out of memory
                    self.timeouts += 1
                    self._stop()
                return {"1": True, "0": False}.get(reply)
        return None

    def close(self) -> None:
        with self._lock:
            self._stop()

    def _ready(self) -> bool:
        if self._child is not None and self._owner != os.getpid():
            self._child = None  # a forked copy must not talk into its parent's pipes
        if self._child is not None and self._child.process.poll() is not None:
            self._stop()
        if self._child is None and not self._broken:
            self._start()
        return self._child is not None

    def _start(self) -> None:
        try:
            job = job_of(WORKER.read_text(encoding="utf-8"), "", self.limits, serve=True)
            self._child = Child(job, self.limits, stderr=subprocess.DEVNULL)
            self._owner = os.getpid()
            self.starts += 1
            self._write(bytes(self._child.unsent))
            if self._ask("ready?", START_S) != "ready":
                raise SandboxUnavailableError("the worker did not start")
        except (SandboxUnavailableError, BrokenPipeError) as error:
            logger.warning("no symbolic equality, only numbers are compared: %s", error)
            self._broken = True
            self._stop()

    def _stop(self) -> None:
        if self._child is not None and self._owner == os.getpid():
            self._child.close()
        self._child = None

    def _write(self, data: bytes) -> None:
        assert self._child is not None
        stdin = self._child.process.stdin
        assert stdin is not None
        view = memoryview(data)
        while view:
            view = view[os.write(stdin.fileno(), view) :]

    def _ask(self, question: str, timeout_s: float) -> str:
        """One line there, one line back; "" if none came in time."""
        assert self._child is not None
        stdout = self._child.process.stdout
        assert stdout is not None
        self._write(question.encode() + b"\n")
        deadline = time.monotonic() + timeout_s
        reply = b""
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            while not reply.endswith(b"\n") and (left := deadline - time.monotonic()) > 0:
                if selector.select(left):
                    data = os.read(stdout.fileno(), 100)
                    if not data:
                        return ""
                    reply += data
        return reply.decode("ascii", "replace").strip() if reply.endswith(b"\n") else ""


def tree_of(node: Node) -> list[Any]:
    """As the worker reads it."""
    if node.kind == "num":
        return ["num", str(node.number.numerator), str(node.number.denominator)]
    name = [node.name] if node.name else []
    return [node.kind, *name, *map(tree_of, node.parts)]


_shared: list[SympyProcess] = []
_shared_lock = threading.Lock()


def shared_process() -> SympyProcess:
    """The process that all comparisons of this interpreter share."""
    with _shared_lock:
        if not _shared:
            _shared.append(SympyProcess())
            atexit.register(_shared[0].close)
        return _shared[0]
