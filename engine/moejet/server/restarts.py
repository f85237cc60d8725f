"""Why an engine's process ended, and when the next one is started."""

from __future__ import annotations

import signal
import time
from collections import deque
from pathlib import Path

_DELAYS_S = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
_CAUSES = {
    signal.SIGBUS: "a weight file that it had mapped was cut short, replaced, or is out of reach",
    signal.SIGSEGV: "a fault in native code; the log shows where",
    signal.SIGILL: "an instruction that this CPU lacks: try a lower --isa",
    signal.SIGABRT: "native code gave up; the log says why",
    signal.SIGFPE: "a division by zero in native code; the log shows where",
    signal.SIGKILL: "somebody killed it, or the system did because memory ran out",
}


def oom_kills() -> int:
    """Processes that the kernel has killed for lack of memory, on this machine; 0 where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def describe_exit(code: int | None, oom_kills: int = 0) -> str:
    """code: as of subprocess, None if it has not ended · oom_kills: how many there were while it ran."""
    if code is None:
        return "broke off the connection"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        number = signal.Signals(-code)
    except ValueError:
        return f"ended with signal {-code}"
    cause = _CAUSES.get(number)
    if number is signal.SIGKILL and oom_kills > 0:
        cause = "memory ran out: use a smaller --expert-format, --max-context or --cache-tokens"
    return f"ended with {number.name}" + (f" ({cause})" if cause else "")


class RestartPolicy:
    """At once, then after 1, 2, 4 .. 30 s; not any more after max_failures within window_s.

    What counts are failures in a row: an engine that has finished a request has proved itself.
    """

    def __init__(self, max_failures: int = 8, window_s: float = 600.0):
        self.max_failures = max_failures
        self.window_s = window_s
        self._failures: deque[float] = deque()

    def succeeded(self) -> None:
        self._failures.clear()

    def failed(self, now: float | None = None) -> float | None:
        """Seconds to wait before the next start; None to give up."""
        now = time.monotonic() if now is None else now
        while self._failures and now - self._failures[0] > self.window_s:
            self._failures.popleft()
        self._failures.append(now)
        if len(self._failures) >= self.max_failures:
            return None
        return _DELAYS_S[min(len(self._failures), len(_DELAYS_S)) - 1]
