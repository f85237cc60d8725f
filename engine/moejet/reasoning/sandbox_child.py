"""The child's side of the sandbox; started as a script by moejet.reasoning.sandbox, never imported.

Two processes. The supervisor reads the job, enters fresh namespaces where that is allowed, forks, watches the clocks of
its child, and reports. The confined child loads the wanted modules, gives up files, rights and system calls for good,
and only then looks at the program's text: not even the parser sees it before. Few imports, all of the standard library:
this is what starting a sandbox costs.
"""

from __future__ import annotations

import ctypes
import io
import marshal
import os
import resource
import select
import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any, NoReturn

    Job = dict[str, Any]

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from sandbox_program import EXIT_UNAVAILABLE, run, suppress  # type: ignore[import-not-found]  # noqa: E402

del sys.path[0]

SIGKILL = 9
NOBODY = 65534
STARTUP_CPU_S = 30
STARTUP_BYTES = 512 << 20
# What large packages import of the standard library only when they need it.
IMPORTED_LATE = "dataclasses glob hashlib heapq importlib.machinery logging statistics tokenize"

# linux/sched.h, linux/prctl.h, linux/capability.h
NAMESPACES = {"mnt": 0x00020000, "ipc": 0x08000000, "pid": 0x20000000, "net": 0x40000000}
CLONE_NEWUSER = 0x10000000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 38
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION_3 = 0x20080522


def main() -> None:
    status_fd, parent = int(sys.argv[1]), int(sys.argv[2])
    del sys.argv[1:]  # which say nothing to the program
    parent_fd = _watched_process(parent)
    if os.getppid() != parent:
        sys.exit("nobody waits for this")
    with suppress(OSError):
        os.rmdir(os.getcwd())  # an unlinked directory: nothing can ever be created in it
    size = int.from_bytes(_read_exactly(8, parent_fd), "little")
    job: Job = marshal.loads(_read_exactly(size, parent_fd))
    libc = ctypes.CDLL(None, use_errno=True)
    measures = _enter_namespaces(libc)
    ready_r, ready_w = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(status_fd)
            os.close(ready_r)
            _confined(job, libc, measures, ready_w)
        finally:
            os._exit(EXIT_UNAVAILABLE)
    for fd in (ready_w, 0, 1):
        os.close(fd)
    _supervise(job, pid, ready_r, status_fd, (parent, parent_fd))


def _watched_process(pid: int) -> int:
    """A descriptor that can be read once the process has ended; -1 where the kernel has none."""
    with suppress(OSError):
        return os.pidfd_open(pid)
    return -1


def _read_exactly(size: int, parent_fd: int) -> bytes:
    """From stdin. A process that was forked from the parent may hold the other end, so its end alone is no sign."""
    poller = select.poll()
    for fd in (0, parent_fd):
        if fd >= 0:
            poller.register(fd, select.POLLIN)
    data = b""
    while len(data) < size:
        if parent_fd in dict(poller.poll()):
            sys.exit("the parent has ended")
        piece = os.read(0, min(size - len(data), 1 << 20))
        if not piece:
            sys.exit("the job ended early")
        data += piece
    return data


def _enter_namespaces(libc: ctypes.CDLL) -> list[str]:
    """Fresh namespaces for the child to be forked; a user namespace only where we are nobody special."""
    uid, gid = os.getuid(), os.getgid()
    if uid != 0:
        if libc.unshare(CLONE_NEWUSER) != 0:
            return []
        for name, text in (
            ("setgroups", "deny"),
            ("uid_map", f"{uid} {uid} 1"),
            ("gid_map", f"{gid} {gid} 1"),
        ):
            with suppress(OSError), open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    if libc.unshare(sum(NAMESPACES.values())) == 0:
        return list(NAMESPACES)
    return [name for name, flag in NAMESPACES.items() if libc.unshare(flag) == 0]


def _supervise(job: Job, pid: int, ready_r: int, status_fd: int, parent: tuple[int, int]) -> None:
    """Waits for the child and ends it at a limit. Reports in two lines: what protects it, then what came of it.

    parent: its number and a descriptor, see `_watched_process`; nobody waits for us any more once it has ended, or has
    closed its end of status_fd
    """
    poller = select.poll()
    poller.register(ready_r, select.POLLIN)
    poller.register(status_fd, 0)  # tells of an error
    parent_pid, parent_fd = parent
    pid_fd = _watched_process(pid)
    for fd in (pid_fd, parent_fd):
        if fd >= 0:
            poller.register(fd, select.POLLIN)
    cpu_clock = (~pid << 3) | 2  # of a whole process, as clock_getcpuclockid(3) makes it
    outcome, told = "ended", b""
    start, cpu_start = time.monotonic(), 0.0
    wall_limit, cpu_limit, running = float(job["startup_s"]), float(STARTUP_CPU_S), False
    while True:
        try:
            cpu = time.clock_gettime(cpu_clock) - cpu_start
        except OSError:  # the child has ended
            cpu = 0.0
        left = min(wall_limit - (time.monotonic() - start), cpu_limit - cpu)
        if left <= 0:
            outcome = "timeout"
            break
        if pid_fd < 0:
            left = min(left, 0.01)
        events = dict(poller.poll(left * 1000 + 1))
        if ready_r in events:  # before anything else: its end may come with the child's own
            piece = os.read(ready_r, 4096)
            told += piece
            if not piece:  # closed: from here on it is the program's time
                running = True
                poller.unregister(ready_r)
                start, cpu_start = _report_measures(told, status_fd)
                wall_limit, cpu_limit = float(job["wall_s"]), float(job["cpu_s"])
            continue
        if status_fd in events or pid_fd in events or parent_fd in events:
            break
        if pid_fd < 0 and (
            os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            or os.getppid() != parent_pid
        ):
            break
    with suppress(ProcessLookupError):
        os.kill(pid, SIGKILL)
    _, state, usage = os.wait4(pid, 0)
    seconds = time.monotonic() - start
    cpu_s = usage.ru_utime + usage.ru_stime - cpu_start
    code = os.waitstatus_to_exitcode(state)
    if not running:
        os.write(status_fd, b"\n")
    report = f"{outcome} {code} {seconds:.6f} {max(0.0, cpu_s):.6f}\n"
    os.write(status_fd, report.encode())


def _report_measures(told: bytes, status_fd: int) -> tuple[float, float]:
    """Passes on the child's last words before the program; returns its clock and CPU time at that moment."""
    clock, cpu, measures = (told.decode() + "  ").split(" ", 2)
    os.write(status_fd, measures.strip().encode() + b"\n")
    return float(clock or time.monotonic()), float(cpu or 0.0)


def _confined(job: Job, libc: ctypes.CDLL, measures: list[str], ready_w: int) -> NoReturn:
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    _limit(resource.RLIMIT_AS, _address_space_bytes() + int(job["memory_bytes"]) + STARTUP_BYTES)
    _limit(resource.RLIMIT_CPU, STARTUP_CPU_S + int(job["cpu_s"]) + 1)
    if job["mode"] == "run":
        os.close(0)
    program = _prepare(job)
    measures = [*measures, *_shut_doors(libc)]
    _limit(resource.RLIMIT_AS, _address_space_bytes(_STATM.pop()) + int(job["memory_bytes"]))
    if _install_filter(libc, job["filter"], ready_w, measures):
        measures.append("seccomp")
    os.close(ready_w)
    if not set(job["required"]) <= set(measures):
        os._exit(EXIT_UNAVAILABLE)
    program()
    os._exit(0)


def _prepare(job: Job) -> Callable[[], None]:
    """All that needs files: modules, codecs, the streams. Returns what is to be run behind closed doors."""
    sys.path[:] = [entry for entry in sys.path if entry]
    packages: dict[str, str] = job["packages"]
    if packages:
        sys.meta_path.append(MemoryImporter(packages))
        for name in IMPORTED_LATE.split():
            __import__(name)
    words = set(_words(job["code"]))
    wanted = set(job["modules"]) if job["screen"] else words & sys.stdlib_module_names
    for name in (*sorted(wanted & words), *job["preload"]):
        with suppress(ImportError):
            __import__(name)
    if words & {"datetime", "time"}:
        __import__("_strptime")
    if "collections" in sys.modules:
        __import__("heapq")  # Counter.most_common
    for codec in ("ascii", "latin-1", "utf-16", "utf-32"):
        "".encode(codec)
    if "random" in sys.modules:
        sys.modules["random"].seed(0)
    _STATM.append(os.open("/proc/self/statm", os.O_RDONLY))
    sys.stdout = _text_stream(1)
    sys.stderr = _text_stream(2)
    if job["mode"] == "serve":
        sys.stdin = io.TextIOWrapper(io.FileIO(0, "r", closefd=False), encoding="utf-8")
        return lambda: _serve(job["code"])
    sys.stdin = io.StringIO(job["stdin"])
    return lambda: run(job["code"], allowed=set(job["modules"]) if job["screen"] else None)


_STATM: list[int] = []  # /proc/self/statm, opened while files can be


def _words(code: str) -> list[str]:
    return "".join(c if c.isalnum() or c == "_" else " " for c in code).split()


def _text_stream(fd: int) -> io.TextIOWrapper:
    raw = io.BufferedWriter(io.FileIO(fd, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding="utf-8", errors="backslashreplace", line_buffering=True)


def _limit(kind: int, value: int) -> None:
    hard = resource.getrlimit(kind)[1]
    if hard != resource.RLIM_INFINITY:
        value = min(value, hard)
    resource.setrlimit(kind, (value, value))


def _address_space_bytes(fd: int | None = None) -> int:
    """Mapped now, in bytes; closes fd."""
    if fd is None:
        fd = os.open("/proc/self/statm", os.O_RDONLY)
    pages = int(os.pread(fd, 100, 0).split()[0])
    os.close(fd)
    return pages * resource.getpagesize()


def _shut_doors(libc: ctypes.CDLL) -> list[str]:
    """Gives up files and rights; returns the measures that took effect."""
    done = []
    with suppress(OSError):
        os.chroot(".")
        os.chdir("/")
        done.append("root")
    for kind in ("FSIZE", "CORE", "NPROC", "MEMLOCK", "MSGQUEUE"):
        _limit(getattr(resource, f"RLIMIT_{kind}"), 0)
    _limit(resource.RLIMIT_NOFILE, 16)
    if os.geteuid() == 0:
        with suppress(OSError):
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    if libc.capset(header, (ctypes.c_uint32 * 6)()) == 0 and 0 not in os.getresuid():
        done.append("uid")
    # Again after the change of user, which clears it. If the supervisor has died already, the report to it fails.
    libc.prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    if libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0:
        done.append("no_new_privs")
    os.environ.clear()
    return done


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _install_filter(
    libc: ctypes.CDLL, code: bytes | None, ready_w: int, measures: list[str]
) -> bool:
    """The report must be written first: behind the filter nothing but the two output pipes can be."""
    clocks = f"{time.monotonic():.6f} {time.process_time():.6f}"
    if code is not None:
        os.write(ready_w, " ".join([clocks, *measures, "seccomp"]).encode())
        program = _FilterProgram(len(code) // 8, code)
        if libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0) == 0:
            return True
        os.write(ready_w, b" not:seccomp")
        return False
    os.write(ready_w, " ".join([clocks, *measures]).encode())
    return False


class MemoryImporter:
    """Imports packages from bytes read beforehand: large ones import parts of themselves when files are gone."""

    def __init__(self, packages: dict[str, str]):
        # name: (code or source, is it code, is it a package, path)
        self.modules: dict[str, tuple[bytes, bool, bool, str]] = {}
        for name, folder in packages.items():
            self._read(name, folder)

    def _read(self, package: str, folder: str) -> None:
        for entry in os.scandir(folder):
            if entry.is_dir() and os.path.exists(os.path.join(entry.path, "__init__.py")):
                if entry.name not in ("tests", "benchmarks"):
                    self._read(f"{package}.{entry.name}", entry.path)
            elif entry.name.endswith(".py"):
                is_package = entry.name == "__init__.py"
                name = package if is_package else f"{package}.{entry.name[:-3]}"
                data = _cached_code(entry.path, int(entry.stat().st_mtime))
                is_code = data is not None
                if data is None:
                    with open(entry.path, "rb") as file:
                        data = file.read()
                self.modules[name] = (data, is_code, is_package, entry.path)

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name not in self.modules:
            return None
        _, _, is_package, file = self.modules[name]
        from importlib.machinery import ModuleSpec

        return ModuleSpec(name, self, origin=file, is_package=is_package)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        data, is_code, _, file = self.modules[module.__name__]
        exec(marshal.loads(data) if is_code else compile(data, file, "exec"), module.__dict__)


def _cached_code(path: str, mtime: int) -> bytes | None:
    """The marshalled code of an up-to-date .pyc file beside `path`."""
    from importlib.util import MAGIC_NUMBER, cache_from_source

    with suppress(OSError), open(cache_from_source(path), "rb") as file:
        data = file.read()
        stamp = mtime.to_bytes(4, "little")
        if data[:4] == MAGIC_NUMBER and data[4:8] == bytes(4) and data[8:12] == stamp:
            return data[16:]
    return None


def _serve(code: str) -> None:
    """Runs our own worker: trusted text, reading requests from stdin."""
    exec(compile(code, "<worker>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
