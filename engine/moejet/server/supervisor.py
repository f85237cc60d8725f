"""The engine in a process of its own, kept alive: `RemoteBackend`.

This process holds no weights and loads neither torch nor the kernels. When the engine's process ends, by a signal or by
its own decision, the requests that ran in it fail with an error that says why, and it is started again
(`moejet.server.restarts`); until it has loaded, new requests are refused with EngineDeadError. When that has failed too
often, it waits for somebody who has removed the cause and calls `RemoteBackend.retry`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal
from weakref import WeakValueDictionary

from moejet.engine_counters import add_totals
from moejet.request import TokenLogprobs
from moejet.server import frames
from moejet.server.backend import Job, ModelCard, Stream
from moejet.server.frames import Channel
from moejet.server.remote_strategy import RemoteStrategy
from moejet.server.remote_stream import RemoteStream
from moejet.server.restarts import RestartPolicy, describe_exit, oom_kills
from moejet.server.strategies import SolveJob, StrategyRun
from moejet.ticket import EngineClosedError, EngineDeadError
from moejet.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

_EXIT_WAIT_S = 0.5  # for the exit code of a process that has hung up
_LOOK_S = 2.0
_SILENT_S = 10.0  # without a status: health says so
_HUNG_S = 120.0  # without a status: it is killed
_STEP_TIMEOUT_S = 600.0  # where the engine has its default
_STUCK_STEPS = 2.0  # times the limit of a step that hangs: it is killed
_STOP_WAIT_S = 15.0  # for threads and memory, after the last request
_SECRETS = ("MOEJET_API_KEY",)
_ADVICE = "remove the cause, then send the server SIGUSR1 or restart it"

State = Literal["loading", "running", "restarting", "dead", "closed"]


class LoadError(Exception):
    """The model could not be loaded. exit_code: what a command ends with."""

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """What is served. options: of `EngineConfig` · limits: of `AsyncLLM`."""

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)


class RemoteBackend:
    """Use it on the event loop that opened it; `health` and `counters` may be read anywhere."""

    def __init__(self, options: WorkerOptions, *, name: str, restarts: RestartPolicy | None = None):
        self.loop = asyncio.get_running_loop()
        self.card: ModelCard
        self._first: frames.Loaded  # what every later process has to load
        self._name = name
        self._options = options
        self._restarts = restarts or RestartPolicy()
        self._on_loading: Callable[[float], None] = lambda share: None
        self._channel: Channel[frames.FromWorker] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._hung_up: asyncio.Future[Exception | None] = self.loop.create_future()
        self._loaded: asyncio.Future[frames.Loaded] = self.loop.create_future()
        self._supervision: asyncio.Task[None] | None = None
        self._retry = asyncio.Event()
        self._state: State = "loading"
        self._cause: str | None = None
        self._last_words: str | None = None  # of the process that runs now
        self._num_restarts = 0
        self._num_oom_kills = 0
        # A stream that nobody holds any more is closed by its finaliser.
        self._streams: WeakValueDictionary[int, RemoteStream | RemoteStrategy] = (
            WeakValueDictionary()
        )
        self._calls: dict[int, asyncio.Future[bool | list[TokenLogprobs]]] = {}
        self._numbers = itertools.count()
        self._status: frames.Status | None = None
        self._status_s = 0.0
        self._past: dict[str, Any] = {}  # counters of processes that have ended

    @classmethod
    async def open(
        cls,
        options: WorkerOptions,
        *,
        name: str,
        restarts: RestartPolicy | None = None,
        on_loading: Callable[[float], None] | None = None,
    ) -> RemoteBackend:
        """Starts the process and returns once the model is loaded. Raises LoadError.

        on_loading: is told the share of the weights that has been read
        """
        self = cls(options, name=name, restarts=restarts)
        self._on_loading = on_loading or self._on_loading
        try:
            loaded = await self._start()
        except BaseException:
            await self._end_process()
            self._state = "closed"
            raise
        self.card = _card(loaded, name, options.model)
        self._first = loaded
        self._state = "running"
        self._supervision = asyncio.create_task(self._supervise())
        return self

    @property
    def pid(self) -> int | None:
        """Of the engine's process, None while there is none."""
        return None if self._process is None else self._process.pid

    async def start(self, job: Job) -> Stream:
        self._check_running()
        number = next(self._numbers)
        stream = RemoteStream(self, number, job)
        await self._begin(number, stream, frames.Start(number, replace(job, prompt=None)))
        return stream

    async def solve(self, job: SolveJob) -> StrategyRun:
        self._check_running()
        number = next(self._numbers)
        run = RemoteStrategy(self, number)
        await self._begin(number, run, frames.Solve(number, job))
        return run

    async def _begin(
        self, number: int, stream: RemoteStream | RemoteStrategy, frame: frames.Start | frames.Solve
    ) -> None:
        assert self._channel is not None, "it is running"
        self._channel.send(frame)
        self._streams[number] = stream
        try:
            await stream.accepted
        except BaseException:
            stream.close()
            raise

    async def score(self, token_ids: list[int], num_top: int = 0) -> list[TokenLogprobs]:
        scores = await self._call(lambda number: frames.Score(number, token_ids, num_top))
        assert isinstance(scores, list), f"{scores=}"
        return scores

    async def abort(self, request_id: str) -> bool:
        return await self._call(lambda number: frames.Abort(number, request_id)) is True

    async def end_thinking(self, request_id: str) -> bool:
        return await self._call(lambda number: frames.EndThinking(number, request_id)) is True

    def progress(self, request_id: str) -> tuple[int, int, int] | None:
        return None if self._status is None else self._status.progress.get(request_id)

    def health(self) -> dict[str, Any]:
        """As `AsyncLLM.health`, and of the process: its pid, restarts and the age of these numbers."""
        age_s = time.monotonic() - self._status_s if self._status is not None else 0.0
        health: dict[str, Any] = dict(self._status.health) if self._status is not None else {}
        if self._state != "running":
            health |= {"alive": False, "state": self._state}
            health |= dict.fromkeys(("running", "waiting", "requests", "queued_requests"), 0)
        elif age_s > _SILENT_S:
            health |= {"alive": False, "state": "unresponsive"}
        elif not health:
            health |= {"alive": True, "state": "running"}
        health["error"] = self._trouble() if self._state != "running" else health.get("error")
        return {
            **health,
            "restarts": self._num_restarts,
            "last_failure": self._cause,
            "worker_pid": self.pid,
            "status_age_s": age_s,
        }

    def counters(self) -> dict[str, Any]:
        """As `AsyncLLM.counters`, those of processes that have ended included."""
        now = self._status.counters if self._status is not None else {}
        return {**add_totals(self._past, now), "worker_restarts": self._num_restarts}

    async def close(self, drain: bool = False, timeout_s: float | None = None) -> None:
        """Refuses new requests, finishes what runs (drain) for at most timeout_s, and ends the process."""
        if self._state == "closed":
            return
        was_running, self._state = self._state == "running", "closed"
        if not drain:  # they need not wait for a step to end
            self._fail_all(
                lambda: EngineClosedError("the server is being shut down: this answer ends here")
            )
        if self._supervision is not None:
            self._supervision.cancel()
            await asyncio.wait((self._supervision,))
        if was_running and not self._hung_up.done():
            self.send(frames.Stop(drain, timeout_s))
            # Draining without a limit takes as long as it takes; a process that dies hangs up as well.
            is_endless = drain and timeout_s is None
            wait_s = None if is_endless else _STOP_WAIT_S + (timeout_s or 0.0)
            await asyncio.wait((self._hung_up,), timeout=wait_s)
            if self._process is not None and self._hung_up.done():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._process.wait(), _EXIT_WAIT_S)
        await self._end_process()
        self._fail_all(lambda: EngineClosedError("the server was closed"))

    def retry(self) -> bool:
        """Starts the process now if it has ended, whether that was given up or is due later; False if it runs."""
        if self._state not in ("dead", "restarting"):
            return False
        self._retry.set()
        return True

    def send(self, frame: object) -> None:
        """To the process, if there is one."""
        if self._channel is not None:
            self._channel.send(frame)

    def drop(self, number: int) -> None:
        """Of a stream that nobody reads any more."""
        self._streams.pop(number, None)
        self.send(frames.Close(number))

    def _check_running(self) -> None:
        if self._state == "closed":
            raise EngineClosedError("the server is being closed and takes no new requests")
        if self._state != "running":
            raise self._dead_error()

    def _dead_error(self) -> EngineDeadError:
        later = "" if self._state == "dead" else "; it is being started again: try later"
        return EngineDeadError(f"{self._trouble()}{later}")

    def _trouble(self) -> str | None:
        """Why there is no engine, and what it takes if it does not come back by itself."""
        if self._state != "dead":
            return self._cause
        return f"{self._cause}; it was tried often enough: {_ADVICE}"

    async def _call(self, make: Callable[[int], object]) -> bool | list[TokenLogprobs]:
        self._check_running()
        number = next(self._numbers)
        future: asyncio.Future[bool | list[TokenLogprobs]] = self.loop.create_future()
        assert self._channel is not None, "it is running"
        self._channel.send(make(number))
        self._calls[number] = future
        try:
            return await future
        finally:
            del self._calls[number]

    # The process.

    async def _start(self) -> frames.Loaded:
        """A new process with a loaded model. Raises LoadError."""
        self._status, self._last_words = None, None
        self._num_oom_kills = oom_kills()
        self._hung_up, self._loaded = self.loop.create_future(), self.loop.create_future()
        mine, its = socket.socketpair()
        with its:
            try:
                self._process = await asyncio.create_subprocess_exec(
                    *_command(its.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=2,
                    env=_environment(),
                    pass_fds=(its.fileno(),),
                    start_new_session=True,  # Ctrl-C is for the server
                )
            except BaseException:
                mine.close()
                raise
        self._channel = await Channel[frames.FromWorker].open(
            mine, frames.FromWorker, self._on_frame, partial(_hang_up, self._hung_up)
        )
        load = frames.Load(self._options.model, self._options.options, self._options.limits)
        self._channel.send(load)
        await asyncio.wait((self._loaded, self._hung_up), return_when=asyncio.FIRST_COMPLETED)
        if not self._loaded.done():
            raise LoadError(f"loading failed: {await self._describe_end()}", 1)
        return self._loaded.result()

    async def _supervise(self) -> None:
        while True:
            await self._until_ended()
            self._cause = await self._describe_end()
            logger.error("%s", self._cause)
            while not await self._restart(await self._lose()):
                logger.error("%s", self._cause)
            self._state = "running"
            self._retry.clear()
            self._num_restarts += 1
            logger.warning("the engine runs again")

    async def _restart(self, delay_s: float | None) -> bool:
        """Starts a new process after that time, None: when somebody asks for it. False if it does not load."""
        if delay_s is None:
            self._state = "dead"
            logger.critical("%s; giving up: %s", self._cause, _ADVICE)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._retry.wait(), delay_s)
        if self._retry.is_set():
            self._retry.clear()
            self._restarts.succeeded()  # all of them are to be had again
        self._state = "restarting"
        try:
            if await self._start() != self._first:
                raise LoadError("the files of the model have changed: restart the server", 1)
        except (LoadError, OSError) as error:
            self._cause = f"the engine could not be started again: {error}"
            return False
        return True

    async def _until_ended(self) -> None:
        """Returns when the process has hung up, or is to be killed because it does not get on."""
        timeout_s = self._options.limits.get("step_timeout_s", _STEP_TIMEOUT_S)
        while not self._hung_up.done():
            await asyncio.wait((self._hung_up,), timeout=_LOOK_S)
            if self._status is None:
                continue
            if time.monotonic() - self._status_s > _HUNG_S:
                self._last_words = f"the engine's process was silent for {_HUNG_S:.0f} s"
                return
            step_s = self._status.health.get("step_running_s", 0.0)
            # By then the requests have failed; nothing that is worth waiting for can come.
            if self._status.health["state"] == "stuck" and step_s > _STUCK_STEPS * timeout_s:
                self._last_words = f"a step of the engine had been running for {step_s:.0f} s"
                return

    async def _lose(self) -> float | None:
        """Ends what is left of the process and what it was asked for; when the next one is due."""
        self._state = "restarting"
        self._fail_all(self._dead_error)
        await self._end_process()
        if self._status is not None:
            self._past = add_totals(self._past, self._status.counters)
            self._status = None
        return self._restarts.failed()

    async def _describe_end(self) -> str:
        if self._last_words is not None:
            return self._last_words
        assert self._process is not None, "something has ended"
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _EXIT_WAIT_S)
        error = self._hung_up.result()
        if self._process.returncode is None and error is not None:
            return f"the engine's process sent what cannot be read ({error})"
        num_oom_kills = oom_kills() - self._num_oom_kills
        return f"the engine's process {describe_exit(self._process.returncode, num_oom_kills)}"

    async def _end_process(self) -> None:
        process, channel = self._process, self._channel
        self._process = self._channel = None
        if channel is not None:
            channel.close()
        if process is not None:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            await process.wait()

    def _fail_all(self, make_error: Callable[[], Exception]) -> None:
        streams = list(self._streams.values())
        self._streams.clear()
        for stream in streams:
            stream.end(make_error())
        for call in self._calls.values():
            if not call.done():
                call.set_exception(make_error())

    def _on_frame(self, frame: frames.FromWorker) -> None:
        match frame:
            case frames.Delta(number, delta):
                if isinstance(stream := self._streams.get(number), RemoteStream):
                    stream.put(delta)
            case frames.Told(number, event) | frames.Solved(number, event):
                if isinstance(stream := self._streams.get(number), RemoteStrategy):
                    stream.put(event)
            case frames.Accepted(number):
                if (stream := self._streams.get(number)) is not None and not stream.accepted.done():
                    stream.accepted.set_result(None)
            case frames.Ended(number):
                self._restarts.succeeded()
                if (stream := self._streams.pop(number, None)) is not None:
                    stream.end()
            case frames.Failed(number):
                if (stream := self._streams.pop(number, None)) is not None:
                    stream.end(frames.error_of(frame))
                elif (call := self._calls.get(number)) is not None and not call.done():
                    call.set_exception(frames.error_of(frame))
            case frames.Answer(number, value):
                if (call := self._calls.get(number)) is not None and not call.done():
                    call.set_result(value)
            case frames.Status():
                self._status, self._status_s = frame, time.monotonic()
            case frames.Died(cause):
                self._last_words = f"the engine is dead: {cause}"
            case frames.Loading(bytes_done, bytes_total):
                self._on_loading(bytes_done / max(1, bytes_total))
            case frames.Loaded():
                if not self._loaded.done():
                    self._loaded.set_result(frame)
            case frames.LoadFailed(message, exit_code):
                if not self._loaded.done():
                    self._loaded.set_exception(LoadError(message, exit_code))


def _hang_up(hung_up: asyncio.Future[Exception | None], error: Exception | None) -> None:
    if not hung_up.done():
        hung_up.set_result(error)


def _command(descriptor: int) -> list[str]:
    # The signal of a parent's death comes from the thread that made the process, which has to live as long as that.
    has_signal = int(threading.current_thread() is threading.main_thread())
    module = ("-P", "-m", "moejet.server.worker")
    return [sys.executable, *module, str(descriptor), str(os.getpid()), str(has_signal)]


def _environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name not in _SECRETS}
    # See moejet.cli.options.quiet_openmp; torch is imported there, not here.
    kept.setdefault("OMP_WAIT_POLICY", "passive")
    return {**kept, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def _card(loaded: frames.Loaded, name: str, model: str) -> ModelCard:
    parts = loaded.tokenizer
    return ModelCard(
        name=name,
        max_context=loaded.max_context,
        vocab_size=loaded.vocab_size,
        default_sampling=loaded.default_sampling,
        tokenizer=None
        if parts is None
        else Tokenizer.from_parts(
            raw=parts.raw,
            special_tokens=parts.special_tokens,
            chat_templates=parts.chat_templates,
            add_bos_token=parts.add_bos_token,
            add_eos_token=parts.add_eos_token,
            eos_token_ids=parts.eos_token_ids,
        ),
        strategies=loaded.strategies,
        loaded_as=model,
        description=loaded.description,
    )
