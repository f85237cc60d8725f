"""Training samples: worded problems, thinking with slips and repairs, and what the loss may see.

A sample is a list of pieces (text, loss weight, step label). Slips are put into forward lines with
weight 0, so the model never learns to make them, but reads them and learns to find and repair them.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenizer import (
    ASSISTANT,
    BOS,
    END_THINK,
    EOS,
    GREETINGS,
    NO_TASK_ANSWERS,
    NO_TASK_THOUGHTS,
    OUT_OF_RANGE_ANSWER,
    OUT_OF_RANGE_THOUGHT,
    SYSTEM_PROMPTS,
    THINK,
    USER,
    WAIT_LINE,
)
from tokenizers import Tokenizer

from moejet.testing import arithmetic as ar

Piece = tuple[str, float, int]  # text, loss weight, step label (1 right, 0 wrong, -1 none)
ROUNDS = (0.4, 0.27, 0.17, 0.11, 0.05)  # share of samples with 0, 1, 2, ... check rounds
ERRORS_FIRST = (0.35, 0.5, 0.15)  # slips in a first pass that will be checked
ERRORS_REPAIR = (0.75, 0.25)
WAIT_SEEN, WAIT_SEEN_AFTER_REPAIR = 0.25, 0.5  # how often the loss sees "Wait" rather than masks it
FALSE_ALARM = 0.08
TWO_TURNS = 0.2  # up to here samples have an earlier turn
RESULT_WEIGHT = 3.0  # of the computed digits, which are few and hard


@dataclass
class Trace:
    """Thinking under construction."""

    problem: ar.Problem
    rng: random.Random
    pieces: list[Piece] = field(default_factory=list)
    values: list[int] = field(default_factory=list)  # latest value after each step
    check_weight: float = 1.0  # of what a check line looks up and concludes

    def add(self, text: str, weight: float = 1.0, label: int = -1) -> None:
        """Append a piece."""
        self.pieces.append((text, weight, label))

    def before(self, index: int) -> int:
        """The latest value that step `index` starts from."""
        return self.values[index - 1] if index else self.problem.start

    def number(self, value: int, right: bool = True, weight: float = 1.0) -> None:
        """Append a fixed-width number; wrong ones are hidden from the loss."""
        self.add(f"{value:03d}", weight if right else 0.0)

    def plan(self, plan: ar.Problem) -> None:
        """Restate the problem, which may have been misread as `plan`."""
        self.add("Plan: ")
        self.number(plan.start, plan.start == self.problem.start)
        for i, (step, true) in enumerate(zip(plan.steps, self.problem.steps, strict=True)):
            self.add(f", {ar.LABELS[i]}")
            self.add(f" {step.op} ", float(step.op == true.op))
            self.number(step.operand, step.operand == true.operand)
        self.add("\n")

    def forward_line(self, index: int, plan: ar.Problem, slip: str | None) -> None:
        """Append the line of one step, with a slip of the given kind."""
        rng, step, true = self.rng, plan.steps[index], self.problem.steps[index]
        before = self.before(index)
        a, op, b = before, step.op, step.operand
        if slip == "a":
            a = perturb(a, rng)
        elif slip == "b":
            b = perturb(b, rng)
        elif slip == "op":
            op = rng.choice([o for o in ar.OPS if o != op])
        exact = ar.apply(op, a, b)
        c = exact if exact is not None else wrap(op, a, b)
        if slip == "c":
            c = perturb(c, rng)
        self.add(f"{ar.LABELS[index]}: ")
        self.number(a, a == before)
        # What follows a misread plan is consistent with it, so the loss may see it.
        self.add(f" {op} ", float(op == step.op))
        self.number(b, b == step.operand)
        self.add(" = ")
        self.number(c, c == exact, RESULT_WEIGHT)
        right = (a, op, b, c) == (before, true.op, true.operand, exact)
        self.add("\n", 1.0, int(right))
        self.values[index:] = [c]

    def chain(self, first: int, plan: ar.Problem, num_slips: int) -> None:
        """Append the forward lines from step `first` on."""
        steps = range(first, len(self.problem.steps))
        slips = set(self.rng.sample(steps, min(num_slips, len(steps))))
        for i in steps:
            kind = self.rng.choices(("c", "b", "a", "op"), (0.6, 0.2, 0.12, 0.08))[0]
            self.forward_line(i, plan, kind if i in slips else None)

    def check_round(self, *, wait_weight: float, slips: int) -> bool:
        """Append one check round; the first failing check starts a repair. True if it repaired."""
        self.add("Wait", wait_weight)
        self.add(WAIT_LINE.removeprefix("Wait") + "\n")
        for i, step in enumerate(self.problem.steps):
            (head, shown, before, verdict), ok = check_parts(
                i, self.values[i], step, self.before(i)
            )
            false_alarm = ok and self.rng.random() < FALSE_ALARM
            if false_alarm:
                shown, verdict = f"{perturb(self.before(i), self.rng):03d}", "no"
            self.add(head[:3])
            self.add(head[3:6], self.check_weight)
            self.add(head[6:9], self.check_weight)
            self.add(head[9:])
            self.add(shown, 0.0 if false_alarm else self.check_weight)
            self.add(", ")
            self.add(before, self.check_weight)
            self.add(f" {verdict}", self.check_weight)
            self.add("\n", 1.0, int(ok))
            if verdict == "no":
                self.chain(i, self.problem, slips)
                return True
        return False

    def check_rounds(self, rounds: int) -> None:
        """Append check rounds; slips only go where a later round can find them."""
        repaired = False
        for left in range(rounds, 0, -1):
            seen = WAIT_SEEN_AFTER_REPAIR if repaired else WAIT_SEEN
            weight = float(self.rng.random() < seen)
            slips = draw(ERRORS_REPAIR, self.rng) if left > 1 else 0
            repaired = self.check_round(wait_weight=weight, slips=slips)


def check_parts(
    index: int, value: int, step: ar.Step, before: int
) -> tuple[tuple[str, str, str, str], bool]:
    """A check line up to its result, what it shows, the value before, its verdict; whether the step is right."""
    line, ok = ar.check_line(index, value, step.op, step.operand, before=before)
    head, equals, tail = line.rpartition(" = ")
    shown, start, verdict = tail.replace(",", "").split(" ")
    return (head + equals, shown, start, verdict), ok


def draw(shares: Sequence[float], rng: random.Random) -> int:
    """An index with the given probabilities."""
    return rng.choices(range(len(shares)), shares)[0]


def wrap(op: ar.Op, a: int, b: int) -> int:
    """Three digits for a result that is out of range or not whole."""
    if op == "/":
        return a // b if b else 0
    return (a + b if op == "+" else a - b if op == "-" else a * b) % 1000


def perturb(value: int, rng: random.Random) -> int:
    """A plausible misreading: one digit off, a near miss, swapped digits, or anything."""
    while True:
        kind = rng.random()
        if kind < 0.5:
            place = 10 ** rng.randrange(3)
            new = value + place * (rng.randrange(10) - value // place % 10)
        elif kind < 0.85:
            new = value + rng.choice((-1, 1)) * rng.choice((1, 1, 2, 3, 9, 10, 10, 20, 100))
        elif kind < 0.93:
            digits = list(f"{value:03d}")
            i = rng.randrange(2)
            digits[i], digits[i + 1] = digits[i + 1], digits[i]
            new = int("".join(digits))
        else:
            new = rng.randrange(1000)
        if new != value and 0 <= new <= ar.MAX_VALUE:
            return new


def misread(problem: ar.Problem, rng: random.Random) -> ar.Problem:
    """The problem with one number or operation misread."""
    at = rng.randrange(len(problem.steps) + 1)
    if at == len(problem.steps):
        return ar.Problem(perturb(problem.start, rng), problem.steps)
    step = problem.steps[at]
    if rng.random() < 0.2:
        step = ar.Step(rng.choice([op for op in ar.OPS if op != step.op]), step.operand)
    else:
        step = ar.Step(step.op, perturb(step.operand, rng))
    return ar.Problem(problem.start, (*problem.steps[:at], step, *problem.steps[at + 1 :]))


def train_problem(rng: random.Random, max_steps: int, *, start: int | None = None) -> ar.Problem:
    """A problem that is not held out; 9 and 10 steps are rare."""
    while True:
        steps = rng.randint(1, max_steps)
        if max_steps >= 8 and rng.random() < 0.04:
            steps = rng.randint(9, len(ar.LABELS))
        problem = ar.generate_problem(rng, steps, start=start)
        if not ar.is_held_out(problem):
            return problem


def prompt(content: str, rng: random.Random, *, history: str = "") -> str:
    """Everything before the thinking, as the chat template renders it."""
    system = rng.choice(SYSTEM_PROMPTS) if not history and rng.random() < 0.04 else ""
    return f"{history or BOS}{system}{USER}{content}{ASSISTANT}{THINK}\n"


def answer_turn(answer: int) -> str:
    """The answer after the thinking."""
    return f"The answer is {answer}."


def two_turns(rng: random.Random, max_steps: int) -> tuple[str, ar.Problem]:
    """A prompt with an earlier turn, and the problem that its last turn poses."""
    earlier = train_problem(rng, min(max_steps, 4))
    history = prompt(ar.word_problem(earlier, rng), rng).removesuffix(f"{THINK}\n")
    history += answer_turn(earlier.answer) + EOS
    if rng.random() < 0.5:
        problem = train_problem(rng, min(max_steps, 4), start=earlier.answer)
        return prompt(ar.follow_up(problem, rng), rng, history=history), problem
    problem = train_problem(rng, max_steps)
    return prompt(ar.word_problem(problem, rng), rng, history=history), problem


def no_task(rng: random.Random) -> list[Piece]:
    """Something else than a problem, answered honestly."""
    kind = rng.random()
    if kind < 0.15:
        problem = train_problem(rng, 4)
        text = ar.word_problem(problem, rng).replace(
            f" {problem.start}", f" {rng.randint(1000, 99999)}", 1
        )
        thought, answer = OUT_OF_RANGE_THOUGHT, OUT_OF_RANGE_ANSWER
    else:
        if kind < 0.6:
            text = rng.choice(GREETINGS)
        elif kind < 0.85:
            letters = "abcdefghijklmnopqrstuvwxyz"
            words = [
                "".join(rng.choices(letters, k=rng.randint(1, 8))) for _ in range(rng.randint(1, 6))
            ]
            text = " ".join(words) + rng.choice(("", ".", "?", "!"))
            text = text.capitalize() if rng.random() < 0.5 else text
        else:
            text = "".join(
                chr(rng.choice((rng.randint(32, 126), rng.randint(160, 0x3000)))) for _ in range(8)
            )
        thought, answer = rng.choice(NO_TASK_THOUGHTS), rng.choice(NO_TASK_ANSWERS)
    pieces: list[Piece] = [(prompt(text, rng), 0.0, -1), (thought + "\n", 1.0, -1)]
    return [*pieces, (f"{END_THINK}\n\n{answer}{EOS}", 1.0, -1)]


def drill(rng: random.Random, lines: int = 10) -> list[Piece]:
    """Unrelated step lines, for learning to calculate early on; only the results count."""
    pieces: list[Piece] = [(prompt("", rng), 0.0, -1)]
    for i in range(lines):
        problem = train_problem(rng, 1)
        step = problem.steps[0]
        line = ar.step_line(i, problem.start, step.op, step.operand, problem.answer)
        pieces += [(line[:3], 0.0, -1), (line[3:6], 0.0, -1), (line[6:9], 0.0, -1)]
        pieces += [
            (line[9:12], 0.0, -1),
            (line[12:15], 0.0, -1),
            (line[15:], 1.0, -1),
            ("\n", 0.0, -1),
        ]
    return pieces


def verdict_drill(rng: random.Random, lines: int = 10) -> list[Piece]:
    """Unrelated check lines, half of which fail: dense practice in comparing two numbers."""
    trace = Trace(train_problem(rng, 1), rng)
    trace.add(prompt("", rng), 0.0)
    for i in range(lines):
        problem = train_problem(rng, 1)
        step, value = problem.steps[0], problem.answer
        if rng.random() < 0.5:
            value = perturb(value, rng)
        (head, shown, before, verdict), ok = check_parts(i, value, step, problem.start)
        trace.add(head, 0.0)
        trace.add(shown)
        trace.add(f", {before}", 0.0)
        trace.add(f" {verdict}", 2.0)
        trace.add("\n", 0.0, int(ok))
    return trace.pieces


def comparison_drill(rng: random.Random, lines: int = 24) -> list[Piece]:
    """Only the ends of check lines: two numbers and whether they are equal."""
    trace = Trace(train_problem(rng, 1), rng)
    trace.add(prompt("", rng), 0.0)
    for _ in range(lines):
        before = rng.randrange(ar.MAX_VALUE + 1)
        ok = rng.random() < 0.5
        shown = before if ok else perturb(before, rng)
        trace.add(f" = {shown:03d}, {before:03d}", 0.0)
        trace.add(" ok" if ok else " no", 1.0)
        trace.add("\n", 0.0, int(ok))
    return trace.pieces


def sample(rng: random.Random, max_steps: int, *, check_weight: float = 1.0) -> list[Piece]:
    """One training sample."""
    kind = rng.random()
    if kind < 0.03:
        return no_task(rng)
    if kind < TWO_TURNS:
        text, problem = two_turns(rng, max_steps)
    else:
        problem = train_problem(rng, max_steps)
        text = prompt(ar.word_problem(problem, rng), rng)
    trace = Trace(problem, rng, check_weight=check_weight)
    trace.add(text, 0.0)
    if kind > 0.985:  # no thinking: an honest guess, mostly right for one step only
        trace.add(f"{END_THINK}\n\n", 0.0)
        trace.add(answer_turn(problem.answer) + EOS)
        return trace.pieces
    rounds = draw(ROUNDS, rng)
    slips = draw(ERRORS_FIRST, rng) if rounds else 0
    plan = problem
    if slips and rng.random() < 0.15:
        plan, slips = misread(problem, rng), slips - 1
    trace.plan(plan)
    trace.chain(0, plan, slips)
    trace.check_rounds(rounds)
    finish(trace)
    return trace.pieces


def finish(trace: Trace) -> None:
    """End the thinking and answer with the last value."""
    trace.add(f"{END_THINK}\n\n{answer_turn(trace.values[-1])}{EOS}")


def recheck(
    prompt_text: str,
    problem: ar.Problem,
    thinking: str,
    rng: random.Random,
    *,
    check_weight: float = 1.0,
) -> list[Piece] | None:
    """A sampled first pass of the model, continued with check rounds; None if it is malformed.

    This shows the checks exactly the slips that the model makes.
    """
    lines = thinking.removesuffix("\n").split("\n")
    labels = ar.check_steps(thinking, problem)
    expected = [f"{ar.LABELS[i]}" for i in range(len(problem.steps))]
    plan = ar.parse_plan(lines[0])
    if plan is None or len(lines) != len(expected) + 1 or [x.label for x in labels] != expected:
        return None
    if any(len(line) != 18 or line[1] != ":" or not line[-3:].isdigit() for line in lines[1:]):
        return None
    trace = Trace(problem, rng, check_weight=check_weight)
    trace.add(prompt_text, 0.0)
    right = all(x.correct for x in labels)
    weight = 1.0 if right and plan == problem else 0.0
    trace.add(lines[0] + "\n", weight)
    for line, label in zip(lines[1:], labels, strict=True):
        trace.add(line, weight)
        trace.add("\n", weight, int(label.correct))
        trace.values.append(int(line[-3:]))
    if right:
        trace.check_rounds(draw((0.4, 0.4, 0.1, 0.1), rng))
    else:
        trace.check_rounds(draw((0.0, 0.7, 0.2, 0.1), rng))
    finish(trace)
    return trace.pieces


class Encoder:
    """Pieces to token ids; pieces end at token boundaries, so each is encoded once and kept."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.cache: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        """Token ids of one piece."""
        if len(text) > 20:
            return self.tokenizer.encode(text).ids
        if text not in self.cache:
            self.cache[text] = self.tokenizer.encode(text).ids
        return self.cache[text]

    def encode(self, pieces: Sequence[Piece]) -> tuple[list[int], list[float], list[int]]:
        """Token ids, loss weight of each token as a target, and step labels."""
        ids: list[int] = []
        weights: list[float] = []
        labels: list[int] = []
        for text, weight, label in pieces:
            new = self.ids(text)
            ids += new
            weights += [weight] * len(new)
            labels += [-1] * (len(new) - 1) + [label]
        return ids, weights, labels
