"""Exact multi-step arithmetic: the task of the embedded tiny reasoner, and its answer checker.

A problem is a start number and a chain of operations whose every value is a whole number in
2..999. The prompt says it in plain words; the thinking restates it with fixed-width numbers:

    Plan: 017, A + 025, B * 003        the problem again, one letter per step
    A: 017 + 025 = 042                 one line per step
    B: 042 * 003 = 126
    Wait, let me check.                a check round, spontaneous or forced
    A? 042 - 025 = 017, 017 ok         inverse operation, operands from the problem again, and
    B? 126 / 003 = 042, 042 ok         the value that the step began with; `none` when no whole
                                       number in 0..999 fits; `no` starts a repair that repeats
                                       the lines from that step on

Everything can be checked exactly, which is what makes the task useful for measuring strategies.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Op = Literal["+", "-", "*", "/"]

OPS: tuple[Op, ...] = ("+", "-", "*", "/")
INVERSE: dict[Op, Op] = {"+": "-", "-": "+", "*": "/", "/": "*"}
LABELS = "ABCDEFGHIJ"
MIN_VALUE, MAX_VALUE, MAX_FACTOR = 2, 999, 12
HELD_OUT_SHARE = 0.1

STARTS = (
    "Start with",
    "Begin with",
    "Take",
    "Take the number",
    "start with",
    "begin with",
    "Please start with",
    "Please begin with",
    "What is",
    "what is",
)
PHRASES: dict[Op, tuple[str, ...]] = {
    "+": ("add", "plus"),
    "-": ("subtract", "minus", "take away"),
    "*": ("multiply by", "times"),
    "/": ("divide by", "divided by"),
}
JOINERS = (", {}", ", then {}", ", and {}", ", and then {}", " then {}", " and {}", " and then {}")
SENTENCE_JOINERS = (". {}", ". Then {}", ". Now {}", ". Next, {}", ". After that, {}", ". And {}")
ENDINGS = (
    "",
    " What do you get?",
    " What is the result?",
    " What is the answer?",
    " What number do you get?",
)
FOLLOW_UPS = ("Now {}", "now {}", "Then {}", "Next, {}", "And now {}")

_STEP = re.compile(r"([A-J]): (\d{3}) ([-+*/]) (\d{3}) = (\d{3})")
_PLAN = re.compile(r"Plan: (\d{3})((?:, [A-J] [-+*/] \d{3})*)")
_PLAN_STEP = re.compile(r", ([A-J]) ([-+*/]) (\d{3})")
_ANSWER = re.compile(r"answer is (\d+)")


@dataclass(frozen=True, slots=True)
class Step:
    """One operation of a problem."""

    op: Op
    operand: int


@dataclass(frozen=True)
class Problem:
    """A start number and the operations that follow."""

    start: int
    steps: tuple[Step, ...]

    @cached_property
    def values(self) -> tuple[int, ...]:
        """The exact value after every step."""
        value, values = self.start, []
        for step in self.steps:
            result = apply(step.op, value, step.operand)
            if result is None:
                raise ValueError(f"{self.canonical}: {value} {step.op} {step.operand} is not exact")
            value = result
            values.append(value)
        return tuple(values)

    @property
    def answer(self) -> int:
        """The value after the last step."""
        return self.values[-1]

    @property
    def canonical(self) -> str:
        """One spelling per problem, whatever its wording: `017 + 025 * 003`, left to right."""
        return " ".join([f"{self.start:03d}", *(f"{s.op} {s.operand:03d}" for s in self.steps)])


@dataclass(frozen=True, slots=True)
class StepCheck:
    """Whether one line of reasoning is right, given the lines before it."""

    line: int  # index of the line in reasoning.split("\n")
    label: str
    kind: Literal["step", "check"]
    correct: bool
    step_correct: bool  # the step's latest line; of a check, whether what it checks is right


def apply(op: Op, a: int, b: int) -> int | None:
    """Return `a op b` if it is a whole number in 0..999, else None."""
    if op == "/":
        return a // b if b and a % b == 0 else None
    result = a + b if op == "+" else a - b if op == "-" else a * b
    return result if 0 <= result <= MAX_VALUE else None


def _operands(op: Op, value: int) -> Sequence[int]:
    """All operands that keep the value exact and in range."""
    if op == "+":
        return range(MIN_VALUE, MAX_VALUE - value + 1)
    if op == "-":
        return range(MIN_VALUE, value - MIN_VALUE + 1)
    if op == "*":
        return range(MIN_VALUE, min(MAX_FACTOR, MAX_VALUE // value) + 1)
    top = min(MAX_FACTOR, value // MIN_VALUE)
    return [b for b in range(MIN_VALUE, top + 1) if value % b == 0]


def generate_problem(rng: random.Random, steps: int, *, start: int | None = None) -> Problem:
    """Draw a problem of exactly `steps` operations, every value a whole number in 2..999."""
    if not 1 <= steps <= len(LABELS):
        raise ValueError(f"steps must be 1..{len(LABELS)}, got {steps}")
    value = start if start is not None else _draw_number(rng, MIN_VALUE, MAX_VALUE)
    first, chain = value, []
    for _ in range(steps):
        choices = {op: operands for op in OPS if (operands := _operands(op, value))}
        op = rng.choice(list(choices))
        operands = choices[op]
        low, high = operands[0], operands[-1]
        operand = _draw_number(rng, low, high) if op in "+-" else rng.choice(operands)
        chain.append(Step(op, operand))
        result = apply(op, value, operand)
        assert result is not None, f"{value=} {op=} {operand=}"
        value = result
    return Problem(first, tuple(chain))


def _draw_number(rng: random.Random, low: int, high: int) -> int:
    """Uniform, but half of the time below 100 where the range allows."""
    top = min(high, 99) if low <= 99 and rng.random() < 0.5 else high
    return rng.randint(low, top)


def word_problem(problem: Problem, rng: random.Random | None = None) -> str:
    """Say the problem in plain words; without `rng` in its plainest form."""
    if rng is None:
        steps = [f"{PHRASES[s.op][0]} {s.operand}" for s in problem.steps]
        steps[-1] = f"then {steps[-1]}" if len(steps) > 1 else steps[-1]
        body = ", ".join(steps)
        return f"Start with {problem.start}, {body}."
    start = rng.choice(STARTS)
    text = f"{start} {problem.start}"
    is_question = start in ("What is", "what is")
    first = " {}" if is_question else None
    text += _say_steps(problem.steps, rng, first=first, sentences=not is_question)
    return text + ("?" if is_question else "." + rng.choice(ENDINGS))


def follow_up(problem: Problem, rng: random.Random) -> str:
    """Say only the steps, for a turn that continues from the previous answer."""
    opening = rng.choice(FOLLOW_UPS)
    return _say_steps(problem.steps, rng, first=opening, sentences=True) + "." + rng.choice(ENDINGS)


def _say_steps(
    steps: Sequence[Step], rng: random.Random, *, first: str | None, sentences: bool
) -> str:
    style = SENTENCE_JOINERS if sentences and rng.random() < 0.25 else JOINERS
    plain = rng.random() < 0.4  # the same joiner throughout
    joiner = rng.choice(style)
    text = ""
    for i, step in enumerate(steps):
        phrase = f"{rng.choice(PHRASES[step.op])} {step.operand}"
        form = first if i == 0 and first else joiner if plain else rng.choice(style)
        if form in (". {}",):
            phrase = phrase[0].upper() + phrase[1:]
        text += form.format(phrase)
    return text


def is_held_out(problem: Problem) -> bool:
    """True for the tenth of all problems that training never sees (by hash of the canonical form)."""
    digest = hashlib.sha256(problem.canonical.encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def held_out_problems(
    n: int = 300, seed: int = 0, *, min_steps: int = 2, max_steps: int = 8
) -> list[tuple[Problem, str]]:
    """Draw `n` distinct held-out problems with their wording, step counts evenly spread."""
    rng = random.Random(f"held-out {seed}")
    seen: set[str] = set()
    problems: list[tuple[Problem, str]] = []
    while len(problems) < n:
        steps = min_steps + len(problems) % (max_steps - min_steps + 1)
        problem = generate_problem(rng, steps)
        if is_held_out(problem) and problem.canonical not in seen:
            seen.add(problem.canonical)
            problems.append((problem, word_problem(problem, rng)))
    return problems


def plan_line(problem: Problem) -> str:
    """Restate the problem in fixed width."""
    steps = (f", {LABELS[i]} {s.op} {s.operand:03d}" for i, s in enumerate(problem.steps))
    return f"Plan: {problem.start:03d}" + "".join(steps)


def step_line(index: int, a: int, op: Op, b: int, c: int) -> str:
    """The line of one forward step."""
    return f"{LABELS[index]}: {a:03d} {op} {b:03d} = {c:03d}"


def check_line(index: int, c: int, op: Op, b: int, *, before: int) -> tuple[str, bool]:
    """The line that undoes step `index` (`op`, `b`) from `c`, and whether it arrives at `before`."""
    a = apply(INVERSE[op], c, b)
    ok = a == before
    shown = "none" if a is None else f"{a:03d}"
    verdict = "ok" if ok else "no"
    return f"{LABELS[index]}? {c:03d} {INVERSE[op]} {b:03d} = {shown}, {before:03d} {verdict}", ok


def reference_thinking(problem: Problem, *, checks: int = 0) -> str:
    """The thinking a perfect model would write, with `checks` check rounds."""
    lines = [plan_line(problem)]
    before = (problem.start, *problem.values)
    for i, (step, value) in enumerate(zip(problem.steps, problem.values, strict=True)):
        lines.append(step_line(i, before[i], step.op, step.operand, value))
    for _ in range(checks):
        lines.append("Wait, let me check.")
        for i, (step, value) in enumerate(zip(problem.steps, problem.values, strict=True)):
            lines.append(check_line(i, value, step.op, step.operand, before=before[i])[0])
    return "\n".join(lines) + "\n"


def extract_answer(text: str) -> int | None:
    """The number of the last "answer is N" after the thinking, or None."""
    found = _ANSWER.findall(text.rpartition("</think>")[2])
    return int(found[-1]) if found else None


def parse_plan(line: str) -> Problem | None:
    """Read a plan line back, or None if it is not one."""
    match = _PLAN.fullmatch(line)
    if match is None:
        return None
    found = _PLAN_STEP.findall(match[2])
    if [label for label, _, _ in found] != list(LABELS[: len(found)]):
        return None
    return Problem(int(match[1]), tuple(Step(op, int(b)) for _, op, b in found))


def check_steps(reasoning: str, problem: Problem | None = None) -> list[StepCheck]:
    """Label every step and check line as right or wrong, given the lines before it.

    A forward line is right if it takes the value it should, the operand that the problem gives
    and computes exactly; a check line if it undoes the right step and its verdict follows.
    Without `problem`, the plan line of the reasoning itself is taken as the problem.
    """
    values: dict[int, int] = {}
    is_right: dict[str, bool] = {}
    checks: list[StepCheck] = []
    for number, line in enumerate(reasoning.split("\n")):
        if problem is None:
            problem = parse_plan(line)
        if len(line) < 2 or line[0] not in LABELS or line[1] not in ":?":
            continue
        kind: Literal["step", "check"] = "step" if line[1] == ":" else "check"
        index = LABELS.index(line[0])
        correct = False
        if problem is not None and index < len(problem.steps):
            step = problem.steps[index]
            before = values.get(index - 1) if index else problem.start
            if (match := _STEP.fullmatch(line)) is not None:
                a, op, b, c = int(match[2]), match[3], int(match[4]), int(match[5])
                correct = (a, op, b) == (before, step.op, step.operand) and (
                    apply(step.op, a, b) == c
                )
                values[index] = c
            elif before is not None and index in values:
                right, _ = check_line(index, values[index], step.op, step.operand, before=before)
                correct = line == right
        if kind == "step":
            is_right[line[0]] = correct
        checks.append(StepCheck(number, line[0], kind, correct, is_right.get(line[0], False)))
    return checks
