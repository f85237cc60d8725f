"""The engine in its own process, with the tiny reasoner: the same answers, and an orderly end in every case."""

import asyncio
import contextlib
import gc
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from dataclasses import replace
from pathlib import Path

import pytest

from moejet import LLM, AsyncLLM, EngineDeadError, SamplingParams
from moejet.grammar import Grammar
from moejet.policy import TokenPolicy
from moejet.server import frames, supervisor
from moejet.server.backend import Job, LocalBackend
from moejet.server.supervisor import LoadError, RemoteBackend, WorkerOptions
from moejet.testing.checkpoints import tiny_checkpoint

OPTIONS = {"num_threads": 1, "deterministic": True}
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
CASES = {
    "greedy": SamplingParams(temperature=0.0, max_tokens=60),
    "samples": SamplingParams(seed=5, n=3, max_tokens=40, logprobs=2),
    "grammar": SamplingParams(seed=1, max_tokens=60, grammar=Grammar.regex("[0-9]{2,4}")),
    "budget": SamplingParams(temperature=0.0, max_thinking_tokens=3, statistics=True),
}


async def whole(backend, job: Job):
    stream = await backend.start(job)
    texts: dict[int, str] = {}
    output = None
    while (delta := await stream.get(60)) is not None:
        texts[delta.index] = texts.get(delta.index, "") + delta.text
        output = delta.output or output
    assert output is not None
    assert [texts[o.index] for o in output.outputs] == [o.text for o in output.outputs]
    return replace(output, prompt=None, timings=None)


async def rest_of(stream) -> int:
    num_tokens = 0
    while (delta := await stream.get(60)) is not None:
        num_tokens += len(delta.token_ids)
    return num_tokens


async def until(condition, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        await asyncio.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_it_is_a_drop_in_for_the_engine_in_this_process():
    async def main() -> None:
        llm = AsyncLLM(**OPTIONS)
        local = LocalBackend(llm, name="tiny")
        remote = await RemoteBackend.open(WorkerOptions("tiny-reasoner", OPTIONS), name="tiny")
        card = remote.card
        assert replace(card, tokenizer=None) == replace(local.card, tokenizer=None)
        messages = [{"role": "user", "content": "Start with 17, add 25, then multiply by 3."}]
        text = card.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        assert text == llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
        ids = card.tokenizer.encode(text, add_special_tokens=False)
        assert ids == llm.tokenizer.encode(text, add_special_tokens=False)
        assert card.tokenizer.eos_token_ids == llm.tokenizer.eos_token_ids
        assert card.tokenizer.think_tags == llm.tokenizer.think_tags
        for name, params in CASES.items():
            job = Job(name, ids, params, text)
            assert await whole(remote, job) == await whole(local, job), name
        assert await remote.score(ids, 2) == await local.score(ids, 2)
        for wrong in (Job("w", [10**6], CASES["greedy"]), Job("w", [], CASES["greedy"])):
            errors = []
            for backend in (remote, local):
                with pytest.raises(ValueError, match=r"prompt|vocabulary") as error:
                    await backend.start(wrong)
                errors.append(str(error.value))
            assert errors[0] == errors[1]
        with pytest.raises(TypeError):  # a policy is code, which does not travel
            await remote.start(Job("p", ids, SamplingParams(policy=TokenPolicy)))
        endless = SamplingParams(temperature=0.0, max_tokens=1500, ignore_eos=True)

        # A slow reader gets everything, and little waits for it here.
        stream = await remote.start(Job("slow", ids, endless, text))
        await until(lambda: remote.health()["requests"] == 1)
        await asyncio.sleep(1.0)
        assert stream._mailbox.num_unread <= frames.WINDOW
        assert sum(len(run.deltas) for run in stream._mailbox._runs) <= frames.WINDOW
        assert await rest_of(stream) == 1500

        # Closing, cancelling and letting go of a stream end the request.
        closed = await remote.start(Job("closed", ids, endless, text))
        cancelled = await remote.start(Job("cancelled", ids, endless, text))
        dropped = await remote.start(Job("dropped", ids, endless, text))
        aborted = await remote.start(Job("aborted", ids, endless, text))
        assert await remote.abort("aborted")  # at once, before it has all of its tokens
        await dropped.get()
        closed.close()
        await cancelled.get()
        for _ in range(3):
            reads = asyncio.create_task(cancelled.get())
            await asyncio.sleep(0)
            reads.cancel()
            await asyncio.gather(reads, return_exceptions=True)
        del dropped, cancelled, reads
        gc.collect()
        last = None
        while (delta := await aborted.get(10)) is not None:
            last = delta
        assert last.finish_reason == "abort"
        await until(lambda: remote.health()["requests"] == 0)

        # Answer now: a model that would never come to it by itself.
        closing_tag = card.tokenizer.token_to_id("</think>")
        thinks = SamplingParams(temperature=0.0, max_tokens=1500, logit_bias={closing_tag: -100.0})
        thinker = await remote.start(Job("thinker", ids, thinks, text))
        assert await remote.end_thinking("thinker")
        content = ""
        while (delta := await thinker.get(10)) is not None:
            content += delta.content
        assert content
        assert not await remote.end_thinking("thinker")

        # kill -9 in mid-stream.
        pid = remote.pid
        stream = await remote.start(Job("victim", ids, endless, text))
        await stream.get()
        begin = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="SIGKILL"):
            await rest_of(stream)
        assert time.monotonic() - begin < 1.0
        await until(lambda: remote.health()["state"] == "running", 60)
        job = Job("again", ids, CASES["greedy"], text)
        assert await whole(remote, job) == replace(await whole(local, job), request_id="again")
        # Draining finishes what runs.
        stream = await remote.start(Job("last", ids, endless, text))
        pid = remote.pid
        closing = asyncio.create_task(remote.close(drain=True))
        assert await rest_of(stream) == 1500
        await asyncio.wait_for(closing, 20)
        assert not is_alive(pid)
        await llm.close(drain=False)

    asyncio.run(main())


def test_load_errors_are_those_of_the_command_line(tmp_path):
    async def main() -> None:
        with pytest.raises(LoadError, match="no such file or directory") as error:
            await RemoteBackend.open(WorkerOptions(str(tmp_path / "none"), {}), name="m")
        assert error.value.exit_code == 2
        with pytest.raises(LoadError, match="unknown engine option 'max_contxt'; did you mean"):
            await RemoteBackend.open(WorkerOptions("tiny-reasoner", {"max_contxt": 5}), name="m")

    asyncio.run(main())


def _listening(pid: int) -> set[str]:
    """Addresses and paths at which a process waits for others."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            target = os.readlink(entry)
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
    found = set()
    for name, inode, is_waiting in (("tcp", 9, 3), ("tcp6", 9, 3), ("unix", 6, 3)):
        for line in Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]:
            parts = line.split()
            waits = parts[is_waiting] == ("00010000" if name == "unix" else "0A")
            if waits and parts[inode] in inodes:
                found.add(f"{name} {parts[1]}")
    return found


def test_listeners_would_be_seen():
    with socket.create_server(("127.0.0.1", 0)), socket.socket(socket.AF_UNIX) as named:
        named.bind("\0moejet-test-listening")
        named.listen()
        assert {one.split()[0] for one in _listening(os.getpid())} == {"tcp", "unix"}


@pytest.mark.parametrize("thread", [False, True])
def test_the_engine_listens_nowhere_and_ends_with_the_server(thread):
    code = """
        import asyncio, threading, time
        from moejet.server.supervisor import RemoteBackend, WorkerOptions

        async def main():
            backend = await RemoteBackend.open(WorkerOptions("tiny-reasoner", {}), name="m")
            print(backend.pid, flush=True)
            time.sleep(600)  # answers nothing any more

        run = lambda: asyncio.run(main())
        threading.Thread(target=run).start() if THREAD else run()
    """
    code = textwrap.dedent(code).replace("THREAD", str(thread))
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=ENVIRONMENT, text=True) as server:
        try:
            pid = int(server.stdout.readline())
            assert is_alive(pid)
            assert _listening(pid) == set()
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            assert b"OMP_WAIT_POLICY=passive" in environment
        finally:
            server.kill()
    deadline = time.monotonic() + 5
    while is_alive(pid):
        assert time.monotonic() < deadline, "the engine outlives its server"
        time.sleep(0.02)


@pytest.mark.parametrize(
    "data",
    [b"\x05\x00\x00\x00\x80\x04K\x01.", b"\xff\xff\xff\xff", b"\x00\x00\x00\x00", b"\x09\x00\x00"],
    ids=["pickle", "huge", "empty", "truncated"],
)
def test_the_engine_drops_a_peer_that_talks_nonsense(data):
    mine, its = socket.socketpair()
    with mine, its:
        command = supervisor._command(its.fileno())
        process = subprocess.Popen(
            command, pass_fds=(its.fileno(),), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
        )
        its.close()
        mine.sendall(data)
        mine.shutdown(socket.SHUT_WR)
        error = process.communicate(timeout=20)[1]
    assert process.returncode == 3
    assert "Traceback" not in error
    assert "connection to the server's process is broken" in error


def test_the_servers_process_loads_no_torch():
    code = (
        "import sys, moejet.server.app, moejet.server.supervisor, moejet.cli.serve;"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=True, timeout=60)


def test_a_mapped_weight_file_that_is_cut_short_ends_requests_and_not_the_server(tmp_path):
    model = tiny_checkpoint(tmp_path / "model", "deepseek_v3")
    cache = tmp_path / "cache"
    options = {**OPTIONS, "packed_cache": "on"}

    async def main() -> None:
        backend = await RemoteBackend.open(WorkerOptions(str(model), options, {}), name="m")
        job = Job("before", [5, 6, 7], SamplingParams(temperature=0.0, max_tokens=4))
        before = await whole(backend, job)
        [file] = cache.rglob("*.packed")
        os.truncate(file, 4096)
        with pytest.raises(EngineDeadError, match=r"SIGBUS.*mapped"):
            await whole(backend, replace(job, request_id="after"))
        assert not backend.health()["alive"]
        await until(lambda: backend.health()["state"] == "running", 60)
        again = await whole(backend, replace(job, request_id="again"))
        assert again.outputs == before.outputs
        await backend.close()

    previous = os.environ.get("MOEJET_CACHE")
    os.environ["MOEJET_CACHE"] = str(cache)
    try:
        LLM(model, **options).close()  # packs the weights; the next one maps them
        asyncio.run(main())
    finally:
        os.environ.pop("MOEJET_CACHE")
        if previous is not None:
            os.environ["MOEJET_CACHE"] = previous
