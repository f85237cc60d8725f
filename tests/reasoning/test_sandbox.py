"""moejet.reasoning.sandbox: hostile programs are contained, ordinary ones run, and we are as before.

Every hostile program runs with the screen off, so that the kernel's layers have to hold alone.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from moejet.reasoning import sandbox, symbolic
from moejet.reasoning.sandbox import (
    SandboxLimits,
    SandboxUnavailableError,
    level_of,
    printable,
    run_python,
    sandbox_level,
)

BARE = SandboxLimits(cpu_s=0.1, wall_s=5.0, memory_bytes=24 << 20, screen=False)
SCREENED = SandboxLimits(cpu_s=0.2, wall_s=5.0, memory_bytes=64 << 20)


def open_fds() -> set[str]:
    return {f"{fd}:{os.readlink(f'/proc/self/fd/{fd}')}" for fd in _fds()}


def _fds() -> list[str]:
    return [fd for fd in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{fd}")]


def sandbox_processes(parent: int | None = None) -> list[int]:
    """Supervisors and confined processes of this process, or of `parent`, which may have ended."""
    owner = str(os.getpid() if parent is None else parent).encode()
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if str(sandbox.CHILD).encode() in words and words[-2] == owner:
                found.append(pid)
    return found


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


@pytest.fixture(autouse=True)
def unharmed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Afterwards: the same descriptors, no process left, the canary untouched, no temporary folder left."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    canary = tmp_path / "canary"
    canary.write_text("untouched")
    canary.chmod(0o666)
    symbolic.shared_process().close()  # which tests before this one may have started
    before, limits = open_fds(), resource.getrlimit(resource.RLIMIT_NOFILE)
    yield canary
    assert canary.read_text() == "untouched"
    assert list(folder.iterdir()) == []
    assert open_fds() == before
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == limits
    until(lambda: not sandbox_processes())


# name: (program, what may come of it). CANARY and PARENT are put in.
HOSTILE: dict[str, tuple[str, set[str]]] = {
    "fork bomb": ("import os\nwhile True: os.fork()", {"error"}),
    "fork by raw system calls": (
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n"
        "for nr in (56, 57, 58, 435, 220):\n    assert c.syscall(nr, 0, 0, 0, 0, 0) == -1, nr\nprint('no')",
        {"ok"},
    ),
    "memory bomb": ("x = []\nwhile True: x.append(bytearray(10 << 20))", {"memory"}),
    "one large block": ("bytearray(1 << 40)", {"memory"}),
    "string multiplication": ("x = 'a' * 1000\nwhile True: x = x * 1000", {"memory"}),
    "list that grows in C": ("import itertools\nlist(itertools.repeat(0))", {"memory", "timeout"}),
    "memory caught again and again": (
        "while True:\n    try: bytearray(1 << 40)\n    except MemoryError: pass",
        {"timeout"},
    ),
    "zip bomb in memory": (
        "import zlib\nx = zlib.compress(bytes(20 << 20), 1)\ndel_me = [zlib.decompress(x) for _ in range(9)]",
        {"memory", "timeout"},
    ),
    "huge file": ("open('/tmp/huge', 'wb').write(bytes(1 << 30))", {"error"}),
    "disk full of small files": (
        "import os\nfor i in range(10**6): os.close(os.open(f'f{i}', os.O_CREAT | os.O_WRONLY))",
        {"error"},
    ),
    "folders without end": ("import os\nwhile True: os.mkdir('a'); os.chdir('a')", {"error"}),
    "overwriting a file": ("open('CANARY', 'w').write('gone')", {"error"}),
    "deleting a file": ("import os\nos.remove('CANARY')", {"error"}),
    "deleting a tree": (
        "import os, shutil\nshutil.rmtree('/', ignore_errors=True)\nprint('tried')",
        {"ok"},
    ),
    "temporary file": ("import tempfile\ntempfile.TemporaryFile()", {"error"}),
    "symbolic link": ("import os\nos.symlink('/etc/passwd', 'p')\nopen('p').read()", {"error"}),
    "hard link": ("import os\nos.link('CANARY', 'c')", {"error"}),
    "network": (
        "import socket\nsocket.create_connection(('93.184.216.34', 80), timeout=1)",
        {"error"},
    ),
    "local network": ("import socket\nsocket.create_connection(('127.0.0.1', PORT))", {"error"}),
    "listening": ("import socket\nsocket.socket().bind(('0.0.0.0', 0))", {"error"}),
    "unix socket": (
        "import socket\nsocket.socket(socket.AF_UNIX).connect('/run/docker.sock')",
        {"error"},
    ),
    "socket pair": ("import socket\nsocket.socketpair()", {"error"}),
    "name lookup": ("import socket\nsocket.getaddrinfo('example.com', 80)", {"error"}),
    "endless loop": ("while True: pass", {"timeout"}),
    "ignoring signals": (
        "import signal\nfor s in range(1, 65):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        {"timeout"},
    ),
    "blocking signals": (
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True: pass",
        {"timeout"},
    ),
    "catching everything": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        {"timeout"},
    ),
    "daemon by double fork": (
        "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True: pass",
        {"error"},
    ),
    "own session": ("import os\nos.setsid()", {"error"}),
    "huge output": ("while True: print('x' * 1000)", {"output"}),
    "huge error output": ("import sys\nwhile True: sys.stderr.write('x' * 1000)", {"output"}),
    "output through os.write": ("import os\nwhile True: os.write(1, bytes(1000))", {"output"}),
    "reading /etc/passwd": ("print(open('/etc/passwd').read())", {"error"}),
    "reading the parent's environment": (
        "print(open('/proc/PARENT/environ', 'rb').read())",
        {"error"},
    ),
    "reading init's environment": ("print(open('/proc/1/environ', 'rb').read())", {"error"}),
    "reading the parent's memory": (
        "print(open('/proc/PARENT/mem', 'rb').read(1))",
        {"error"},
    ),
    "process_vm_readv": (
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n"
        "assert c.process_vm_readv(PARENT, None, 0, None, 0, 0) == -1 and ctypes.get_errno() == 1\n"
        "assert c.ptrace(16, PARENT, 0, 0) == -1\nprint('no')",
        {"ok"},
    ),
    "signal to the parent": (
        "import os, signal\nfor pid in (os.getppid(), PARENT, -1, 0):\n"
        "    try: os.kill(pid, signal.SIGKILL)\n    except PermissionError: print('no')",
        {"ok"},
    ),
    "deep recursion": ("def f(): f()\nf()", {"error"}),
    "recursion without limit": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
        {"memory", "killed", "timeout"},
    ),
    "recursion in C": (
        "import sys\nsys.setrecursionlimit(10**9)\nx = []\nfor _ in range(10**6): x = [x]\nrepr(x)",
        {"killed", "error", "memory", "timeout"},
    ),
    "nested source": ("(" * 10000 + ")" * 10000, {"error", "memory"}),
    "nested expression": ("x = " + "-" * 90000 + "1", {"error", "memory", "killed"}),
    "large power": ("9**9**9", {"timeout", "memory"}),
    "large factorial": ("import math\nmath.factorial(10**8)", {"timeout", "memory"}),
    "regular expression": ("import re\nre.match('(a+)+$', 'a' * 40 + 'b')", {"timeout"}),
    "another program": (
        "import os\nos.execve('/bin/sh', ['sh', '-c', 'echo hi'], {})",
        {"error"},
    ),
    "a shell": ("import subprocess\nsubprocess.run(['sh', '-c', 'echo hi'])", {"error"}),
    "system": ("import os\nassert os.system('echo hi') != 0\nprint('no')", {"ok"}),
    "becoming root": ("import os\nos.setuid(0)", {"error"}),
    "leaving the root directory": ("import os\nos.chroot('/')", {"error"}),
    "raising limits": (
        "import resource\nresource.setrlimit(resource.RLIMIT_CPU, (10**6, 10**6))",
        {"error"},
    ),
    "raising the parent's limits": (
        "import resource\nresource.prlimit(PARENT, resource.RLIMIT_NOFILE, (3, 3))",
        {"error"},
    ),
    "threads by the hundred": (
        "import threading\nfor _ in range(300): threading.Thread(target=print).start()",
        {"error"},
    ),
    "closing descriptors": ("import os\nos.closerange(0, 4096)\nprint('gone')", {"ok", "error"}),
    "writing to inherited descriptors": (
        "import os\nfor fd in range(3, 300):\n"
        "    try: os.write(fd, b'x')\n    except OSError: continue\n    print('wrote', fd)",
        {"ok"},
    ),
    "reading stdin's descriptor": ("import os\nos.read(0, 1)", {"error"}),
    "shared memory": (
        "from multiprocessing import shared_memory\nshared_memory.SharedMemory(create=True, size=9)",
        {"error"},
    ),
    "memfd": ("import os\nos.memfd_create('x')", {"error"}),
    "executable memory": (
        "import mmap\nmmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)",
        {"error"},
    ),
    "new namespaces": (
        "import ctypes\nc = ctypes.CDLL(None, use_errno=True)\n"
        "assert c.unshare(0x10000000) == -1 and c.mount(b'/', b'/', None, 0, None) == -1\nprint('no')",
        {"ok"},
    ),
    "sleeping": ("import time\ntime.sleep(100)", {"timeout"}),
    "pretending that there is no sandbox": ("import os\nos._exit(252)", {"error"}),
    "leaving early": ("import os\nos._exit(3)", {"error"}),
    "crash": ("import ctypes\nctypes.string_at(1)", {"killed"}),
    "abort": ("import os\nos.abort()", {"killed"}),
    "bytes that are no text": (
        "import sys\nsys.stdout.buffer.write(b'\\xff\\xfe ok\\n')",
        {"ok"},
    ),
    "terminal control": ("print('\\x1b[2J\\x1b]0;owned\\x07\\x00')", {"ok"}),
}
ALLOWED_OUTPUT = {"no", "tried", "gone", ""}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_program_is_contained(name: str, unharmed: Path) -> None:
    program, expected = HOSTILE[name]
    server = socket.create_server(("127.0.0.1", 0))
    with server:
        program = program.replace("CANARY", str(unharmed)).replace("PARENT", str(os.getpid()))
        program = program.replace("PORT", str(server.getsockname()[1]))
        limits = BARE if name != "sleeping" else SandboxLimits(wall_s=0.3, screen=False)
        result = run_python(program, limits=limits)
    assert result.status in expected, result
    assert result.level == sandbox_level()
    assert len(result.stdout.encode()) + len(result.stderr.encode()) <= 4 * BARE.output_bytes
    if result.status != "output" and name not in ("bytes that are no text", "terminal control"):
        assert set(result.stdout.split()) <= ALLOWED_OUTPUT, result
    assert not any(c < " " and c not in "\n\t" for c in result.stdout)


@pytest.mark.parametrize(
    "program",
    [
        "import os",
        "import ctypes, socket",
        "from importlib import import_module",
        "__import__('os')",
        "().__class__.__base__.__subclasses__()",
        "[c for c in ''.__class__.__mro__[1].__subclasses__()]",
        "import random\nrandom._os.system('id')",
        "from random import _os",
        "import json\njson.codecs.builtins.open('/etc/passwd')",
        "eval('1+1')",
        "exec('import os')",
        "open('/etc/passwd')",
        "def f():\n    yield\nf().gi_frame.f_back.f_globals",
        "try:\n    1/0\nexcept Exception as e:\n    e.__traceback__.tb_frame.f_back",
        "print.__self__",
        "(lambda: 0).__globals__",
        "globals()['__builtins__']",
        "match 1:\n    case object(__class__=x): pass",
    ],
)
def test_screen_refuses(program: str) -> None:
    result = run_python(program, limits=SCREENED)
    assert result.status == "refused"
    assert "line" in result.stderr


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("getattr((), '__cl' + 'ass__')", "AttributeError"),
        ("__builtins__['__import__']('os')", "ImportError"),
        ("__builtins__['open']('/etc/passwd')", "KeyError"),
        ("import sys\nsys.path", "AttributeError"),
        ("import numpy", "line 1"),
    ],
)
def test_reduced_builtins_refuse_what_the_screen_cannot_see(program: str, message: str) -> None:
    result = run_python(program, limits=SCREENED)
    assert result.status in ("error", "refused")
    assert message in result.stderr


def test_ordinary_programs() -> None:
    program = """
import math, itertools, random, sys
from fractions import Fraction
from collections import Counter
import datetime

class Point:
    def __init__(self, x): self._x = x
    def __add__(self, other): return Point(self._x + other._x)

sys.setrecursionlimit(5000)
def depth(n): return 0 if n == 0 else 1 + depth(n - 1)
print(depth(3000), (Point(1) + Point(2))._x, Fraction(1, 3) + Fraction(1, 6))
print(input(), sys.stdin.read(), Counter("aab").most_common(1), math.comb(10, 3))
print(datetime.datetime.strptime("2020-02-29", "%Y-%m-%d").date(), "é".encode("latin-1"))
print(f"{3.14159:.2f}", "{:>4}".format(7), sorted({"b", "a"}), round(2.5), 2**100 % 7)
"""
    result = run_python(program, stdin="line\nrest ü", limits=SCREENED)
    assert (result.status, result.stderr, result.exit_code) == ("ok", "", 0)
    assert result.stdout.splitlines() == [
        "3000 3 1/2",
        "line rest ü [('a', 2)] 120",
        "2020-02-29 b'\\xe9'",
        "3.14    7 ['a', 'b'] 2 2",
    ]
    assert 0 < result.cpu_seconds < 0.2
    assert 0 < result.seconds < 5


def test_same_program_same_output() -> None:
    program = "import random\nprint(hash('x'), random.random(), list({'a', 'b', 'c', 'd'}))"
    outputs = {run_python(program, limits=SCREENED).stdout for _ in range(2)}
    assert len(outputs) == 1
    assert outputs != {""}


def test_errors_name_the_line() -> None:
    result = run_python("x = 1\n\ndef f(y):\n    return x / y\n\nprint('before')\nf(0)\n")
    assert (result.status, result.stdout) == ("error", "before\n")
    assert result.stderr == (
        "  line 7, in <module>\n    f(0)\n  line 4, in f\n    return x / y\nZeroDivisionError: division by zero\n"
    )
    assert "SyntaxError" in run_python("x = = 1").stderr


@pytest.mark.parametrize(
    ("program", "status", "code"),
    [
        ("raise SystemExit", "ok", 0),
        ("exit(0)", "ok", 0),
        ("import sys\nsys.exit(3)", "error", 3),
        ("import sys\nsys.exit(250)", "error", 1),
        ("import sys\nsys.exit(-1)", "error", 1),
        ("import sys\nsys.exit('words')", "error", 1),
    ],
)
def test_exit_codes(program: str, status: str, code: int) -> None:
    result = run_python(program, limits=SCREENED)
    assert (result.status, result.exit_code) == (status, code)


def test_partial_output_of_a_stopped_program_is_kept() -> None:
    result = run_python("print('first')\nwhile True: pass", limits=SCREENED)
    assert (result.status, result.stdout) == ("timeout", "first\n")
    assert 0.2 <= result.cpu_seconds < 1.0


def test_output_is_cut_at_the_cap() -> None:
    limits = SandboxLimits(output_bytes=10)
    assert run_python("print('123456789')", limits=limits).stdout == "123456789\n"
    result = run_python("print('1234567890')", limits=limits)
    assert (result.status, result.stdout) == ("output", "1234567890")


def test_sympy_works_behind_closed_doors() -> None:
    pytest.importorskip("sympy")
    program = "from sympy import *\nx = symbols('x')\nprint(solve(x**2 - 2), integrate(sin(x)**2, (x, 0, pi)))"
    result = run_python(program, limits=SandboxLimits(cpu_s=10, wall_s=60))
    assert (result.status, result.stdout) == ("ok", "[-sqrt(2), sqrt(2)] pi/2\n"), result


def test_from_threads() -> None:
    with ThreadPoolExecutor(8) as pool:
        results = list(
            pool.map(lambda i: run_python(f"print({i} ** 2)", limits=SCREENED), range(16))
        )
    assert [result.stdout for result in results] == [f"{i**2}\n" for i in range(16)]


def test_environment_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEJET_SECRET", "swordfish")
    monkeypatch.setenv("PYTHONINSPECT", "1")
    result = run_python("import os, sys\nprint(dict(os.environ), len(sys.argv))", limits=BARE)
    assert result.stdout == "{} 1\n"


def test_parents_death_ends_the_program(tmp_path: Path) -> None:
    """The supervisor notices that nobody reads its report."""
    code = (
        "import sys; from moejet.reasoning.sandbox import *\n"
        "run_python('while True: pass', limits=SandboxLimits(cpu_s=60, wall_s=60))"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    until(lambda: len(sandbox_processes(parent.pid)) == 2)
    parent.kill()
    parent.wait()
    until(lambda: not sandbox_processes(parent.pid))
    for folder in Path(tempfile.gettempdir()).glob("moejet-sandbox-*"):
        folder.rmdir()  # the child may not have come so far as to remove it


def test_parents_death_counts_also_where_its_pipes_live_on() -> None:
    """A process that was forked from the parent holds the other ends of all pipes."""
    code = (
        "import os, threading, time; from moejet.reasoning.sandbox import *\n"
        "def go(): run_python('while True: pass', limits=SandboxLimits(cpu_s=60, wall_s=60))\n"
        "threading.Thread(target=go).start()\n"
        "input()\n"
        "print(os.fork() or time.sleep(30), flush=True)\n"
        "input()"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert parent.stdin is not None
    assert parent.stdout is not None
    until(lambda: len(sandbox_processes(parent.pid)) == 2)
    parent.stdin.write("\n")
    parent.stdin.flush()
    holder = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    try:
        until(lambda: not sandbox_processes(parent.pid), seconds=25)  # the holder sleeps for longer
    finally:
        os.kill(holder, signal.SIGKILL)
        parent.stdin.close()
        parent.stdout.close()
    for folder in Path(tempfile.gettempdir()).glob("moejet-sandbox-*"):
        folder.rmdir()


@pytest.mark.parametrize("moment", ["it is there", "it has forked", "the program runs"])
def test_supervisors_death_ends_the_program(moment: str) -> None:
    def has_come() -> bool:
        pids = sandbox_processes()
        if moment == "the program runs":
            return any("Seccomp:\t2\n" in _state(pid) for pid in pids)
        return len(pids) >= (1 if moment == "it is there" else 2)

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(
            run_python, "while True: pass", limits=SandboxLimits(cpu_s=60, wall_s=60)
        )
        until(has_come)
        own = f"PPid:\t{os.getpid()}\n"
        [supervisor] = [pid for pid in sandbox_processes() if own in _state(pid)]
        os.kill(supervisor, signal.SIGKILL)
        assert future.result(30).status == "killed"
    # the fixture sees that the confined process goes too


def _state(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/status").read_text()
    return ""


def test_interpreter_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox.sys, "executable", "/nowhere/python")
    with pytest.raises(SandboxUnavailableError, match="cannot start /nowhere/python"):
        run_python("print(1)")
    monkeypatch.setattr(sandbox.sys, "executable", "/bin/false")
    with pytest.raises(
        SandboxUnavailableError, match=r"/bin/false failed as a sandbox \(exit code 1\)"
    ):
        run_python("print(1)")


def test_long_input() -> None:
    text = "0123456789" * 100_000
    result = run_python("print(len(input()))", stdin=text, limits=SCREENED)
    assert result.stdout == "1000000\n"


def test_level_is_reported_and_required(monkeypatch: pytest.MonkeyPatch) -> None:
    assert sandbox_level() == run_python("", limits=SCREENED).level
    everything = ("mnt", "ipc", "pid", "net", "root", "uid", "no_new_privs", "seccomp")
    assert level_of(everything) == "full"
    assert level_of([m for m in everything if m != "net"]) == "seccomp"
    assert level_of([m for m in everything if m != "seccomp"]) == "limits"
    assert level_of([m for m in everything if m != "uid"]) == "limits"
    monkeypatch.setattr(sandbox.platform, "machine", lambda: "sparc")
    with pytest.raises(SandboxUnavailableError, match=r"level 'limits'.*require='seccomp'"):
        run_python("print(1)", limits=SCREENED)
    weak = run_python("print(1)", limits=SandboxLimits(require="limits"))
    assert (weak.stdout, weak.level) == ("1\n", "limits")
    fork = SandboxLimits(require="limits", screen=False, cpu_s=0.2)
    assert run_python("import os\nos.fork()", limits=fork).status == "error"  # RLIMIT_NPROC alone
    if "root" in weak.measures:  # the empty root directory alone
        assert run_python("open('/etc/passwd')", limits=fork).status == "error"


def test_program_that_is_no_text() -> None:
    assert run_python("print(1)\0", limits=SCREENED).status == "refused"
    assert run_python("#" * 300_000, limits=SCREENED).status == "refused"
    assert run_python("print(len('\udc80'))", limits=SCREENED).stdout == "1\n"


@pytest.mark.parametrize(
    "field",
    [{"cpu_s": 0}, {"wall_s": -1}, {"memory_bytes": 5}, {"output_bytes": -1}, {"require": "x"}],
)
def test_limits_are_checked(field: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(field))):
        SandboxLimits(**field)  # type: ignore[arg-type]


def test_printable() -> None:
    assert printable(b"plain\n\ttext") == "plain\n\ttext"
    assert printable("é\x1b[2J\r\x00\u202e".encode() + b"\xff") == "é\\x1b[2J\\r\\x00\\u202e�"


def test_signals_and_threads_of_ours_are_untouched() -> None:
    handlers = {s: signal.getsignal(s) for s in (signal.SIGCHLD, signal.SIGPIPE, signal.SIGINT)}
    count = threading.active_count()
    run_python("while True: print('x' * 100)", limits=SCREENED)
    assert {s: signal.getsignal(s) for s in handlers} == handlers
    assert threading.active_count() == count
