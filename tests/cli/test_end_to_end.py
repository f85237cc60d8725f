"""The command line with the embedded model; also as a program and in a terminal."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time

import pytest

from moejet import ceilings
from moejet.config import ISAS

QUESTION = "Start with 17, add 25, then multiply by 3."
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TERM": "xterm"}


def test_run_as_a_program_and_as_json_agree(moejet):
    text = subprocess.run(
        [sys.executable, "-m", "moejet", "run", QUESTION, "--temperature", "0"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=120,
        env=ENVIRONMENT,
    )
    assert text.returncode == 0, text.stderr
    choices, figures = text.stderr.splitlines()
    assert choices.startswith("int4_g32 experts, int8 dense (from bf16): ")
    assert figures.startswith("prompt ")
    result = moejet("run", QUESTION, "--temperature", "0", "--json", "--logprobs", "0")
    shown = json.loads(result.out)
    assert result.err == ""
    assert shown["reasoning"].strip()
    assert shown["finish_reason"] == "stop"
    assert text.stdout == f"{shown['reasoning'].strip()}\n\n{shown['content'].strip()}\n"
    assert len(shown["logprobs"]) == len(shown["token_ids"])
    assert shown["timings"]["completion_tokens"] == len(shown["token_ids"])


def test_several_answers_and_raw_text(moejet):
    shown = json.loads(moejet("run", QUESTION, "--json", "-n", "2", "--max-tokens", "8").out)
    assert [len(answer["token_ids"]) for answer in shown["outputs"]] == [8, 8]
    result = moejet("run", "Start with 17", "--raw", "--max-tokens", "4", "--ignore-eos")
    assert result.code == 0
    assert "answer 4 tokens" in result.err


def test_chat_answers_each_line_of_a_pipe(moejet):
    result = moejet(
        "chat", "--hide-thinking", "--temperature", "0", stdin=f"{QUESTION}\n/stats\n{QUESTION}\n"
    )
    assert result.code == 0, result.err
    assert len(result.out.strip().splitlines()) >= 2
    assert "1 answer, " in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "./no/such/model", "hello"), "no/such/model"),
        (("run", "x", "--max-context", "999999"), "--max-context=999999"),
        (("run", "word " * 5000), "max_context"),
        (("bench", "--synthetic", "deepseek-v9"), "deepseek-v9"),
        (("bench", "-p", "64", "-d", "999999"), "max_context"),
    ],
)
def test_refusals_are_one_line(moejet, arguments, message):
    result = moejet(*arguments)
    assert result.code == 2
    *_, error = result.err.splitlines()  # after the model, if that was loaded
    assert error.startswith("moejet: error: ")
    assert message in error
    assert "Traceback" not in result.err


def test_bench_measures_the_embedded_model(moejet, monkeypatch):
    monkeypatch.setattr(ceilings, "read_buffer_bytes", lambda: 64 << 20)
    arguments = ("-p", "64", "-n", "8", "-d", "0,32", "-b", "1,3", "-r", "2", "-o", "jsonl")
    result = moejet("bench", *arguments)
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [row["test"] for row in rows] == [
        "pp64",
        "tg8",
        "tg8xb3",
        "pp64@d32",
        "tg8@d32",
        "tg8@d32xb3",
    ]
    for row in rows:
        assert row["tokens_per_s"] > 0
        assert row["isa"] in ISAS
        assert row["threads"] >= 1
        assert 0 < row["size_bytes"] < 50e6
        assert row["tflops"] > 0
        assert (row["overhead_ms"] is None) == (row["test"][:2] == "pp")
    assert 0 < rows[1]["bytes_per_token"] < rows[1]["size_bytes"]
    assert rows[1]["fraction_of_read_rate"] > 0
    # Sequences share what they read, so that each token costs less.
    assert rows[2]["bytes_per_token"] < rows[1]["bytes_per_token"]


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
            if not ready:
                raise TimeoutError(f"no {text!r} in {self.shown!r}")
            try:
                self.shown += os.read(self.fd, 65536).decode(errors="replace")
            except OSError:  # Linux reports the closed terminal as an I/O error
                break
        before, _, self.shown = self.shown.partition(text)
        return before

    def type(self, text):
        os.write(self.fd, text.encode())

    def press_until(self, key, text):
        """Press a key until `text` appears.

        A signal that comes between readline's prompt and its wait for input is seen only with
        the next key: that gap is Python's, and too short for a person to hit.
        """
        for _ in range(20):
            self.type(key)
            try:
                return self.wait_for(text, seconds=3)
            except TimeoutError:
                continue
        raise TimeoutError(f"no {text!r} in {self.shown!r}")

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
    chat.press_until("\x03", "Ctrl-D or /exit leaves")
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
