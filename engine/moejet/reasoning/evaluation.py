"""Values of expression trees: exact (Fraction) as long as only + - * / and whole powers occur, else complex floats."""

from __future__ import annotations

import cmath
import hashlib
import math
from collections.abc import Callable, Mapping
from fractions import Fraction

from moejet.reasoning.expression import ExpressionError, Node

MAX_POWER_BITS = 8192

Value = Fraction | complex


def symbols(node: Node) -> frozenset[str]:
    if node.kind == "sym":
        return frozenset([node.name])
    return frozenset().union(*map(symbols, node.parts))


def sample_point(names: frozenset[str], index: int) -> dict[str, Fraction]:
    """A real number for every name, the same in every process; the first two points are positive."""
    point = {}
    for name in names:
        digest = hashlib.sha256(f"{index}:{name}".encode()).digest()
        value = Fraction(3 + digest[0] + 256 * digest[1], 7001 + digest[2])
        point[name] = -value if index >= 2 and digest[3] % 2 else value
    return point


class Evaluation:
    """The value of a tree at a point; `magnitude` is the largest intermediate value, which bounds rounding errors."""

    def __init__(self, point: Mapping[str, Fraction] | None = None):
        self.point = point or {}
        self.magnitude = 0.0

    def value(self, node: Node) -> Value:
        """Raises ExpressionError where the tree has no finite value (poles, overflow, unknown functions)."""
        try:
            result = self._value(node)
            huge = isinstance(result, Fraction) and abs(result) >= 10**300
            self.magnitude = max(self.magnitude, math.inf if huge else abs(as_complex(result)))
        except (ArithmeticError, ValueError, KeyError, RecursionError) as error:
            raise ExpressionError(f"no value: {error}") from error
        if isinstance(result, complex) and not cmath.isfinite(result):
            raise ExpressionError("no finite value")
        return result

    def _value(self, node: Node) -> Value:
        kind, parts = node.kind, node.parts
        if kind == "num":
            return node.number
        if kind == "sym":
            return self.point[node.name]
        if kind == "const":
            return {"pi": complex(math.pi), "e": complex(math.e), "i": 1j}[node.name]
        values = [self.value(part) for part in parts]
        if kind == "add":
            return sum(values, Fraction(0)) if _exact(values) else sum(map(as_complex, values), 0j)
        if kind == "mul":
            return (
                math.prod(values, start=Fraction(1))
                if _exact(values)
                else math.prod(map(as_complex, values))
            )
        if kind == "pow":
            return _power(*values)
        return _call(node.name, values)


def _exact(values: list[Value]) -> bool:
    return all(isinstance(value, Fraction) for value in values)


def as_complex(value: Value) -> complex:
    return complex(float(value)) if isinstance(value, Fraction) else value


def _power(base: Value, exponent: Value) -> Value:
    if isinstance(base, Fraction) and isinstance(exponent, Fraction):
        if exponent.denominator == 1:
            size = max(base.numerator.bit_length(), base.denominator.bit_length())
            if size * abs(exponent) > MAX_POWER_BITS:
                raise OverflowError("a power of unusual size")
            return base ** int(exponent)
        if exponent.denominator == 2 and base >= 0:
            above, below = math.isqrt(base.numerator), math.isqrt(base.denominator)
            if above**2 == base.numerator and below**2 == base.denominator:
                return _power(Fraction(above, below), Fraction(exponent.numerator))
        if (
            base < 0 and exponent.denominator % 2 == 1
        ):  # odd roots of negative numbers are real, as in school
            sign = -1 if exponent.numerator % 2 else 1
            return complex(sign * float(-base) ** float(exponent))
    return as_complex(base) ** as_complex(exponent)


def _real(value: Value) -> float:
    value = as_complex(value)
    if abs(value.imag) > 1e-9:
        raise ValueError("not a real number")
    return value.real


def _integer(value: Value) -> int:
    if not isinstance(value, Fraction) or value.denominator != 1 or not 0 <= value <= 500:
        raise ValueError("not a small whole number")
    return int(value)


_COMPLEX: dict[str, Callable[[complex], complex]] = {
    "sin": cmath.sin, "cos": cmath.cos, "tan": cmath.tan, "sinh": cmath.sinh, "cosh": cmath.cosh, "tanh": cmath.tanh,
    "arcsin": cmath.asin, "arccos": cmath.acos, "arctan": cmath.atan, "ln": cmath.log, "exp": cmath.exp,
    "cot": lambda z: 1 / cmath.tan(z), "sec": lambda z: 1 / cmath.cos(z), "csc": lambda z: 1 / cmath.sin(z),
}  # fmt: skip


def _call(name: str, values: list[Value]) -> Value:
    first = values[0]
    if name == "abs":
        return abs(first) if isinstance(first, Fraction) else complex(abs(first))
    if name in ("floor", "ceil"):
        rounded = math.floor if name == "floor" else math.ceil
        return Fraction(rounded(first if isinstance(first, Fraction) else _real(first)))
    if name == "factorial":
        return Fraction(math.factorial(_integer(first)))
    if name == "binom":
        return Fraction(math.comb(_integer(first), _integer(values[1])))
    if name == "ln" and first == 1:
        return Fraction(0)
    return _COMPLEX[name](as_complex(first))
