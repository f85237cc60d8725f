"""The command in a real shell: readers that leave, full disks, closed streams, a locale without UTF-8."""

import os
import subprocess
import sys

import pytest

MOEJET = f"{sys.executable} -m moejet"
# A shell's line, the exit code that the README promises, and what stderr holds.
LINES = {
    "a reader that leaves": (f"{MOEJET} --help | head -1; exit ${{PIPESTATUS[0]}}", (0, 141), ""),
    "a full disk": (f"{MOEJET} --help > /dev/full", (1,), "No space left"),
    "closed output": (f"{MOEJET} --help >&-", (0, 1), ""),
    "closed errors": (f"{MOEJET} nonsense 2>&-", (2,), ""),
    "closed input": (f"{MOEJET} eval no-such-file.jsonl <&-", (2,), "no-such-file.jsonl"),
    "no UTF-8": (f"{MOEJET} $'p\\u00fcll\\xff'", (2,), "unknown command"),
    "a file without a place": (f"{MOEJET} bench --json /no/such/place/x", (2,), "/no/such/place"),
}


@pytest.mark.parametrize("name", LINES)
def test_lines_of_a_shell(name):
    line, codes, shown = LINES[name]
    environment = {**os.environ, "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0"}
    done = subprocess.run(["bash", "-c", line], capture_output=True, env=environment, timeout=60)
    error = done.stderr.decode("utf-8", "replace")
    assert done.returncode in codes, error
    assert "Traceback" not in error
    assert shown in error
    assert len(error.splitlines()) <= 1
