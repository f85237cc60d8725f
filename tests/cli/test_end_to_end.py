"""The installed command with the embedded model, each in a process of its own."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

QUESTION = "Start with 17, add 25, then multiply by 3."
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}


def run(*arguments, stdin=None):
    return subprocess.run(
        [sys.executable, "-m", "moejet", *arguments],
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
        capture_output=True,
        text=True,
        timeout=120,
        env=ENVIRONMENT,
    )


def test_run_is_repeatable_and_json_agrees_with_text():
    text = run("run", QUESTION, "--temperature", "0")
    assert text.returncode == 0, text.stderr
    assert "prompt " in text.stderr
    done = run("run", QUESTION, "--temperature", "0", "--json", "--logprobs", "0")
    shown = json.loads(done.stdout)
    assert done.stderr == ""
    assert shown["reasoning"].strip()
    assert shown["finish_reason"] == "stop"
    assert text.stdout == f"{shown['reasoning'].strip()}\n\n{shown['content'].strip()}\n"
    assert len(shown["logprobs"]) == len(shown["token_ids"])
    assert shown["timings"]["completion_tokens"] == len(shown["token_ids"])


def test_chat_answers_each_line_of_a_pipe():
    done = run("chat", "--hide-thinking", "--seed", "1", stdin=f"{QUESTION}\n/stats\n{QUESTION}\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.strip().splitlines()) >= 2
    assert "1 answer, " in done.stderr


def test_errors_are_one_line():
    for arguments, message in [
        (("run", "./no/such/model", "hello"), "no/such/model"),
        (("run", "x", "--max-context", "999999"), "max_context=999999"),
        (("run", "word " * 5000), "max_context"),
        (("bench", "--synthetic", "deepseek-v9"), "deepseek-v9"),
    ]:
        done = run(*arguments)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("moejet: error: ")
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_bench_measures_the_embedded_model():
    done = run("bench", "-p", "64", "-n", "8", "-d", "0,32", "-r", "2", "-o", "jsonl")
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert [row["test"] for row in rows] == ["pp64", "tg8", "pp64@d32", "tg8@d32"]
    for row in rows:
        assert row["tokens_per_s"] > 0
        assert row["isa"] in ("scalar", "avx2", "avx512", "amx")
        assert row["threads"] >= 1
        assert 0 < row["size_bytes"] < 50e6
    assert 0 < rows[1]["bytes_per_token"] < rows[1]["size_bytes"]
    assert rows[1]["fraction_of_read_rate"] > 0


class Screen:
    """A command in a pseudo-terminal."""

    def __init__(self, *arguments):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.execve(sys.executable, [sys.executable, "-m", "moejet", *arguments], ENVIRONMENT)
        self.shown = ""

    def wait_for(self, text, seconds=60):
        """Read until `text` appears after what was waited for before."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            ready, _, _ = select.select([self.fd], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"no {text!r} in {self.shown!r}"
            try:
                self.shown += os.read(self.fd, 65536).decode(errors="replace")
            except OSError:  # Linux reports the closed terminal as an I/O error
                break
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, text):
        os.write(self.fd, text.encode())

    def exit_code(self):
        self.wait_for("\0never\0")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def screen():
    screens = []

    def start(*arguments):
        screens.append(Screen(*arguments))
        return screens[-1]

    yield start
    for one in screens:
        os.close(one.fd)
        try:
            os.kill(one.pid, signal.SIGKILL)
            os.waitpid(one.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass  # it has ended by itself


def test_keyboard_conversation(screen):
    chat = screen("chat", "--ignore-eos")  # without eos, the answer fills the context
    chat.wait_for("Ctrl-D leaves")
    chat.wait_for("> ")
    chat.type("\x03")
    chat.wait_for("Ctrl-D or /exit leaves")
    chat.wait_for("> ")
    chat.type(f"{QUESTION}\r")
    chat.wait_for("\x1b[2m")  # it thinks
    chat.type("\x03")
    chat.wait_for("stopped")
    chat.wait_for("> ")
    chat.type("/stats\r")
    chat.wait_for("no answers yet")
    chat.wait_for("> ")
    chat.type("\x04")
    assert chat.exit_code() == 0
