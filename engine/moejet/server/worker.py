"""The engine's own process: `python -P -m moejet.server.worker SOCKET PARENT`, started by `moejet.server.supervisor`.

SOCKET is an inherited file descriptor, PARENT the id of the process that holds its other end; when that ends, so does
this one. The first frame says what to load; see `moejet.server.frames`.
"""

from __future__ import annotations

import asyncio
import ctypes
import faulthandler
import gc
import logging
import math
import os
import resource
import select
import signal
import socket
import sys
import threading
from collections.abc import Coroutine
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

from moejet.environment import env_log_level
from moejet.expected_errors import describe_error
from moejet.server import frames
from moejet.server.backend import LocalBackend, Stream
from moejet.server.frames import Channel
from moejet.server.strategies import Outcome, SolveJob, StrategyRun

if TYPE_CHECKING:
    from moejet.async_llm import AsyncLLM

logger = logging.getLogger(__name__)

_STATUS_S = 0.25
_LOAD_FRAME_S = 60.0
_FLUSH_S = 5.0
_PR_SET_PDEATHSIG = 1


class _Reader:
    """A stream that is being sent: how many deltas may go ahead of its reader."""

    def __init__(self, request_id: str):
        self.request_id = request_id
        self.has_tokens = False
        self.task: asyncio.Task[None] | None = None
        self._credit = frames.WINDOW
        self._has_credit = asyncio.Event()
        self._has_credit.set()

    def add(self, count: int) -> None:
        self._credit += count
        self._has_credit.set()

    async def take(self) -> None:
        await self._has_credit.wait()
        self._credit -= 1
        if self._credit <= 0:
            self._has_credit.clear()


class Worker:
    """Serves one connection with one engine."""

    def __init__(self) -> None:
        self._channel: Channel[frames.ToWorker] | None = None
        self._load: asyncio.Future[frames.Load] = asyncio.get_running_loop().create_future()
        self._stop: asyncio.Future[frames.Stop] = asyncio.get_running_loop().create_future()
        self._backend: LocalBackend | None = None
        self._readers: dict[int, _Reader] = {}
        self._calls: set[asyncio.Task[None]] = set()

    async def run(self, sock: socket.socket) -> int:
        """Returns the process's exit code."""
        channel = await Channel[frames.ToWorker].open(
            sock, frames.ToWorker, self._on_frame, self._on_end
        )
        self._channel = channel
        load = await asyncio.wait_for(self._load, _LOAD_FRAME_S)
        try:
            llm = await asyncio.to_thread(self._open, load, asyncio.get_running_loop())
        except Exception as error:
            self._send(_load_failure(error))
            self._hang_up()
            return 1
        self._backend = LocalBackend(llm, name="")
        self._send(_loaded(self._backend))
        while not self._stop.done():
            self._send_status()
            if llm.health()["state"] == "dead":
                return await self._die(llm)
            await asyncio.wait((self._stop,), timeout=_STATUS_S)
        stop = self._stop.result()
        await llm.close(drain=stop.drain, timeout_s=stop.timeout_s)
        await self._finish()
        return 0

    async def _die(self, llm: AsyncLLM) -> int:
        await self._finish()
        self._send(frames.Died(str(llm.health()["error"])))
        self._hang_up()
        return 1

    def _hang_up(self) -> None:
        self._stop.cancel()  # no orders are expected any more
        assert self._channel is not None, "it was used just now"
        self._channel.close()

    async def _finish(self) -> None:
        """Lets the readers send what their streams have ended with."""
        tasks = [reader.task for reader in self._readers.values() if reader.task is not None]
        for reader in self._readers.values():
            reader.add(1 << 30)
        if tasks:
            await asyncio.wait(tasks, timeout=_FLUSH_S)

    def _open(self, load: frames.Load, loop: asyncio.AbstractEventLoop) -> AsyncLLM:
        from moejet.async_llm import AsyncLLM
        from moejet.weights.loader import on_load_progress
        from moejet.weights.progress import LoadProgress

        sent_s = -math.inf

        def report(progress: LoadProgress) -> None:
            nonlocal sent_s
            if progress.elapsed_s - sent_s < _STATUS_S:
                return
            sent_s = progress.elapsed_s
            frame = frames.Loading(progress.bytes_done, progress.bytes_total)
            loop.call_soon_threadsafe(self._send, frame)

        options: dict[str, Any] = {**load.options, **load.limits}
        with on_load_progress(report):
            llm = AsyncLLM(load.model, **options)
        # What is there for good: without it collections are short, and come soon after requests that leave garbage.
        gc.collect()
        gc.freeze()
        return llm

    def _send(self, frame: object) -> None:
        if self._channel is not None:
            self._channel.send(frame)

    def _send_status(self) -> None:
        assert self._backend is not None, "it is loaded"
        progress = {
            reader.request_id: found
            for reader in self._readers.values()
            if not reader.has_tokens
            and (found := self._backend.progress(reader.request_id)) is not None
        }
        self._send(frames.Status(self._backend.health(), self._backend.counters(), progress))

    def _on_frame(self, frame: frames.ToWorker) -> None:
        match frame:
            case frames.Load():
                if not self._load.done():
                    self._load.set_result(frame)
            case frames.Start(number, job):
                new = _Reader(job.request_id)
                self._begin(number, new, self._serve(number, frame, new))
            case frames.Solve(number, solve):
                new = _Reader(solve.request_id)
                new.has_tokens = True  # of its prompt nothing is told
                self._begin(number, new, self._solve(number, solve))
            case frames.Credit(number, count):
                if (reader := self._readers.get(number)) is not None:
                    reader.add(count)
            case frames.Close(number):
                if (reader := self._readers.get(number)) is not None and reader.task is not None:
                    reader.task.cancel()
            case frames.Stop():
                if not self._stop.done():
                    self._stop.set_result(frame)
            case _:
                task = asyncio.create_task(self._answer(frame))
                self._calls.add(task)
                task.add_done_callback(self._calls.discard)

    def _begin(self, number: int, reader: _Reader, work: Coroutine[Any, Any, None]) -> None:
        self._readers[number] = reader
        reader.task = asyncio.create_task(work)

        def done(_: object) -> None:
            del self._readers[number]
            # A cancelled task holds its frames and so the reader; the request would stay until garbage is collected.
            reader.task = None

        # Not in the task itself, which may be cancelled before it begins.
        reader.task.add_done_callback(done)

    def _on_end(self, error: Exception | None) -> None:
        """Nobody is there to work for; the engine may be in the middle of a long step."""
        if error is not None:
            logger.error("the connection to the server's process is broken: %s", error)
        if not self._stop.done():
            os._exit(0 if error is None else 3)

    async def _serve(self, number: int, start: frames.Start, reader: _Reader) -> None:
        stream: Stream | None = None
        try:
            assert self._backend is not None, "requests follow the Loaded frame"
            stream = await self._backend.start(start.job)
            self._send(frames.Accepted(number))
            while True:
                await reader.take()
                delta = await stream.get()
                if delta is None:
                    break
                reader.has_tokens = True
                if delta.output is not None:
                    output = replace(delta.output, prompt=None, prompt_token_ids=())
                    delta = replace(delta, output=output)
                self._send(frames.Delta(number, delta))
                assert self._channel is not None, "it has just been used"
                await self._channel.drained()
            self._send(frames.Ended(number))
        except Exception as error:
            self._send(frames.failure(number, error))
        finally:
            if stream is not None:
                stream.close()

    async def _solve(self, number: int, job: SolveJob) -> None:
        run: StrategyRun | None = None
        try:
            assert self._backend is not None, "requests follow the Loaded frame"
            assert self._channel is not None, "the request came by it"
            run = await self._backend.solve(job)
            self._send(frames.Accepted(number))
            while True:
                event = await run.get()
                if isinstance(event, Outcome):
                    break
                self._send(frames.Told(number, event))
                await self._channel.drained()
            self._send(frames.Solved(number, event))
            self._send(frames.Ended(number))
        except Exception as error:
            self._send(frames.failure(number, error))
        finally:
            if run is not None:
                run.close()

    async def _answer(self, call: frames.Score | frames.Abort | frames.EndThinking) -> None:
        try:
            assert self._backend is not None, "calls follow the Loaded frame"
            match call:
                case frames.Score(_, token_ids, num_top):
                    value: Any = await self._backend.score(token_ids, num_top)
                case frames.Abort(_, request_id):
                    value = await self._backend.abort(request_id)
                case frames.EndThinking(_, request_id):
                    value = await self._backend.end_thinking(request_id)
            self._send(frames.Answer(call.number, value))
        except Exception as error:
            self._send(frames.failure(call.number, error))


def _loaded(backend: LocalBackend) -> frames.Loaded:
    card = backend.card
    parts = None
    if card.tokenizer is not None:
        parts = frames.TokenizerParts(**card.tokenizer.parts())
    return frames.Loaded(
        card.max_context,
        card.vocab_size,
        card.default_sampling,
        parts,
        card.strategies,
        card.description,
    )


def _load_failure(error: Exception) -> frames.LoadFailed:
    logger.debug("loading failed", exc_info=error)
    return frames.LoadFailed(*describe_error(error))


def _end_with(parent: int) -> None:
    """Ends this process when the parent has, whatever the threads of this one are doing."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _watch(parent: int) -> None:
    """The same for a parent whose thread that made this process ends before it does, so that there is no signal."""
    poll = select.poll()
    poll.register(os.pidfd_open(parent), select.POLLIN)
    poll.poll()
    os._exit(0)


def main(arguments: list[str]) -> NoReturn:
    descriptor, parent, has_signal = (int(argument) for argument in arguments)
    # Whoever ends the server means to let it finish what runs; the server says when this process is to end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if has_signal:
        _end_with(parent)
    threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    # 1 stands for no core file, by pipe or not: writing one of all weights would delay the restart by minutes.
    resource.setrlimit(resource.RLIMIT_CORE, (1, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    faulthandler.enable()
    logging.basicConfig(
        level=env_log_level(), format="moejet engine: %(levelname)s: %(name)s: %(message)s"
    )

    async def run() -> int:
        return await Worker().run(socket.socket(fileno=descriptor))

    code = asyncio.run(run())
    logging.shutdown()
    # The engine is closed; giving back all memory piece by piece would only take time.
    os._exit(code)


if __name__ == "__main__":
    main(sys.argv[1:])
