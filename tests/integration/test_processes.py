"""Several engines in one process, and what happens to an engine in a forked child."""

import subprocess
import sys
import threading

import pytest

from moejet import LLM, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
QUESTIONS = (
    "Start with 17, add 25.",
    "Take 80 and subtract 23.",
    "Start with 5, add 9, double it.",
)


def _answers(llm: LLM) -> list[list[int]]:
    return [
        list(llm.chat([{"role": "user", "content": q}], GREEDY)[0].outputs[0].token_ids)
        for q in QUESTIONS
    ]


def test_two_engines_in_one_process() -> None:
    with LLM(expert_format="bf16", dense_format="bf16") as first, LLM(num_threads=1) as second:
        engines = (first, second)
        alone = [_answers(llm) for llm in engines]
        # In turns, then at the same time.
        streams = [
            llm.stream_chat([{"role": "user", "content": QUESTIONS[0]}], GREEDY) for llm in engines
        ]
        tokens: list[list[int]] = [[], []]
        for deltas in zip(*streams, strict=False):
            for mine, delta in zip(tokens, deltas, strict=True):
                mine.extend(delta.token_ids)
        for mine, expected in zip(tokens, alone, strict=True):
            assert mine == expected[0][: len(mine)]
            assert len(mine) > 2
        together: list[list[list[int]]] = [[], []]

        def work(number: int) -> None:
            for _ in range(2):
                together[number] = _answers(engines[number])

        threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
        assert together == alone
        first.close()
        assert _answers(second) == alone[1]


def test_divided_among_nodes_an_engine_says_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = []
    for nodes in ("1", "2", "3"):
        monkeypatch.setenv("MOEJET_NUMA_NODES", nodes)
        with LLM() as llm:
            answers.append(_answers(llm))
            answers[-1].append(llm.score(list(range(5, 40))))
    assert answers[0] == answers[1] == answers[2]


FORKED = """
import os, sys
from moejet import LLM, SamplingParams

few = SamplingParams(temperature=0.0, max_tokens=4)

def child(llm):
    try:
        llm.generate("1", few)
    except RuntimeError as error:
        assert "fork" in str(error) and "parent process" in str(error), error
    else:
        raise AssertionError("the forked child used its parent's threads")
    llm.close()
    with LLM() as own:
        own.generate("1", few)
"""
OS_FORK = """
with LLM() as llm:
    expected = llm.generate("1", few)[0].text
    pid = os.fork()
    if pid == 0:
        child(llm)
        sys.exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert llm.generate("1", few)[0].text == expected
"""
MULTIPROCESSING = """
import multiprocessing
with LLM() as llm:
    expected = llm.generate("1", few)[0].text
    process = multiprocessing.get_context("fork").Process(target=child, args=(llm,))
    process.start()
    process.join(60)
    assert process.exitcode == 0, process.exitcode
    assert llm.generate("1", few)[0].text == expected
"""


@pytest.mark.parametrize("way", [OS_FORK, MULTIPROCESSING], ids=["os.fork", "multiprocessing"])
def test_a_forked_child_is_refused_and_may_load_its_own(way: str) -> None:
    # In a fresh interpreter whose torch has one thread: its pool would not survive the fork either.
    program = f"import torch\ntorch.set_num_threads(1)\n{FORKED}{way}"
    done = subprocess.run([sys.executable, "-c", program], timeout=120, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
