"""What happens to the server of a long run: kills, signals, restarts, and `moejet cache` beside it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import time
from collections import Counter

from serving.clients import ask, exchange
from serving.ledger import Ledger
from serving.process import ENGINE, ServerProcess

PRUNES = (("list",), ("verify",), ("prune", "--keep", "0.002"), ("prune", "--all"))
_COMES_BACK_S = 60.0


class Faults:
    """exit_codes: of the server, each time that it was stopped · recovery_s: from a kill to the next answer"""

    def __init__(
        self,
        server: ServerProcess,
        ledger: Ledger,
        stopping: asyncio.Event,
        environment: dict[str, str],
        rng: random.Random,
    ):
        self.server = server
        self.ledger = ledger
        self.stopping = stopping
        self.environment = environment
        self.rng = rng
        self.events: Counter[str] = Counter()
        self.recovery_s: list[float] = []
        self.exit_codes: list[int] = []

    async def storm(self, seconds: float, *, is_restarted: bool) -> None:
        """Kills at random times for so long, and between them signals that have to change nothing."""
        begin_s = time.perf_counter()
        deeds = [self._kill] * max(1, round(seconds / 20)) + [self._usr1]
        if seconds > 30:
            deeds += [self._terminate, self._pause]
        self.rng.shuffle(deeds)
        if is_restarted:
            deeds.append(self._restart)
        for deed in deeds:
            left_s = begin_s + seconds - time.perf_counter()
            wait_s = min(left_s, 2 * seconds / (len(deeds) + 1) * self.rng.random())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), max(0.0, wait_s))
                return
            await deed()

    async def kill_evenly(self, times: int, seconds: float) -> None:
        """So many kills, at equal distances."""
        begin_s = time.perf_counter()
        for number in range(times):
            due_s = begin_s + seconds * (number + 1) / (times + 1)
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            await self._kill(is_signalled=False)

    async def _kill(self, *, is_signalled: bool = True) -> None:
        pid = self.server.engine_pid
        if pid is None:
            return
        self.events["kills"] += 1
        begin_s = time.perf_counter()
        with self.ledger.outage("kill"):
            os.kill(pid, signal.SIGKILL)
            if is_signalled and self.rng.random() < 0.5:  # it is started at once as it is
                os.kill(self.server.pid, signal.SIGUSR1)
            if is_signalled and self.rng.random() < 0.2:  # and once more while it loads
                await asyncio.sleep(2 * self.rng.random())
                if (loading := self.server.engine_pid) not in (pid, None):
                    self.events["kills while loading"] += 1
                    os.kill(loading, signal.SIGKILL)
                    pid = loading
            await self._until_answered(pid)
        self.recovery_s.append(time.perf_counter() - begin_s)

    async def _terminate(self) -> None:
        """What a terminal or a service manager sends to all processes: the server ends its engine itself."""
        if (pid := self.server.engine_pid) is not None:
            self.events["SIGTERM"] += 1
            os.kill(pid, signal.SIGTERM)

    async def _usr1(self) -> None:
        """Which is for a server that has given up."""
        self.events["SIGUSR1"] += 1
        os.kill(self.server.pid, signal.SIGUSR1)

    async def _pause(self) -> None:
        """A machine that stands still, as far as the engine notices."""
        if (pid := self.server.engine_pid) is not None:
            self.events["pauses"] += 1
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(1 + self.rng.random())
            os.kill(pid, signal.SIGCONT)

    async def _restart(self) -> None:
        """What runs is finished, what comes meanwhile is refused."""
        self.events["restarts"] += 1
        with self.ledger.outage("restart"):
            self.exit_codes.append(await asyncio.to_thread(self.server.stop))
            await asyncio.to_thread(self.server.start)

    async def _until_answered(self, dead: int) -> None:
        """Until another engine has answered."""
        until_s = time.perf_counter() + _COMES_BACK_S
        body = {"prompt": "Start", "max_tokens": 1}
        while time.perf_counter() < until_s:
            await asyncio.sleep(0.05)
            is_new = self.server.engine_pid not in (dead, None)
            if not is_new or (await ask(self.server.port, "/ready"))[0] != 200:
                continue
            ticket = self.ledger.begin("probe", "completions", 64, 1)
            answer = await exchange(self.server.port, "completions", body)
            if self.ledger.settle(ticket, answer) == "complete":
                return
        self.ledger.violate("the engine did not come back", f"in {_COMES_BACK_S:.0f} s")

    async def prune(self, pause_s: float) -> None:
        """`moejet cache` on the files that the server uses, until it is cancelled."""
        rng = random.Random(self.rng.randrange(2**32))
        while True:
            await asyncio.sleep(pause_s * (0.5 + rng.random()))
            action = rng.choice(PRUNES)
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "moejet", "cache", *action),
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                env={**os.environ, "PYTHONPATH": str(ENGINE), **self.environment},
            )
            try:
                _, errors = await process.communicate()
            except asyncio.CancelledError:
                process.kill()
                await process.wait()
                raise
            name = f"cache {action[0]}"
            self.events[name] += 1
            if process.returncode:
                self.ledger.violate(name, f"exit code {process.returncode}: {errors[-300:]!r}")
