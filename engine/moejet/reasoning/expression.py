"""Reads a mathematical expression, LaTeX or plain, into a small tree.

An own reader for the forms that answers take: everything it does not know is an error, and no text is ever handed to
`eval` or to another parser. Trees consist of

    num Fraction · sym name · const pi|e|i|inf · add · mul · pow base exponent · fn name arguments
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

MAX_CHARACTERS, MAX_TOKENS, MAX_DEPTH = 2000, 600, 30


class ExpressionError(ValueError):
    """The text is none of the forms that this reader knows."""


@dataclass(frozen=True, slots=True)
class Node:
    kind: str
    name: str = ""
    number: Fraction = Fraction(0)
    parts: tuple[Node, ...] = ()


def num(value: int | Fraction) -> Node:
    return Node("num", number=Fraction(value))


def fn(name: str, *parts: Node) -> Node:
    return Node("fn", name, parts=parts)


def add(*parts: Node) -> Node:
    return Node("add", parts=parts)


def mul(*parts: Node) -> Node:
    return Node("mul", parts=parts)


def power(base: Node, exponent: Node) -> Node:
    return Node("pow", parts=(base, exponent))


def negative(part: Node) -> Node:
    return num(-part.number) if part.kind == "num" else mul(num(-1), part)


CONSTANTS = {
    "pi": "pi",
    "e": "e",
    "i": "i",
    "infty": "inf",
    "infinity": "inf",
    "inf": "inf",
    "oo": "inf",
}
_TRIGONOMETRIC = "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh"
FUNCTIONS = frozenset(f"{_TRIGONOMETRIC} ln log exp sqrt abs floor ceil".split())
ALIASES = {"asin": "arcsin", "acos": "arccos", "atan": "arctan", "lg": "log"}
INVERSES = {"sin": "arcsin", "cos": "arccos", "tan": "arctan"}
_GREEK = """alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta kappa lambda mu nu xi rho sigma tau phi
varphi chi psi omega Gamma Delta Theta Lambda Sigma Phi Psi Omega ell"""
GREEK = frozenset(_GREEK.split())
_IGNORED = r"\left \right \, \; \! \: \  \quad \qquad \displaystyle \limits \big \Big \bigl \bigr"
IGNORED = frozenset([*_IGNORED.split(), "\\ "])
OPERATORS = {
    "\\cdot": "*",
    "\\times": "*",
    "\\ast": "*",
    "\\div": "/",
    "**": "^",
    "\\lvert": "|",
    "\\rvert": "|",
}
CLOSING = {"(": ")", "[": "]", "{": "}", "\\{": "\\}", "\\lfloor": "\\rfloor", "\\lceil": "\\rceil"}

_TOKEN = re.compile(
    r"(?P<number>(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d+)?)|(?P<command>\\(?:[a-zA-Z]+|.))|(?P<power>\*\*)"
    r"|(?P<word>[a-zA-Z]+)|(?P<symbol>[-+*/^_()\[\]{}|!'])|(?P<space>\s+)"
)
_NUMERIC = "0123456789."
_WRAPPERS = frozenset(["\\mathrm", "\\text", "\\operatorname", "\\mathbf", "\\mathit", "\\textrm"])


def parse(text: str) -> Node:
    """The tree of one scalar expression; raises ExpressionError for anything else."""
    if len(text) > MAX_CHARACTERS:
        raise ExpressionError(f"longer than {MAX_CHARACTERS} characters")
    reader = _Reader(_tokens(text))
    node = reader.sum()
    if reader.at < len(reader.tokens):
        raise ExpressionError(f"unexpected {reader.tokens[reader.at]!r}")
    return node


def _tokens(text: str) -> list[str]:
    tokens: list[str] = []
    at = 0
    while at < len(text):
        match = _TOKEN.match(text, at)
        if match is None:
            raise ExpressionError(f"unexpected {text[at]!r}")
        at = match.end()
        token = match.group()
        if match.lastgroup == "space" or token in IGNORED or token in _WRAPPERS:
            continue
        if match.lastgroup == "word":
            tokens += _split_word(token)
        elif token in ("\\dfrac", "\\tfrac", "\\cfrac"):
            tokens.append("\\frac")
        else:
            tokens.append(OPERATORS.get(token, token))
    if len(tokens) > MAX_TOKENS:
        raise ExpressionError(f"more than {MAX_TOKENS} symbols")
    return tokens


def _split_word(word: str) -> list[str]:
    """`xy` is x times y, `sinx` is sin x; names of functions and constants become commands."""
    pieces = []
    while word:
        known = (*FUNCTIONS, *ALIASES, "pi", "infinity", "infty", "oo", "sqrt", "theta")
        found = max((k for k in known if word.startswith(k)), key=len, default="")
        pieces.append("\\" + found if found else word[0])
        word = word[len(found) or 1 :]
    return pieces


class _Reader:
    """Recursive descent: sum > product > unary > power > postfix > atom."""

    def __init__(self, tokens: list[str]):
        self.tokens = tokens
        self.at = 0
        self.depth = 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, wanted: str | None = None) -> str:
        token = self.peek()
        if not token or (wanted is not None and token != wanted):
            raise ExpressionError(f"expected {wanted or 'more'}, found {token or 'the end'}")
        self.at += 1
        return token

    @contextlib.contextmanager
    def deeper(self) -> Iterator[None]:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise ExpressionError(f"nested deeper than {MAX_DEPTH}")
        yield
        self.depth -= 1

    def sum(self) -> Node:
        parts = [self.product()]
        while self.peek() in ("+", "-"):
            sign = self.take()
            part = self.product()
            parts.append(part if sign == "+" else negative(part))
        return parts[0] if len(parts) == 1 else add(*parts)

    def product(self) -> Node:
        factors = [self.unary()]
        while True:
            token = self.peek()
            if token == "*":
                self.take()
                factors.append(self.unary())
            elif token == "/":
                self.take()
                factors.append(power(self.unary(), num(-1)))
            elif self.starts_factor(token):
                self.juxtapose(factors)
            else:
                return factors[0] if len(factors) == 1 else mul(*factors)

    def juxtapose(self, factors: list[Node]) -> None:
        """One more factor without a sign; a whole number before a proper fraction is a mixed number."""
        start, left = self.at, factors[-1]
        right = self.power()
        if (
            left.kind == "num"
            and left.number.denominator == 1
            and self.tokens[start] == "\\frac"
            and right.kind == "num"
            and 0 < right.number < 1
            and self.tokens[start - 1].isdigit()
        ):
            whole = left.number
            factors[-1] = num(whole + right.number if whole >= 0 else whole - right.number)
            return
        if self.tokens[start][0] in _NUMERIC and self.tokens[start - 1][-1] in _NUMERIC:
            raise ExpressionError("two numbers side by side")
        factors.append(right)

    def starts_factor(self, token: str) -> bool:
        return bool(token) and (
            token[0].isalnum()
            or token in ("(", "[", "{", "\\{", "\\lfloor", "\\lceil")
            or (token[0] == "\\" and token[1:].isalpha() and token not in CLOSING.values())
            or token[0] == "."
        )

    def unary(self) -> Node:
        sign = 1
        while self.peek() in ("+", "-"):
            sign = -sign if self.take() == "-" else sign
        part = self.power()
        return negative(part) if sign < 0 else part

    def power(self) -> Node:
        base = self.postfix()
        if self.peek() != "^":
            return base
        self.take()
        return power(base, self.exponent())

    def exponent(self) -> Node:
        with self.deeper():
            return self.group() if self.peek() == "{" else self.unary()

    def postfix(self) -> Node:
        node = self.atom()
        if self.peek() == "!":
            self.take()
            node = fn("factorial", node)
        return node

    def group(self) -> Node:
        opening = self.take()
        node = self.sum()
        self.take(CLOSING[opening])
        return node

    def argument(self, *, digits: bool = False) -> Node:
        """What follows a command: a group, or one token (with `digits`, of a number only its first digit)."""
        if self.peek() == "{":
            return self.group()
        token = self.peek()
        if digits and token.isdigit() and len(token) > 1:
            self.tokens[self.at : self.at + 1] = [token[0], token[1:]]
        return self.atom()

    def atom(self) -> Node:
        with self.deeper():
            return self._atom()

    def _atom(self) -> Node:
        token = self.peek()
        if token in ("(", "[", "{"):
            return self.group()
        if token in ("\\lfloor", "\\lceil"):
            return fn("floor" if token == "\\lfloor" else "ceil", self.group())
        self.take()
        if token == "|":
            inside = self.sum()
            self.take("|")
            return fn("abs", inside)
        if token[0].isdigit() or token[0] == ".":
            if len(token) > 400 or abs(int((re.findall(r"[eE](.*)", token) or ["0"])[0])) > 400:
                raise ExpressionError("a number of unusual size")
            return num(Fraction(token))
        if token[0] == "\\":
            return self.command(token[1:])
        if token.isalpha():
            return self.symbol(token)
        raise ExpressionError(f"unexpected {token!r}")

    def symbol(self, name: str) -> Node:
        if self.peek() == "_":
            self.take()
            name += "_" + self.subscript()
        while self.peek() == "'":
            name += self.take()
        if name in ("e", "i"):
            return Node("const", name)
        return Node("sym", name)

    def subscript(self) -> str:
        if self.peek() != "{":
            return self.take()
        self.take()
        inside = []
        while self.peek() != "}":
            inside.append(self.take())
        self.take()
        return "".join(inside)

    def command(self, name: str) -> Node:
        name = ALIASES.get(name, name)
        if name in CONSTANTS:
            return Node("const", CONSTANTS[name])
        if name in GREEK:
            return self.symbol(name)
        if name == "frac":
            above, below = self.argument(digits=True), self.argument(digits=True)
            if above.kind == below.kind == "num" and below.number != 0:
                return num(above.number / below.number)
            return mul(above, power(below, num(-1)))
        if name in ("binom", "dbinom", "tbinom"):
            return fn("binom", self.argument(digits=True), self.argument(digits=True))
        if name == "sqrt":
            return self.root()
        if name in FUNCTIONS:
            return self.function(name)
        raise ExpressionError(f"unknown command \\{name}")

    def root(self) -> Node:
        if self.peek() == "[":
            self.take()
            degree = self.sum()
            self.take("]")
            return power(self.argument(), power(degree, num(-1)))
        return power(self.group() if self.peek() == "(" else self.argument(), num(Fraction(1, 2)))

    def function(self, name: str) -> Node:
        base = exponent = None
        if self.peek() == "_":
            self.take()
            base = self.argument()
        if self.peek() == "^":
            self.take()
            exponent = self.exponent()
        if exponent == num(-1) and name in INVERSES:
            name, exponent = INVERSES[name], None
        if self.peek() in ("(", "{", "["):
            argument = self.power() if self.peek() == "{" else self.group()
        else:
            factors = [self.power()]  # \sin 2x: what follows, up to a sign or another function
            while self.starts_factor(self.peek()) and self.peek()[1:] not in FUNCTIONS:
                self.juxtapose(factors)
            argument = factors[0] if len(factors) == 1 else mul(*factors)
        if name == "log" and base is not None:
            node = mul(fn("ln", argument), power(fn("ln", base), num(-1)))
        elif base is not None:
            raise ExpressionError(f"subscript of {name}")
        else:
            node = fn("ln" if name == "log" else name, argument)
        return node if exponent is None else power(node, exponent)
