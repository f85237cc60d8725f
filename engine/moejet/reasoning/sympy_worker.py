"""Runs in the sandbox: says whether two expression trees are equal for all real values of their symbols.

One request per line on stdin, a JSON pair of trees as moejet.reasoning.equality writes them; one line per answer:
`1` equal, `0` not, `?` undecided. Trees become sympy objects through constructors; sympy never parses text.
"""

import json
import sys
from typing import Any

import sympy


def build(tree: list[Any]) -> Any:
    kind, *rest = tree
    if kind == "num":
        return sympy.Rational(int(rest[0]), int(rest[1]))
    if kind == "sym":
        return sympy.Symbol("v_" + str(rest[0]), real=True)
    if kind == "const":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I}[rest[0]]
    if kind == "fn":
        return FUNCTIONS[rest[0]](*map(build, rest[1:]))
    parts = [build(part) for part in rest]
    if kind == "add":
        return sympy.Add(*parts)
    if kind == "mul":
        return sympy.Mul(*parts)
    if kind == "pow":
        base, exponent = parts
        odd_root = exponent.is_Rational and exponent.q > 1 and exponent.q % 2 == 1
        if odd_root and base.is_negative:  # real, as in school
            return (-1) ** exponent.p * (-base) ** exponent
        return sympy.Pow(base, exponent)
    raise ValueError(kind)


FUNCTIONS = {
    "sin": sympy.sin, "cos": sympy.cos, "tan": sympy.tan, "cot": sympy.cot, "sec": sympy.sec, "csc": sympy.csc,
    "arcsin": sympy.asin, "arccos": sympy.acos, "arctan": sympy.atan, "sinh": sympy.sinh, "cosh": sympy.cosh,
    "tanh": sympy.tanh, "ln": sympy.log, "exp": sympy.exp, "abs": sympy.Abs, "floor": sympy.floor,
    "ceil": sympy.ceiling, "factorial": sympy.factorial, "binom": sympy.binomial,
}  # fmt: skip


def verdict(first: list[Any], second: list[Any]) -> str:
    difference = build(first) - build(second)
    if difference.is_zero is not None:
        return "1" if difference.is_zero else "0"
    if sympy.expand(difference) == 0 or sympy.simplify(difference) == 0:
        return "1"
    answer = difference.equals(0)
    return "?" if answer is None else "1" if answer else "0"


def answer(line: str) -> str:
    if line.strip() == "ready?":
        return "ready"
    try:
        return verdict(*json.loads(line))
    except MemoryError:
        raise
    except Exception:  # whatever sympy trips over is no verdict
        return "?"


def main() -> None:
    for line in sys.stdin:
        sys.stdout.write(answer(line) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
