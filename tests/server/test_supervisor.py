"""The supervisor against a stand-in for the engine's process that fails in every way; no model, real processes."""

import asyncio
import os
import signal
import sys
import textwrap
import time

import pytest

from moejet import EngineClosedError, EngineDeadError, QueueFullError, SamplingParams
from moejet.grammar import Grammar
from moejet.server import frames, supervisor
from moejet.server.backend import Job
from moejet.server.restarts import RestartPolicy, describe_exit
from moejet.server.supervisor import LoadError, RemoteBackend, WorkerOptions

# Answers every request with three deltas, unless its salt says how to fail.
STAND_IN = """
import os, signal, socket, struct, sys, time
import msgspec
from moejet.request import RequestOutput, SamplingParams, StreamDelta, Timings
from moejet.server import frames

sock = socket.socket(fileno=int(sys.argv[1]))
encoder, decoder = msgspec.msgpack.Encoder(), msgspec.msgpack.Decoder(frames.ToWorker)
def send(*items):
    data = [encoder.encode(item) for item in items]
    sock.sendall(b"".join(struct.pack("<I", len(d)) + d for d in data))
def read(n):
    data = b""
    while len(data) < n:
        more = sock.recv(n - len(data))
        if not more:
            sys.exit(0)
        data += more
    return data
def receive():
    return decoder.decode(read(struct.unpack("<I", read(4))[0]))

load = receive()
if load.model == "refused":
    send(frames.LoadFailed("model='refused': no such model", 2)); time.sleep(30)
if load.model == "crash":
    os.kill(os.getpid(), signal.SIGSEGV)
if load.model.startswith("once:"):
    with open(load.model[5:], "a+") as file:
        file.seek(0)
        if file.read():
            sys.exit(7)
        file.write("x")
send(frames.Loading(1, 2), frames.Loaded(100, 50, SamplingParams(), None))
health = {"alive": True, "state": "running", "running": 1}
if load.model == "stuck":
    health |= {"state": "stuck", "alive": False, "step_running_s": 5.0}
send(frames.Status(health, {"steps": 5, "queue": {"buckets": [[1.0, 2]]}}, {"p": (3, 9, 2)}))
def delta(number, text, **more):
    return frames.Delta(number, StreamDelta("r", 0, text, "", text, (1,), **more))
while True:
    frame = receive()
    if isinstance(frame, frames.Start):
        n, words = frame.number, frame.job.params.cache_salt or ""
        if words == "full":
            send(frames.Failed(n, "QueueFullError", "the queue is full; try again in 3 s", 3.0)); continue
        send(frames.Accepted(n), delta(n, "a"))
        if words == "hang":
            continue
        if words == "die":
            time.sleep(0.05); os.kill(os.getpid(), signal.SIGBUS)
        if words == "truncated":
            sock.sendall(struct.pack("<I", 100) + b"x" * 10); sys.exit(0)
        if words == "unknown":
            sock.sendall(b"\\x05\\x00\\x00\\x00" + encoder.encode(["Pik"]));  time.sleep(30)
        if words == "pickle":
            sock.sendall(b"\\x05\\x00\\x00\\x00" + b"\\x80\\x04K\\x01."); time.sleep(30)
        if words == "huge":
            sock.sendall(b"\\xff\\xff\\xff\\xff"); time.sleep(30)
        if words == "engine":
            send(frames.Died("RuntimeError: broken")); sys.exit(1)
        out = RequestOutput("r", None, (), (), Timings(2, 3, 0.0, 0.0, 0.0))
        send(delta(n, "b"), delta(n, "c", finish_reason="stop", output=out), frames.Ended(n))
    elif isinstance(frame, (frames.Abort, frames.EndThinking)):
        send(frames.Answer(frame.number, frame.request_id == "there"))
    elif isinstance(frame, frames.Score):
        send(frames.Failed(frame.number, "ValueError", "score needs at least 2 tokens, got 1"))
    elif isinstance(frame, frames.Stop):
        sys.exit(0)
"""


@pytest.fixture(autouse=True)
def stand_in(monkeypatch, tmp_path):
    script = tmp_path / "stand_in.py"
    script.write_text(textwrap.dedent(STAND_IN))
    monkeypatch.setattr(
        supervisor, "_command", lambda fd: [sys.executable, str(script), str(fd), "0", "0"]
    )


def job(words: str = "", request_id: str = "r") -> Job:
    return Job(request_id, [1, 2], SamplingParams(cache_salt=words or None), "not sent")


async def read(stream) -> str:
    text = ""
    while (delta := await stream.get()) is not None:
        text += delta.text
    return text


async def until(condition, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.01)


async def opened(model: str = "echo", **kw) -> RemoteBackend:
    return await RemoteBackend.open(WorkerOptions(model), name="m", **kw)


def test_requests_calls_and_numbers():
    async def main() -> None:
        shares = []
        backend = await opened(on_loading=shares.append)
        assert shares == [0.5]
        assert (backend.card.name, backend.card.max_context, backend.card.vocab_size) == (
            "m",
            100,
            50,
        )
        stream = await backend.start(job())
        deltas = []
        while (delta := await stream.get(5)) is not None:
            deltas.append(delta)
        assert "".join(d.content for d in deltas) == "abc"
        assert deltas[-1].output.prompt_token_ids == (1, 2)
        assert await backend.abort("there")
        assert not await backend.end_thinking("elsewhere")
        with pytest.raises(ValueError, match="at least 2 tokens"):
            await backend.score([1])
        with pytest.raises(QueueFullError, match=r"full; try again in 3 s$") as full:
            await backend.start(job("full"))
        assert full.value.retry_after_s == 3.0
        assert backend.progress("p") == (3, 9, 2)
        assert backend.progress("q") is None
        assert backend.health()["running"] == 1
        assert backend.counters()["steps"] == 5
        with pytest.raises(ValueError, match="cannot be sent"):
            await backend.start(job("\ud800"))
        await backend.close()
        with pytest.raises(EngineClosedError):
            await backend.start(job())

    asyncio.run(main())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("die", "SIGBUS .*mapped"),
        ("truncated", "exit code 0|ends after 14 bytes"),
        ("unknown", "cannot be read"),
        ("pickle", "cannot be read"),
        ("huge", "4294967295 bytes"),
        ("engine", "the engine is dead: RuntimeError: broken"),
    ],
)
def test_running_requests_fail_at_once_and_the_engine_comes_back(words, says):
    async def main() -> None:
        backend = await opened()
        bystander = await backend.start(job("hang"))
        assert (await bystander.get()).text == "a"
        begin = time.monotonic()
        stream = await backend.start(job(words))
        with pytest.raises(EngineDeadError, match=says):
            await read(stream)
        with pytest.raises(EngineDeadError, match=says):
            await bystander.get()
        # Half a second here; where a broken connection is not noticed, half a minute.
        assert time.monotonic() - begin < 10
        with pytest.raises(EngineDeadError, match="started again"):
            await backend.start(job())
        assert not backend.health()["alive"]
        await until(lambda: backend.health()["state"] == "running")
        assert await read(await backend.start(job())) == "abc"
        health = backend.health()
        assert health["restarts"] == 1
        assert health["alive"]
        # Totals go on counting.
        await until(lambda: backend.counters()["steps"] == 10)
        assert backend.counters()["queue"] == {"buckets": [[1.0, 4]]}
        await backend.close()

    asyncio.run(main())


def test_twenty_restarts_leave_nothing_behind():
    async def main() -> None:
        backend = await opened()
        pids = set()
        num_files = len(os.listdir("/proc/self/fd"))
        for number in range(20):
            stream = await backend.start(job("hang"))
            await stream.get()
            pids.add(backend.pid)
            os.kill(backend.pid, signal.SIGKILL)
            with pytest.raises(EngineDeadError, match="SIGKILL"):
                await stream.get()
            await until(lambda n=number: backend.health()["restarts"] == n + 1)
            assert await read(await backend.start(job())) == "abc"
        assert len(pids) == 20
        assert len(os.listdir("/proc/self/fd")) <= num_files + 2
        assert not backend._streams
        assert not backend._calls
        await backend.close()
        assert all(not os.path.exists(f"/proc/{pid}") for pid in pids)

    asyncio.run(main())


def test_it_gives_up_and_says_why(tmp_path):
    async def main() -> None:
        backend = await opened(
            f"once:{tmp_path / 'marker'}", restarts=RestartPolicy(max_failures=2, window_s=60)
        )
        stream = await backend.start(job("hang"))
        os.kill(backend.pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError):
            await read(stream)
        await until(lambda: backend.health()["state"] == "dead")
        with pytest.raises(EngineDeadError, match=r"exit code 7.*SIGUSR1 or restart"):
            await backend.start(job())
        assert "exit code 7" in backend.health()["error"]
        assert "SIGUSR1" in backend.health()["error"]
        # Another attempt fails as well, and as often; after the third one it has what it needs.
        assert backend.retry()
        await until(lambda: backend.health()["state"] == "restarting")
        await until(lambda: backend.health()["state"] == "dead")
        (tmp_path / "marker").unlink()
        assert backend.retry()
        await until(lambda: backend.health()["state"] == "running")
        assert await read(await backend.start(job())) == "abc"
        assert not backend.retry()
        await backend.close()

    asyncio.run(main())


def test_load_failures_reach_the_caller():
    async def main() -> None:
        with pytest.raises(LoadError, match="no such model") as refused:
            await opened("refused")
        assert refused.value.exit_code == 2
        with pytest.raises(LoadError, match="SIGSEGV") as crashed:
            await opened("crash")
        assert crashed.value.exit_code == 1

    asyncio.run(main())


def test_an_engine_that_hangs_in_a_step_is_killed_in_the_end():
    async def main() -> None:
        options = WorkerOptions("stuck", limits={"step_timeout_s": 2.0})
        backend = await RemoteBackend.open(options, name="m")
        await until(lambda: backend.health()["state"] == "stuck")
        stream = await backend.start(job("hang"))
        with pytest.raises(EngineDeadError, match="had been running for 5 s"):
            await read(stream)
        await backend.close()

    asyncio.run(main())


def test_closing_while_it_is_being_restarted():
    async def main() -> None:
        backend = await opened()
        os.kill(backend.pid, signal.SIGKILL)
        await until(lambda: backend.health()["state"] == "restarting")
        await asyncio.wait_for(backend.close(), 5)
        assert backend.pid is None

    asyncio.run(main())


def test_restart_policy():
    policy = RestartPolicy(max_failures=9, window_s=100)
    assert [policy.failed(t) for t in range(9)] == [0, 1, 2, 4, 8, 16, 30, 30, None]
    policy.succeeded()
    assert policy.failed(9) == 0
    assert policy.failed(10) == 1
    assert policy.failed(200) == 0


def test_exits_are_explained():
    assert "memory ran out: use" in describe_exit(-9, oom_kills=1)
    assert "somebody killed it" in describe_exit(-9)
    assert "--isa" in describe_exit(-4)
    assert describe_exit(3) == "ended with exit code 3"
    assert describe_exit(-250) == "ended with signal 250"


def test_frames_keep_what_they_carry():
    import msgspec

    params = SamplingParams(
        temperature=0.5,
        stop=("x",),
        stop_token_ids=(3,),
        logit_bias={7: -1.5},
        seed=-(2**63),
        grammar=Grammar.choice(["a", "b"]),
        cache_salt="sältz",
        max_thinking_tokens=5,
    )
    frame = frames.Start(3, Job("r", [1, 2, 3], params, "text", -2))
    data = msgspec.msgpack.encode(frame)
    decoder = msgspec.msgpack.Decoder(frames.ToWorker)
    assert decoder.decode(data) == frame
    plain = msgspec.msgpack.decode(data)
    plain[2]["params"]["top_p"] = 7.0
    with pytest.raises(msgspec.ValidationError, match="top_p"):
        decoder.decode(msgspec.msgpack.encode(plain))
    for wrong in (["Start", 3], ["Delta", 3, None], ["Abort", 1, "r", 4], {"Start": 1}, None):
        with pytest.raises(msgspec.ValidationError):
            decoder.decode(msgspec.msgpack.encode(wrong))
