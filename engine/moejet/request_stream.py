"""One request to an `AsyncLLM`, as the task that reads it sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor

from moejet.engine_thread import EngineThread
from moejet.request import RequestOutput, SamplingParams, StreamDelta
from moejet.ticket import Ticket


class RequestStream(AsyncIterator[StreamDelta]):
    """One request: an asynchronous iterator over what each step adds to it.

    It is sent to the engine by `start`, or else by the first read. What is not read in time is merged, so a slow reader
    loses nothing and costs no memory. Cancelling a read, `aclose`, or letting go of the stream ends the request
    within one step. Read it from one task at a time; the event loop may be another one than that of other streams.
    """

    def __init__(
        self,
        thread: EngineThread,
        workers: Executor,
        prepare: Callable[[], tuple[str | None, list[int]]],
        params: SamplingParams | None,
        *,
        request_id: str | None,
        priority: int,
        owner: object,
        num_top: int = 0,
    ):
        """Made by AsyncLLM.generate and chat, and by score without params.

        workers: run prepare(), which returns the prompt's text, if it has one, and its tokens · owner: ends the engine
        when nobody refers to it any more
        """
        self._owner = owner
        self._thread = thread
        self._workers = workers
        self._prepare = prepare
        self._params = params
        self._wanted_id = request_id
        self._priority = priority
        self._num_top = num_top
        self._ticket: Ticket | None = None
        self._is_closed = False

    @property
    def request_id(self) -> str | None:
        """None before the request is started, unless the caller has chosen one."""
        return self._wanted_id if self._ticket is None else self._ticket.request_id

    @property
    def num_prompt_tokens(self) -> int:
        """0 before the request is started."""
        return 0 if self._ticket is None else len(self._ticket.token_ids)

    async def start(self) -> RequestStream:
        """Queues the request, so that a server knows before its response begins whether it was accepted.

        Raises ValueError for a wrong prompt, QueueFullError, EngineClosedError or EngineDeadError. Starting twice
        does nothing.
        """
        self._thread.check_process()
        if self._is_closed:
            raise ValueError("this stream is closed: make a new request")
        if self._ticket is not None:
            return self
        ticket = self._ticket = self._thread.reserve(self._wanted_id, self._priority)
        try:
            loop = asyncio.get_running_loop()
            prompt, token_ids = await loop.run_in_executor(self._workers, self._checked)
            self._thread.enqueue(ticket, prompt, token_ids, self._params, self._num_top)
        except BaseException:
            self._ticket, self._is_closed = None, True
            self._thread.cancel(ticket)
            raise
        return self

    async def get(self, timeout_s: float | None = None) -> StreamDelta | None:
        """The next delta, None after the last.

        Raises TimeoutError if there is none in time, and the request goes on; what a policy of the request raised; and
        EngineStepError, EngineDeadError or EngineClosedError where the engine could not finish it.
        """
        if self._ticket is None or self._is_closed:
            await self.start()
        assert self._ticket is not None
        self._thread.check_process()
        try:
            delta = await self._ticket.mailbox.get(timeout_s)
        except asyncio.CancelledError:
            self.close()
            raise
        if delta is not None and delta.error is not None:
            raise delta.error
        return delta

    async def result(self) -> RequestOutput:
        """Reads on to the end and returns the whole; finish_reason is "abort" if somebody ended it."""
        async for delta in self:
            if delta.output is not None:
                return delta.output
        raise ValueError("this stream has been read to its end already")

    async def __anext__(self) -> StreamDelta:
        if self._is_closed:
            raise StopAsyncIteration
        delta = await self.get()
        if delta is None:
            raise StopAsyncIteration
        return delta

    def close(self) -> None:
        """Ends the request if it still runs, and the iteration."""
        self._is_closed = True
        if self._ticket is not None and not self._ticket.ended.done():
            self._thread.abort(self._ticket)

    async def aclose(self) -> None:
        """The same, by the name that contextlib.aclosing expects."""
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_ticket", None) is not None:
            self.close()

    def _checked(self) -> tuple[str | None, list[int]]:
        prompt, token_ids = self._prepare()
        if self._params is None:
            self._thread.engine.rules.check_scoring(token_ids)
        else:
            self._thread.engine.rules.check_prompt(token_ids, self._params)
        return prompt, token_ids
