"""Equality of answers, keys for counting votes, and groups of equal answers.

Structures are compared part by part: pairs and intervals in order and with their brackets, lists and sets without
order. Two expressions are compared by value at a few points first, exactly where that is possible: a difference there
is final, agreement of exact constants too; any other agreement has to be confirmed by sympy.

A unit or a name that only one of two answers states does not make them different: `5 cm` = 5 and `x = 5` = 5, but
`5 cm` is not `5 m` and `x = 5` not `y = 5`. A percentage equals both its number and its value. So equality is not
transitive; `group` puts answers together only if each equals every other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from moejet.reasoning.answer_form import Answer, Form, read_answer
from moejet.reasoning.evaluation import Evaluation, Value, as_complex, sample_point, symbols
from moejet.reasoning.expression import ExpressionError, Node, mul, num
from moejet.reasoning.symbolic import shared_process
from moejet.validation import require_number

POINTS = 4
TOLERANCE = 1e-9  # relative to the largest intermediate value; a larger difference is a difference
Scalars = Callable[[Node, Node], bool]


@dataclass(frozen=True, slots=True)
class SympyEqual:
    """Whether two answers are equal; what sympy cannot show within `timeout` seconds counts as not equal."""

    timeout: float = 2.0

    def __post_init__(self) -> None:
        require_number("timeout", self.timeout, above=0, high=600, hint="seconds")

    def __call__(self, first: str, second: str) -> bool:
        return same_answer(read_answer(first), read_answer(second), self._scalars)

    def _scalars(self, first: Node, second: Node) -> bool:
        verdict = numeric_verdict(first, second)
        if verdict is None:
            return shared_process().equal(first, second, timeout_s=self.timeout) is True
        return verdict


@dataclass(frozen=True, slots=True)
class NumericEqual:
    """The same without sympy: agreement at the sample points is taken for equality."""

    def __call__(self, first: str, second: str) -> bool:
        return same_answer(read_answer(first), read_answer(second), _agree)


def _agree(first: Node, second: Node) -> bool:
    return numeric_verdict(first, second) is not False


def numeric_verdict(first: Node, second: Node) -> bool | None:
    """True: shown equal. False: shown different. None: they agree as far as floating point can tell."""
    names = symbols(first) | symbols(second)
    exact, seen = not names, False
    for index in range(POINTS if names else 1):
        point = sample_point(names, index)
        one, two = Evaluation(point), Evaluation(point)
        try:
            a, b = one.value(first), two.value(second)
        except ExpressionError:
            continue
        seen = True
        if isinstance(a, Fraction) and isinstance(b, Fraction):
            if a != b:
                return False
            continue
        exact = False
        scale = max(one.magnitude, two.magnitude)
        difference = abs(
            complex(float(a) if isinstance(a, Fraction) else a)
            - (float(b) if isinstance(b, Fraction) else b)
        )
        if difference > TOLERANCE * scale and math.isfinite(scale):
            return False
    if not seen:  # no values: nothing to go by, and nothing for sympy to spend its time on
        return first == second
    return True if exact or first == second else None


def same_answer(first: Answer, second: Answer, scalars: Scalars) -> bool:
    if first.clean == second.clean:
        return True
    if first.label and second.label and first.label != second.label:
        return _same_equation(first, second, scalars)
    if first.unit != second.unit:
        return _same_with_units(first, second, scalars)
    return same_form(first.form, second.form, scalars) or _same_equation(first, second, scalars)


def _same_with_units(first: Answer, second: Answer, scalars: Scalars) -> bool:
    if first.unit and second.unit:
        return False
    if same_form(first.form, second.form, scalars):
        return True
    given = first if first.unit else second
    if given.unit != "%":
        return False
    other = second if given is first else first
    return same_form(_hundredth(given.form), other.form, scalars)


def _hundredth(form: Form) -> Form:
    if form.kind == "scalar" and form.node is not None:
        return replace(form, node=mul(num(Fraction(1, 100)), form.node))
    return replace(form, parts=tuple(map(_hundredth, form.parts)))


def _same_equation(first: Answer, second: Answer, scalars: Scalars) -> bool:
    """Two equations are the same if their differences of sides are multiples of each other."""
    if first.equation is None or second.equation is None:
        return False
    names = symbols(first.equation) | symbols(second.equation)
    for index in range(POINTS):
        point = sample_point(names, index)
        try:
            ratio = (
                Evaluation(point).value(first.equation),
                Evaluation(point).value(second.equation),
            )
        except ExpressionError:
            continue
        if all(isinstance(value, Fraction) and value for value in ratio):
            factor = Fraction(ratio[0]) / Fraction(ratio[1])  # type: ignore[arg-type]
            return scalars(first.equation, mul(num(factor), second.equation))
    return False


def same_form(first: Form, second: Form, scalars: Scalars) -> bool:
    a, b = first.kind, second.kind
    if a == b == "scalar":
        assert first.node is not None
        assert second.node is not None
        return scalars(first.node, second.node)
    unordered = ("list", "set", "union")
    if a in unordered and b in unordered and (a == b or "union" not in (a, b)):
        return _same_members(first.parts, second.parts, scalars)
    if a != b or first.text != second.text or len(first.parts) != len(second.parts):
        return False
    if a == "relation":  # an equation is compared elsewhere
        return bool(first.parts) and _all_same(first.parts, second.parts, scalars)
    return _all_same(first.parts, second.parts, scalars)


def _all_same(first: Sequence[Form], second: Sequence[Form], scalars: Scalars) -> bool:
    return all(same_form(a, b, scalars) for a, b in zip(first, second, strict=True))


def _same_members(first: Sequence[Form], second: Sequence[Form], scalars: Scalars) -> bool:
    """Equal as sets: members may repeat."""
    return all(
        any(same_form(a, b, scalars) for b in others)
        for members, others in ((first, second), (second, first))
        for a in members
    )


# --- keys and groups -----------------------------------------------------------------------------


def key(answer: str) -> str:
    """A text that is the same for equal answers of the common kinds; it leaves out unit and name.

    Costs a fraction of a millisecond, so that votes can be counted while samples arrive. Whether sympy would find two
    keys equal stays open; `group` asks it.
    """
    read = read_answer(answer)
    if read.equation is not None and not read.label:
        return f"equation {_equation_key(read.equation)}"
    return _form_key(read.form)


def _form_key(form: Form) -> str:
    if form.kind == "scalar":
        assert form.node is not None
        return _node_key(form.node)
    if form.kind in ("text", "infinite"):
        return f"{form.kind} {form.text}"
    parts = [_form_key(part) for part in form.parts]
    if form.kind in ("set", "list", "union"):
        kind = "union" if form.kind == "union" else "set"
        return f"{kind}{{{'; '.join(sorted(set(parts)))}}}"
    return f"{form.kind}{form.text}<{'; '.join(parts)}>"


def _node_key(node: Node) -> str:
    names = symbols(node)
    if not names:
        try:
            return _value_key(Evaluation().value(node))
        except ExpressionError:
            return f"tree {node}"
    try:  # both points are positive
        values = [Evaluation(sample_point(names, index)).value(node) for index in range(2)]
    except ExpressionError:
        return f"tree {node}"
    first, second = map(_rounded, values)
    return _value_key(values[0]) if first == second else f"f {first} {second}"


def _equation_key(node: Node) -> str:
    """Scaled so that multiples of an equation agree."""
    names = symbols(node)
    try:
        first, second = (complex(Evaluation(sample_point(names, i)).value(node)) for i in range(2))
        return _rounded(first / second)
    except (ExpressionError, ZeroDivisionError):
        return f"tree {node}"


def _value_key(value: Value) -> str:
    if isinstance(value, Fraction):
        return str(value)
    near = Fraction(value.real).limit_denominator(1000)
    if abs(value.imag) < 1e-12 and abs(value.real - near) <= 1e-12 * max(1.0, abs(value.real)):
        return str(near)  # e.g. log_2 8, which floating point misses by a last digit
    return _rounded(value)


def _rounded(value: Value) -> str:
    value = as_complex(value)
    size = abs(value)
    real, imaginary = (0.0 if abs(x) < 1e-11 * size else x for x in (value.real, value.imag))
    return f"{real:.9e}" + (f"{imaginary:+.9e}i" if imaginary else "")


@dataclass(slots=True)
class _Bucket:
    """Answers that agree in all that `key` looks at, and in unit and name: equal without asking."""

    text: str
    members: list[int] = field(default_factory=list)


def group(
    answers: Sequence[str | None], equal: Callable[[str, str], bool] | None = None
) -> list[list[int]]:
    """Indices of answers in groups of equals, largest first (ties by first appearance); None belongs to no group.

    Asks `equal` (SympyEqual() unless given) about pairs of different keys only. An answer joins the largest group
    all of whose members it equals.
    """
    equal = equal or SympyEqual()
    buckets: dict[tuple[str, str, str], _Bucket] = {}
    for index, answer in enumerate(answers):
        if answer is not None:
            read = read_answer(answer)
            name = (key(answer), read.unit, read.label)
            buckets.setdefault(name, _Bucket(answer)).members.append(index)
    groups: list[list[_Bucket]] = []
    for bucket in sorted(buckets.values(), key=lambda b: (-len(b.members), b.members[0])):
        fitting = [g for g in groups if all(equal(bucket.text, other.text) for other in g)]
        if fitting:
            max(fitting, key=lambda g: sum(len(b.members) for b in g)).append(bucket)
        else:
            groups.append([bucket])
    merged = [sorted(i for bucket in g for i in bucket.members) for g in groups]
    return sorted(merged, key=lambda indices: (-len(indices), indices[0]))
