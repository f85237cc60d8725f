"""What the server's process and the engine's say to each other, over one socket pair.

A frame is its length (4 bytes, little-endian) and one msgpack value, which decodes into exactly one of the types below;
anything else ends the connection. Requests, parameters and outputs travel as the dataclasses that they are. `number`
names a stream or a call, and is the server's choice.

A stream gets `WINDOW` deltas ahead of its reader. Beyond that the engine's side stops reading it, and there unread
deltas are merged (`moejet.mailbox`): a slow reader costs neither process more than its answer.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import msgspec

from moejet.reasoning.result import Progress
from moejet.request import SamplingParams, StreamDelta, TokenLogprobs
from moejet.server.backend import Job
from moejet.server.strategies import Outcome, SolveJob
from moejet.ticket import EngineClosedError, EngineDeadError, EngineStepError, QueueFullError

WINDOW = 16
MAX_BYTES = 1 << 28  # of a frame; tokenizers have some 10 MB
_LENGTH_BYTES = 4


class FrameError(Exception):
    """The other side sent what is no frame."""


class _Frame(msgspec.Struct, array_like=True, tag=True, forbid_unknown_fields=True):
    pass


# To the engine's process.


class Load(_Frame):
    """The first frame. limits: of `moejet.AsyncLLM`; options: of `moejet.EngineConfig`."""

    model: str
    options: dict[str, bool | int | float | str | None]
    limits: dict[str, int | float | None]


class Start(_Frame):
    number: int
    job: Job


class Solve(_Frame):
    number: int
    job: SolveJob


class Credit(_Frame):
    """The reader has taken so many deltas."""

    number: int
    count: int


class Close(_Frame):
    """Nobody reads the stream any more."""

    number: int


class Score(_Frame):
    number: int
    token_ids: list[int]
    num_top: int


class Abort(_Frame):
    number: int
    request_id: str


class EndThinking(_Frame):
    number: int
    request_id: str


class Stop(_Frame):
    """Finish what runs (drain), for at most timeout_s, and end."""

    drain: bool
    timeout_s: float | None


ToWorker = Load | Start | Solve | Credit | Close | Score | Abort | EndThinking | Stop

# From the engine's process.


class Loading(_Frame):
    bytes_done: int
    bytes_total: int


class LoadFailed(_Frame):
    message: str
    exit_code: int


class TokenizerParts(msgspec.Struct, frozen=True):
    """See `Tokenizer.parts`."""

    raw: str
    special_tokens: dict[str, str]
    chat_templates: dict[str, str]
    add_bos_token: bool
    add_eos_token: bool
    eos_token_ids: list[int]


class Loaded(_Frame):
    max_context: int
    vocab_size: int
    default_sampling: SamplingParams
    tokenizer: TokenizerParts | None
    strategies: tuple[str, ...] = ()
    description: str = ""


class Accepted(_Frame):
    number: int


class Delta(_Frame):
    """delta.output comes without the prompt, which the server has."""

    number: int
    delta: StreamDelta


class Told(_Frame):
    """Progress of a strategy."""

    number: int
    progress: Progress


class Solved(_Frame):
    number: int
    outcome: Outcome


class Ended(_Frame):
    number: int


class Answer(_Frame):
    """To a call: whether there was something to do, or the scores."""

    number: int
    value: bool | list[TokenLogprobs]


class Failed(_Frame):
    """Of a stream or a call. kind: the exception's class, see `failure` and `error_of`."""

    number: int
    kind: str
    message: str
    retry_after_s: float = 0.0


class Status(_Frame):
    """Sent several times a second. progress: of requests without a token so far."""

    health: dict[str, Any]
    counters: dict[str, Any]
    progress: dict[str, tuple[int, int, int]]


class Died(_Frame):
    """The engine is dead, and the process ends."""

    cause: str


FromWorker = (
    Loading
    | LoadFailed
    | Loaded
    | Accepted
    | Delta
    | Told
    | Solved
    | Ended
    | Answer
    | Failed
    | Status
    | Died
)

_KINDS: dict[str, type[Exception]] = {
    kind.__name__: kind
    for kind in (ValueError, EngineStepError, EngineDeadError, EngineClosedError, RuntimeError)
}


def failure(number: int, error: Exception) -> Failed:
    message = str(error)
    if isinstance(error, QueueFullError):
        return Failed(number, "QueueFullError", message, error.retry_after_s)
    for kind in type(error).__mro__:
        if kind.__name__ in _KINDS:
            return Failed(number, kind.__name__, message)
    return Failed(number, "RuntimeError", f"{type(error).__name__}: {message}")


def error_of(frame: Failed) -> Exception:
    if frame.kind == "QueueFullError":
        # Its constructor would say again when to try again.
        error = QueueFullError.__new__(QueueFullError, frame.message)
        error.retry_after_s = frame.retry_after_s
        return error
    return _KINDS.get(frame.kind, RuntimeError)(frame.message)


Incoming = TypeVar("Incoming")


class Channel(asyncio.Protocol, Generic[Incoming]):
    """One end of the connection, on one event loop. What is sent in one turn of the loop is written at once."""

    def __init__(
        self,
        decoder: msgspec.msgpack.Decoder[Incoming],
        on_frame: Callable[[Incoming], None],
        on_end: Callable[[Exception | None], None],
    ):
        self._decoder = decoder
        self._on_frame = on_frame
        self._on_end = on_end
        self._encoder = msgspec.msgpack.Encoder()
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._received = bytearray()
        self._unsent: list[bytes] = []
        self._can_write = asyncio.Event()
        self._can_write.set()
        self._error: Exception | None = None

    @classmethod
    async def open(
        cls,
        sock: socket.socket,
        kind: Any,
        on_frame: Callable[[Incoming], None],
        on_end: Callable[[Exception | None], None],
    ) -> Channel[Incoming]:
        """on_end is called once, with what was wrong or None at the orderly end."""
        decoder = msgspec.msgpack.Decoder(kind)
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_connection(lambda: cls(decoder, on_frame, on_end), sock=sock)
        return channel

    def send(self, frame: object) -> None:
        """Raises ValueError for what cannot be written as a frame."""
        try:
            data = self._encoder.encode(frame)
        except (OverflowError, UnicodeEncodeError) as error:
            raise ValueError(f"the request holds a value that cannot be sent: {error}") from error
        if len(data) > MAX_BYTES:
            raise ValueError(f"the request has {len(data)} bytes, and {MAX_BYTES} are allowed")
        if not self._unsent:
            self._loop.call_soon(self._flush)
        self._unsent += len(data).to_bytes(_LENGTH_BYTES, "little"), data

    async def drained(self) -> None:
        """Returns when the other side has read most of what was sent."""
        await self._can_write.wait()

    def close(self) -> None:
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def _flush(self) -> None:
        data, self._unsent = b"".join(self._unsent), []
        if data and self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    # Called by the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), f"{transport=}"
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        begin, end = 0, len(self._received)
        try:
            while end - begin >= _LENGTH_BYTES:
                length = int.from_bytes(self._received[begin : begin + _LENGTH_BYTES], "little")
                if length > MAX_BYTES:
                    raise FrameError(f"a frame of {length} bytes: {MAX_BYTES} are allowed")
                first = begin + _LENGTH_BYTES
                if end < first + length:
                    break
                begin = first + length
                self._on_frame(self._decoder.decode(bytes(self._received[first:begin])))
        except (FrameError, msgspec.DecodeError) as error:
            self._error = FrameError(str(error))
            assert self._transport is not None, "it has just delivered something"
            self._transport.abort()
            return
        del self._received[:begin]

    def pause_writing(self) -> None:
        self._can_write.clear()

    def resume_writing(self) -> None:
        self._can_write.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._can_write.set()
        if self._error is None and self._received and not isinstance(error, OSError):
            self._error = FrameError(f"the last frame ends after {len(self._received)} bytes")
        self._on_end(self._error or error)
