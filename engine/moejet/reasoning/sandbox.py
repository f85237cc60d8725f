"""Runs Python that a model wrote, in a child process that can do nothing but compute and print.

    result = run_python("print(sum(range(10)))")
    result.status, result.stdout          # 'ok', '45\n'

Layers, each of which must hold alone where the kernel offers it:

- a fresh interpreter (no environment, no site packages, an unlinked empty directory, no inherited descriptors, its own
  session) and a supervisor between it and us that watches CPU time and the clock and ends it with SIGKILL;
- resource limits: address space, file size 0, no processes, few descriptors, no core;
- an unprivileged user (nobody, where we are root) without capabilities, no_new_privs, an empty root directory;
- namespaces: network, processes, System V objects, mounts;
- a seccomp allow-list of system calls (moejet.reasoning.seccomp): no files, sockets, processes, or executable memory;
- a screen over the syntax tree: allowed modules, no introspection. It explains; the kernel's layers protect.

`sandbox_level()` says what this machine gives. Below the level that the limits require nothing is run.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import marshal
import os
import platform
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from moejet.reasoning.sandbox_program import EXIT_MEMORY, EXIT_REFUSED, EXIT_UNAVAILABLE
from moejet.reasoning.seccomp import filter_program
from moejet.validation import require_choice, require_int, require_number

Status = Literal["ok", "error", "timeout", "memory", "output", "killed", "refused"]
Level = Literal["full", "seccomp", "limits"]
LEVELS: tuple[Level, ...] = ("limits", "seccomp", "full")
REQUIRED: dict[Level, tuple[str, ...]] = {
    "limits": (),
    "seccomp": ("seccomp", "uid", "no_new_privs"),
    "full": ("seccomp", "uid", "no_new_privs", "root", "mnt", "ipc", "pid", "net"),
}

_MODULES = (
    "array bisect calendar cmath collections copy dataclasses datetime decimal enum fractions functools heapq "
    "itertools json math numbers operator random re statistics string sympy textwrap time typing"
)
MODULES = tuple(_MODULES.split())
THIRD_PARTY = {"sympy": ("sympy", "mpmath")}  # an importable name: the packages that it is made of
CODE_CHARACTERS = 200_000
GRACE_S = 5.0  # between the supervisor's limit and ours
CHILD = Path(__file__).with_name("sandbox_child.py")


class SandboxUnavailableError(RuntimeError):
    """This machine does not give the required isolation, or no child process could be started."""


@dataclass(frozen=True, slots=True)
class SandboxLimits:
    """Seconds and bytes; memory is what the program may map beyond the interpreter itself."""

    cpu_s: float = 2.0
    wall_s: float = 10.0
    memory_bytes: int = 512 << 20
    output_bytes: int = 4096
    modules: tuple[str, ...] = MODULES
    screen: bool = (
        True  # False: any program, any module of the standard library; the kernel's layers remain
    )
    require: Level = "seccomp"
    startup_s: float = 20.0

    def __post_init__(self) -> None:
        for name in ("cpu_s", "wall_s", "startup_s"):
            require_number(name, getattr(self, name), above=0, high=3600, hint="seconds")
        require_int("memory_bytes", self.memory_bytes, 1 << 20, 1 << 40)
        require_int("output_bytes", self.output_bytes, 0, 1 << 30)
        require_choice("require", self.require, LEVELS)


@dataclass(frozen=True, slots=True)
class SandboxResult:
    """What a program did. Control characters in its output appear as escapes; a cut output has status 'output'."""

    stdout: str
    stderr: str
    status: Status
    seconds: float  # wall time of the program itself, without starting the interpreter
    cpu_seconds: float
    exit_code: int | None  # None if a signal ended it
    measures: tuple[
        str, ...
    ]  # what protected this run: mnt ipc pid net root uid no_new_privs seccomp

    @property
    def level(self) -> Level:
        return level_of(self.measures)


def level_of(measures: Sequence[str]) -> Level:
    """'full': all; 'seccomp': system calls and user, but not all namespaces; 'limits': resource limits only."""
    return next(level for level in reversed(LEVELS) if set(REQUIRED[level]) <= set(measures))


@functools.cache
def sandbox_level() -> Level:
    """What this machine gives, found by running an empty program."""
    return run_python("", limits=SandboxLimits(require="limits")).level


def run_python(code: str, *, stdin: str = "", limits: SandboxLimits | None = None) -> SandboxResult:
    """Runs `code` in a locked-down child process; may be called from any thread. Only our own failures raise."""
    limits = limits or SandboxLimits()
    if "\0" in code or len(code) > CODE_CHARACTERS:
        reason = f"the program holds a NUL or is longer than {CODE_CHARACTERS} characters"
        return SandboxResult("", reason, "refused", 0.0, 0.0, None, ())
    code = code.encode("utf-8", "replace").decode()  # lone surrogates
    with Child(job_of(code, stdin, limits), limits, stderr=subprocess.PIPE) as child:
        outputs, over = child.collect()
        return child.result(outputs, over)


def job_of(code: str, stdin: str, limits: SandboxLimits, *, serve: bool = False) -> dict[str, Any]:
    """What the child is told. `serve`: our own worker, which may read its stdin."""
    wanted = [name for name in limits.modules if name in THIRD_PARTY and name in code]
    return {
        "mode": "serve" if serve else "run",
        "code": code,
        "stdin": stdin.encode("utf-8", "replace").decode(),
        "cpu_s": limits.cpu_s,
        "wall_s": limits.wall_s,
        "startup_s": limits.startup_s,
        "memory_bytes": limits.memory_bytes,
        "screen": limits.screen,
        "modules": tuple(limits.modules),
        "preload": tuple(limits.modules) if serve else (),
        "packages": _package_folders(tuple(wanted)),
        "filter": filter_program(platform.machine(), may_read_stdin=serve),
        "required": REQUIRED[limits.require],
    }


@functools.cache
def _package_folders(names: tuple[str, ...]) -> dict[str, str]:
    """Where the packages behind third-party names lie; those not installed are left out."""
    folders = {}
    for package in (package for name in names for package in THIRD_PARTY[name]):
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            folders[package] = next(iter(spec.submodule_search_locations))
    return folders


class Child:
    """A started child; leaving the context ends its whole process group, whatever happened."""

    def __init__(self, job: dict[str, Any], limits: SandboxLimits, *, stderr: int):
        self.limits = limits
        folder = tempfile.mkdtemp(prefix="moejet-sandbox-")
        status_r, status_w = os.pipe()
        # -P -s and an empty environment are what -I does, but for the hash seed, which makes runs repeatable.
        command = [
            sys.executable,
            "-P",
            "-s",
            "-S",
            "-B",
            str(CHILD),
            str(status_w),
            str(os.getpid()),
        ]
        try:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                bufsize=0,
                cwd=folder,
                env={"PYTHONHASHSEED": "0"},
                pass_fds=(status_w,),
                start_new_session=True,
            )
        except OSError as error:
            os.close(status_r)
            with contextlib.suppress(OSError):
                os.rmdir(folder)
            raise SandboxUnavailableError(f"cannot start {sys.executable}: {error}") from error
        finally:
            os.close(status_w)
        self.folder, self.status_r = folder, status_r
        self.status = b""
        payload = marshal.dumps(job)
        self.unsent = memoryview(len(payload).to_bytes(8, "little") + payload)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.process.returncode is None:  # else its number may be another's by now
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        if self.status_r >= 0:
            os.close(self.status_r)
            self.status_r = -1
        with contextlib.suppress(OSError):
            os.rmdir(self.folder)

    def collect(self) -> tuple[dict[str, bytearray], bool]:
        """Sends the job and reads until the child has reported, a limit is passed, or too much was printed."""
        process = self.process
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        outputs = {"stdout": bytearray(), "stderr": bytearray()}
        over = False
        deadline = time.monotonic() + self.limits.startup_s + self.limits.wall_s + GRACE_S
        with selectors.DefaultSelector() as selector:
            os.set_blocking(process.stdin.fileno(), False)
            selector.register(process.stdin, selectors.EVENT_WRITE, "stdin")
            selector.register(process.stdout, selectors.EVENT_READ, "stdout")
            selector.register(process.stderr, selectors.EVENT_READ, "stderr")
            selector.register(self.status_r, selectors.EVENT_READ, "status")
            waiting_for_end: float | None = None
            while selector.get_map() and not (over and b"\n" in self.status):
                left = (waiting_for_end or deadline) - time.monotonic()
                if left <= 0:
                    break
                for key, _ in selector.select(left):
                    if key.data == "stdin":
                        self._send(selector)
                        continue
                    data = os.read(key.fd, 1 << 16)
                    if not data:
                        selector.unregister(key.fileobj)
                        if key.data == "status":  # it has ended; the rest lies in the pipes
                            waiting_for_end = time.monotonic() + GRACE_S
                    elif key.data == "status":
                        self.status += data
                    elif not over:
                        outputs[key.data] += data
                over = sum(map(len, outputs.values())) > self.limits.output_bytes
                if waiting_for_end and self._stdin_is_all_that_is_left(selector):
                    break
        return outputs, over

    def _stdin_is_all_that_is_left(self, selector: selectors.BaseSelector) -> bool:
        return all(key.data == "stdin" for key in selector.get_map().values())

    def _send(self, selector: selectors.BaseSelector) -> None:
        stdin = self.process.stdin
        assert stdin is not None
        try:
            self.unsent = self.unsent[os.write(stdin.fileno(), self.unsent[: 1 << 16]) :]
        except BrokenPipeError:
            self.unsent = self.unsent[:0]
        if not self.unsent:
            selector.unregister(stdin)
            stdin.close()

    def result(self, outputs: dict[str, bytearray], over: bool) -> SandboxResult:
        cap = self.limits.output_bytes
        stdout = bytes(outputs["stdout"][:cap])
        stderr = bytes(outputs["stderr"][: cap - len(stdout)])
        lines = self.status.decode("ascii", "replace").split("\n")
        measures = tuple(lines[0].split())
        if "not:seccomp" in measures:
            measures = tuple(m for m in measures if m not in ("seccomp", "not:seccomp"))
        base = SandboxResult(
            printable(stdout), printable(stderr), "output", 0.0, 0.0, None, measures
        )
        if over:
            return base
        words = lines[1].split() if len(lines) > 2 else []
        if not words:
            return replace(base, status=self._end_without_report(base.stderr))
        outcome, code = words[0], int(words[1])
        level = level_of(measures)
        # The code alone proves nothing: a program can end with it too.
        if code == EXIT_UNAVAILABLE and LEVELS.index(level) < LEVELS.index(self.limits.require):
            raise SandboxUnavailableError(
                f"this machine gives isolation level {level!r} ({' '.join(measures) or 'none'}), "
                f"require={self.limits.require!r} wants more: {base.stderr.strip() or 'no message'}"
            )
        return replace(
            base,
            status=_status(outcome, code),
            seconds=float(words[2]),
            cpu_seconds=float(words[3]),
            exit_code=code if code >= 0 else None,
        )

    def _end_without_report(self, stderr: str) -> Status:
        """The supervisor was killed, or hangs, or could not even start."""
        try:
            code = self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            return "timeout"
        if code >= 0:
            raise SandboxUnavailableError(
                f"{sys.executable} failed as a sandbox (exit code {code}): {stderr.strip()}"
            )
        return "killed"


def _status(outcome: str, code: int) -> Status:
    if code < 0:
        return "timeout" if outcome == "timeout" or code == -signal.SIGXCPU else "killed"
    special: dict[int, Status] = {0: "ok", EXIT_MEMORY: "memory", EXIT_REFUSED: "refused"}
    return special.get(code, "error")


def printable(data: bytes) -> str:
    """Text that is safe to show: undecodable bytes become U+FFFD, control characters other than \\n and \\t escapes."""
    text = data.decode("utf-8", "replace")
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf") else repr(c)[1:-1]
        for c in text
    )
