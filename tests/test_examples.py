"""The examples run as they are and print what makes sense, all in one process."""

import io
import re
import runpy
from ast import literal_eval
from contextlib import redirect_stdout
from pathlib import Path

import pytest

pytestmark = [pytest.mark.xdist_group("examples"), pytest.mark.usefixtures("one_thread")]
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def run(name: str) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return out.getvalue()


def check_stream_thinking(out: str) -> None:
    thinking, rest = out.split("--- answer ---")
    assert "017 + 025" in thinking
    assert re.search(r"The answer is \d+\.\n--- [1-9]\d* tokens/s ---", rest)


def check_concurrent_requests(out: str) -> None:
    for number in range(2, 8):
        assert f"Start with {number}, add 25. The answer is {number + 25}." in out
    assert "Take 90, subtract 34. Plan: 090, A - 034\n" in out
    tokens, steps, running = map(int, re.findall(r"\d+", out.splitlines()[-1]))
    assert tokens > steps  # they shared steps
    assert running == 0


def check_control_thinking(out: str) -> None:
    tokens = {name: int(n) for name, n in re.findall(r"^(.*): (\d+) tokens, ", out, re.MULTILINE)}
    assert tokens["at most 20 tokens"] < tokens["effort low"] < tokens["free"]
    assert tokens["one forced check"] > tokens["free"]
    assert "free: 73 tokens, The answer is 100." in out
    assert "Wait" in out.partition("--- the checked thinking ---")[2]


def check_strategies(out: str) -> None:
    rows = {line.split()[0]: line.split()[1:] for line in out.splitlines()[1:]}
    assert list(rows) == ["single", "vote:8", "best:8:logprob", "beam:4x2"]
    assert rows["vote:8"][0] == "131"  # (((61 - 7) * 9) + 38) / 4
    tokens = {name: int(row[2]) for name, row in rows.items()}
    steps = {name: int(row[3]) for name, row in rows.items()}
    assert tokens["vote:8"] > 6 * tokens["single"]
    assert steps["vote:8"] < 4 * steps["single"]
    assert float(rows["vote:8"][4]) > float(rows["single"][4])


def check_json_schema(out: str) -> None:
    assert "017 + 025" in out
    assert re.fullmatch(r"The answer is \d{1,3}\.", literal_eval(out.splitlines()[-1])["says"])


def check_token_policy(out: str) -> None:
    free, decided = out.splitlines()
    [free_again, free_tokens] = map(int, re.findall(r"(\d+) (?:thought|tokens)", free))
    [again, tokens] = map(int, re.findall(r"(\d+) (?:thought|tokens)", decided))
    assert again == 0 < free_again
    assert tokens < free_tokens
    assert "The answer is 524." in decided  # ((61 - 7) * 9) + 38


def check_sessions(out: str) -> None:
    saved, resumed = out.splitlines()
    assert int(re.search(r"(\d+) bytes saved", saved)[1]) > 0
    cached, total = map(int, re.search(r"(\d+) of (\d+) prompt tokens", resumed).groups())
    assert 0 < cached < total
    assert "The answer is 42." in resumed


def check_tool_calls(out: str) -> None:
    call, answer = out.splitlines()
    assert re.match(r"read_note\(number=[12]\) -> ", call)
    assert answer == ("The answer is 42." if "17" in call else "The answer is 57.")


def check_anthropic_client(out: str) -> None:
    thinking, answer, rest = out.split("\n--\n")
    assert "042 * 003 = 126" in thinking
    assert answer == "The answer is 126."
    assert rest.startswith("['thinking', 'text'] ")
    assert int(rest.split()[2]) < 60


def check_fastapi_app(out: str) -> None:
    assert out.splitlines() == ["{'answer': 'The answer is 42.'}", "tiny-reasoner"]


def check_transformers_plugin(out: str) -> None:
    assert int(out.split()[0]) > 1 << 20
    assert "017 + 025 = 042" in out
    assert "The answer is 42." in out


def check_benchmark(out: str) -> None:
    rate, megabytes, gbps, read_gbps, share = map(float, re.findall(r"[\d.]+\d|\d", out))
    assert rate > 0
    assert gbps == pytest.approx(rate * megabytes / 1e3, rel=0.02)
    assert share == pytest.approx(100 * gbps / read_gbps, rel=0.02, abs=1)
    assert 20 < megabytes < 1000


def check_branches(out: str) -> None:
    *text, figures = out.splitlines()
    assert "B: 042 * 003 = 126" in text
    assert text[-1] == "The answer is 126."
    tokens, steps = map(int, re.findall(r"\d+", figures))
    assert tokens > 3 * steps  # four or more at a time


def check_answers_and_programs(out: str) -> None:
    is_correct, groups, figures, ran = out.splitlines()
    assert (is_correct, groups) == ("True", "[0, 1, 0]")
    assert "pass@2 0.75" in figures
    assert ran.startswith("ok 45 ") or "full" not in ran  # where there is no sandbox, nothing runs


CHECKS = {name.removeprefix("check_"): f for name, f in globals().items() if name[:6] == "check_"}


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py")))
def test_example(name):
    CHECKS[name](run(name))


def test_every_check_has_its_example():
    assert {f"{name}.py" for name in CHECKS} == {path.name for path in EXAMPLES.glob("*.py")}
