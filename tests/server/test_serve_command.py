"""`moejet serve` as a process: what it prints, how it refuses, how it ends."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from moejet.cli.main import main

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
ENVIRONMENT.pop("MOEJET_API_KEY", None)
QUESTION = {
    "model": "tiny-reasoner",
    "messages": [{"role": "user", "content": "Start with 17, add 25."}],
}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "moejet", *arguments]


class Serving:
    def __init__(self, *arguments: str, **environment: str):
        self.process = subprocess.Popen(
            command("serve", "--port", "0", *arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**ENVIRONMENT, **environment},
        )
        line = self.process.stdout.readline()
        assert " is served at http://127.0.0.1:" in line, self.process.communicate()
        self.url = line.split()[-1]

    def engine_pid(self) -> int:
        path = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(path.read_text().split()[0])

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        self.process.send_signal(number)
        error = self.process.communicate(timeout=60)[1]
        return self.process.returncode, error

    def __enter__(self) -> "Serving":
        return self

    def __exit__(self, *exc: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()


def test_load_errors_are_those_of_run(tmp_path, capsys):
    model = str(tmp_path / "none")
    arguments = command("serve", "--port", "0", model)
    done = subprocess.run(
        arguments, capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=False
    )
    assert main(["run", model, "hello"]) == done.returncode == 2
    assert capsys.readouterr() == (done.stdout, done.stderr)
    assert done.stdout == ""
    assert done.stderr.startswith("moejet: error: model=")
    assert done.stderr.count("\n") == 1


def test_options_are_checked_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("MOEJET_API_KEY", raising=False)
    empty = tmp_path / "keys"
    empty.write_text("\n \n")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for arguments, words in (
            (("--host", "0.0.0.0"), "--api-key"),
            (("--port", "70000"), "port=70000"),
            (("--port", port), f"port {port}: Address already in use; choose another"),
            (("--api-key-file", str(empty)), "holds no key"),
            (("--api-key-file", str(tmp_path / "none")), "does not exist"),
            (("--hots", "x"), "did you mean '--host'?"),
            (("--drain-timeout", "inf"), "--drain-timeout='inf' must be a number between 0"),
            (("--drain-timeout", "-1"), "--drain-timeout='-1' must be a number between 0"),
            (("--header-timeout", "nan"), "--header-timeout='nan' must be a number above 0"),
            (("--max-restarts", "-1"), "--max-restarts=-1 must be 0 or more"),
            (("--host", "no.such.host.invalid", "--insecure"), "is no address of this machine"),
        ):
            assert main(["serve", *arguments]) in (1, 2), arguments
            printed = capsys.readouterr()
            assert printed.out == ""
            assert words in printed.err
            assert printed.err.count("\n") == 1


def test_sigterm_lets_running_requests_finish(tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("first\nsecond\n")
    with Serving("--api-key-file", str(keys), MOEJET_API_KEY="third") as server:
        pid = server.engine_pid()
        assert b"MOEJET_API_KEY" not in Path(f"/proc/{pid}/environ").read_bytes()
        assert httpx.get(f"{server.url}/health").json()["status"] == "ok"
        assert httpx.get(f"{server.url}/ready").json() == {"ready": True, "error": None}
        assert httpx.get(f"{server.url}/metrics").status_code == 401
        for key in ("first", "second", "third"):
            headers = {"authorization": f"Bearer {key}"}
            assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
        body = {**QUESTION, "stream": True, "max_tokens": 900, "ignore_eos": True}
        ended: list[tuple[int, str]] = []
        num_events, finish = 0, None
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=60
        ) as stream:
            for line in stream.iter_lines():
                if not line.startswith("data: {"):
                    continue
                num_events += 1
                finish = json.loads(line[6:])["choices"][0]["finish_reason"] or finish
                if num_events == 3:
                    ending = threading.Thread(target=lambda: ended.append(server.end()))
                    ending.start()
        assert finish == "length"
        ending.join(60)
        code, error = ended[0]
        assert code == 0
        assert "finishing the running requests" in error
        assert "Start with 17" not in error  # no prompts in the log
        assert "POST /v1/chat/completions 200" in error
        assert "Traceback" not in error
        assert not Path(f"/proc/{pid}").exists()


LONG = {**QUESTION, "stream": True, "max_tokens": 4000, "ignore_eos": True}


@pytest.mark.parametrize(
    ("signals", "arguments", "code"),
    [
        ((signal.SIGTERM,), ("--drain-timeout", "0.5"), 0),
        ((signal.SIGINT, signal.SIGINT), (), 130),
    ],
    ids=["the time is over", "Ctrl-C twice"],
)
def test_streams_that_are_ended_say_so(signals, arguments, code):
    with Serving("--no-access-log", *arguments) as server:
        lines = []
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json=LONG, timeout=30
        ) as stream:
            for line in stream.iter_lines():
                lines.append(line)
                if len(lines) in (4, 40)[: len(signals)]:
                    begin = time.monotonic()
                    server.process.send_signal(signals[len(lines) > 4])
        assert lines[-2:] == ["data: [DONE]", ""]
        error = json.loads(lines[-4][6:])["error"]
        assert error["code"] == "closing"
        assert "is being shut down: this answer ends here" in error["message"]
        log = server.process.communicate(timeout=30)[1]
        assert time.monotonic() - begin < 20
        assert server.process.returncode == code
        assert "ending the running requests" in log
        assert "Traceback" not in log


def test_start_up_and_a_client_that_leaves_in_mid_request():
    with Serving() as server:
        page = httpx.get(server.url)
        assert page.headers["content-type"].startswith("text/html")
        with socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as client:
            client.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n"
                b'Content-Type: application/json\r\n\r\n{"prompt":'
            )
            time.sleep(0.2)
        time.sleep(0.2)
        code, log = server.end()
    assert code == 0
    assert "a page to talk to it is there, too; Ctrl-C ends the server" in log
    assert "POST /v1/completions 499" in log  # no error
    assert "Traceback" not in log


def test_help(capsys):
    assert main(["serve", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in (
        "moejet serve [options] [MODEL]",
        "--port N default 8000; 0: any free one",
        "--max-restarts N",
        "--bandwidth GB/S",
        "--header-timeout SECONDS",
        "--drain-timeout SECONDS for running requests when the server is told to end (default 60)",
        "MOEJET_API_KEY=secret moejet serve org/name --host 0.0.0.0",
    ):
        assert words in text, words


def test_the_engine_killed_in_mid_stream():
    with Serving("--no-access-log") as server:
        body = {**QUESTION, "stream": True, "max_tokens": 1500, "ignore_eos": True}
        url = f"{server.url}/v1/chat/completions"
        lines = []
        with httpx.stream("POST", url, json=body, timeout=60) as stream:
            for line in stream.iter_lines():
                lines.append(line)
                if len(lines) == 4:
                    begin = time.monotonic()
                    os.kill(server.engine_pid(), signal.SIGKILL)
        assert time.monotonic() - begin < 10  # an engine that is only silent gets two minutes
        error = next(json.loads(line[6:]) for line in lines if '"error"' in line)["error"]
        assert "SIGKILL" in error["message"]
        refused = httpx.post(url, json=QUESTION)
        assert refused.status_code == 503
        assert "retry-after" in refused.headers
        assert refused.json()["error"]["code"] == "engine_dead"
        health = httpx.get(f"{server.url}/health")
        assert health.status_code == 503
        assert "SIGKILL" in health.json()["error"]
        deadline = time.monotonic() + 60
        while httpx.get(f"{server.url}/health").status_code != 200:
            assert time.monotonic() < deadline, "it does not come back"
            time.sleep(0.1)
        assert httpx.post(url, json=QUESTION, timeout=60).status_code == 200
        # Ctrl-C reaches the server only, which ends the engine itself.
        pid = server.engine_pid()
        code, error = server.end(signal.SIGINT)
        assert code == 0
        assert "GET /health" not in error
        assert not Path(f"/proc/{pid}").exists()


def test_one_process_and_slow_headers():
    with Serving("--no-worker", "--served-model-name", "mine") as server:
        assert httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"] == "mine"
        assert httpx.post(
            f"{server.url}/v1/chat/completions", json={**QUESTION, "model": "mine"}, timeout=60
        ).json()["choices"][0]["message"]["content"]
        assert not Path(
            f"/proc/{server.process.pid}/task/{server.process.pid}/children"
        ).read_text()
        # It obeys also when nobody is there any more to read what it says about that.
        server.process.stderr.close()
        server.process.terminate()
        assert server.process.wait(20) == 0


def test_connections_without_a_request_are_closed():
    import asyncio

    import uvicorn

    from moejet.server.connection import protocol_class

    answers = asyncio.Event()

    async def app(scope, receive, send):
        await answers.wait()  # a slow answer is not a slow request
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    async def main() -> None:
        config = uvicorn.Config(
            app, port=0, http=protocol_class(0.3), lifespan="off", log_level="error"
        )
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        port = server.servers[0].sockets[0].getsockname()[1]
        begin = time.monotonic()
        idle, slow, good = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3)]
        slow[1].write(b"GET / HTTP/1.1\r\nHost: x\r\n")
        good[1].write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert await idle[0].read() == b""
        assert await slow[0].read() == b""
        assert time.monotonic() - begin > 0.2
        answers.set()
        assert (await good[0].readline()).startswith(b"HTTP/1.1 200")
        for _, writer in (idle, slow, good):
            writer.close()
        server.should_exit = True
        await serving

    asyncio.run(main())


@pytest.mark.parametrize("moment", [0.4, 1.5])
def test_it_may_be_ended_while_it_loads(moment):
    with subprocess.Popen(
        command("serve", "--port", "0"), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
    ) as process:
        time.sleep(moment)
        process.send_signal(signal.SIGTERM)
        error = process.communicate(timeout=30)[1]
    assert "Traceback" not in error
    assert process.returncode in (0, -signal.SIGTERM)  # not before Python itself has begun


def test_missing_packages_are_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve"]) == 2
    error = capsys.readouterr().err
    assert "needs the package uvicorn" in error
    assert "pip install 'moejet[server]'" in error
