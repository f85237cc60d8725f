"""Reads the text of an answer into a form that can be compared: a number or expression, or a structure of them.

What is read alike: LaTeX and plain notation, `$` and boxes around, trailing full stops, thousands separators, mixed
numbers, `x = 5` and 5, `5 cm` and 5, inequalities and intervals. A comma separates thousands only where exactly
three digits follow it without a space, outside brackets: 1,234 is a number, (1,234) a pair, `1, 234` two numbers.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, replace

from moejet.reasoning.expression import (
    FUNCTIONS,
    GREEK,
    ExpressionError,
    Node,
    add,
    negative,
    parse,
)

MAX_CHARACTERS = 2000
MAX_DEPTH = 8


@dataclass(frozen=True, slots=True)
class Form:
    """kind scalar (node) · infinite (text + or -) · text · seq (text: its brackets) · set, list, union (no order) ·
    matrix (rows are seqs) · relation (text: operator) · labelled (text: name)."""

    kind: str
    text: str = ""
    node: Node | None = None
    parts: tuple[Form, ...] = ()


@dataclass(frozen=True, slots=True)
class Answer:
    form: Form
    unit: str = ""  # canonical, "" if none was given
    label: str = ""  # the name before an equals sign
    equation: Node | None = None  # left side minus right side
    clean: str = ""


_REPLACED = {
    "−": "-", "–": "-", "×": "*", "·": "*", "⋅": "*", "÷": "/", "π": "\\pi ", "∞": "\\infty ", "√": "\\sqrt ",
    "°": "^\\circ ", "²": "^2", "³": "^3", "½": "\\frac12 ", "¼": "\\frac14 ", "¾": "\\frac34 ", "∪": "\\cup ",
    "±": "\\pm ", "∈": "\\in ", "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "∅": "\\emptyset ", "θ": "\\theta ",
    "\u00a0": " ", "\u202f": " ", "\u2009": " ", "€": "\\text{euros}", "\\leq": "\\le", "\\geq": "\\ge",
    "\\neq": "\\ne", "\\leqslant": "\\le", "\\geqslant": "\\ge", "\\varnothing": "\\emptyset", "\\lbrace": "\\{",
    "\\rbrace": "\\}", "\\lparen": "(", "\\rparen": ")", "\\degree": "^\\circ", "<=": "\\le ", ">=": "\\ge ",
    "!=": "\\ne ", "\\lt": "<", "\\gt": ">", "\\bmod": "\\text{mod}", "{,}": "", "\\%": "%", "\\&": "&",
}  # fmt: skip
_REPLACE = re.compile(
    "|".join(
        re.escape(k) + ("(?![a-zA-Z])" if k[-1].isalpha() and k[0] == "\\" else "")
        for k in sorted(_REPLACED, key=len, reverse=True)
    )
)
_SPACING = re.compile(
    r"\\(?:left|right|displaystyle|quad|qquad|[bB]igg?[lr]?)(?![a-zA-Z])|(?<!\\)\\[!;:, ]|~"
)
_TEXT = re.compile(
    r"\\(?:text|textrm|textbf|textit|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}"
)
_BOX = re.compile(r"^\\(?:boxed|fbox)\s*\{(.*)\}$", re.DOTALL)
_THOUSANDS = re.compile(r"(?<![\d.,])(\d{1,3})((?:,\d{3})+)(?!\d|,\d)")
_SPACED_THOUSANDS = re.compile(r"(?<![\d.,] )(?<![\d.,])(\d{1,3})((?: \d{3})+)(?! ?[\d/])")
_MIXED = re.compile(r"(?<![\d.])(\d+)\s+(\d+)\s*/\s*(\d+)(?!\d)")
_CHOICE = re.compile(r"^\(?([A-J])\)?[.):]?$")
_LABEL = re.compile(
    r"\(?\s*\\?[a-zA-Z]+(?:_\{?\w+\}?)?'*(?:\s*\([a-z]\))?(?:\s*,\s*\\?[a-zA-Z](?:_\{?\w+\}?)?)*\s*\)?"
)
_RELATION = re.compile(r"\\(?:le|ge|ne|in|approx|to)(?![a-zA-Z])|[<>=]")
_OPERATOR = {"\\le": "<=", "\\ge": ">=", "\\ne": "!=", "\\approx": "=", "\\in": "in"}
_MATRIX = re.compile(r"^\\begin\{([pbvB]?matrix)\}(.*)\\end\{\1\}$", re.DOTALL)
_OPEN, _CLOSE = "([{", ")]}"
_SMALL_WORDS = frozenset(
    ("no", "or", "and", "is", "on", "of", "to", "we", "it", "am", "pm", "by", "at", "if", "yes")
)

_UNITS = """cm centimeter centimetre|mm millimeter millimetre|m meter metre|km kilometer kilometre|in inch inches
|ft foot feet|yd yard|mi mile|g gram gramme|kg kilogram|mg milligram|lb pound lbs|oz ounce|s sec second
|min minute|h hr hour|day|week|month|year yr|dollar usd|cent|euro|degree deg|% percent|L l liter litre
|ml mL milliliter|mph|N newton|J joule|W watt|rad radian|unit"""
UNITS = {
    alias: group.split()[0]
    for group in _UNITS.replace("\n", "").split("|")
    for word in group.split()
    for alias in (word, word if len(word) < 3 else word + "s")
}
_UNIT_TAIL = re.compile(
    r"^(?P<value>.*[\d)}\]|i!])\s*(?:(?P<percent>%)|\^\s*\{?\\circ\s*\}?\s*(?P<degree>[CF]?)"
    r"|(?P<words>\s[a-zA-Z][a-zA-Z ]*(?:/\s*[a-zA-Z]+)?|(?:cm|mm|km|kg|ft|lb|oz|mph|ml|mL|mi|deg)(?:/[a-z]+)?)"
    r"(?:\^\{?(?P<power>[23])\}?)?)$",
    re.DOTALL,
)


def read_answer(text: str) -> Answer:
    """Never raises: what is no mathematics is a text."""
    if len(text) > MAX_CHARACTERS:
        clean = _cleaned(text[: MAX_CHARACTERS + 1])
        return Answer(Form("text", " ".join(text.split())), clean=clean)
    return _read_short(text)


@functools.lru_cache(maxsize=512)  # votes compare the same texts again and again
def _read_short(text: str) -> Answer:
    clean = _cleaned(text)
    try:
        return replace(_read(clean, 0), clean=clean)
    except ExpressionError:
        return Answer(Form("text", _plain(clean)), clean=clean)


def _cleaned(text: str) -> str:
    """One notation for one thing; text commands are opened, decoration removed."""
    text = text.strip().strip("`").strip()
    text = re.sub(r"^\*\*(.*)\*\*$", r"\1", text, flags=re.DOTALL)
    while (match := _BOX.match(text)) is not None:
        text = match.group(1).strip()
    text = re.sub(r"^(?:\\\(|\\\[)(.*)(?:\\\)|\\\])\.?$", r"\1", text, flags=re.DOTALL)
    text = re.sub(r"^(-?)\\?\$\s*(-?[\d.,]+)(?:\s*(?:USD|dollars))?$", r"\1\2 dollars", text)
    text = text.replace("\\$", "").replace("$", "")
    text = re.sub(r"(?<=\d)(?:,?\\!|\\,|\\ )(?=\d{3})", "", text.replace(",\\!", "\\!"))
    text = _REPLACE.sub(lambda m: _REPLACED[m.group()], text)
    text = _SPACING.sub(" ", text)
    text = re.sub(r"\s+", " ", _TEXT.sub(_opened_text, text)).strip()
    while text and (text[-1] in ".;,:" or text[:1] in ";,:"):
        text = text[:-1].rstrip() if text[-1] in ".;,:" else text[1:].lstrip()
    return text


def _opened_text(match: re.Match[str]) -> str:
    inside = match.group(1).strip()
    return ", " if inside in ("and", "or") else f" {inside} "


def _plain(text: str) -> str:
    return " ".join(text.replace("\\", " ").casefold().split()).strip(" .,")


def _read(text: str, depth: int) -> Answer:
    """Splits at the loosest structure first: lists, relations, unions, brackets, then one expression."""
    text = text.strip()
    if depth > MAX_DEPTH or not text:
        raise ExpressionError("too deep or empty")
    if (match := _CHOICE.match(text)) is not None:
        return Answer(Form("text", match.group(1)))
    if depth == 0 and "\\pm" in text:
        pair = tuple(text.replace("\\pm", a).replace("\\mp", b) for a, b in ("+-", "-+"))
        return _list([_read(part, depth + 1) for part in pair])
    if depth == 0:
        text = _THOUSANDS.sub(lambda m: m.group().replace(",", ""), _outside_brackets(text))
        text = _SPACED_THOUSANDS.sub(lambda m: m.group().replace(" ", ""), text)
        text = text.translate(_UNHIDDEN)
        text = re.sub(r"\s+(?:and|or)\s+", ", ", text)
    pieces = _split(text, ",")
    if len(pieces) > 1:
        return _list([_read(piece, depth + 1) for piece in pieces])
    relations = [m for m in _RELATION.finditer(text) if _depth_at(text, m.start()) == 0]
    if relations:
        return _relation(text, relations, depth)
    value, unit = _split_unit(text)
    if unit:
        return replace(_read(value, depth + 1), unit=unit)
    return Answer(_structure(text, depth))


_HIDDEN = str.maketrans({",": "\ue000"})
_UNHIDDEN = str.maketrans({"\ue000": ","})


def _outside_brackets(text: str) -> str:
    """Commas inside brackets hidden from the search for thousands, unless `, ` there separates and `,` does not."""
    out, level, start = [], 0, 0
    for i, c in enumerate(text):
        if c in _OPEN:
            if level == 0:
                out.append(text[start:i])
                start = i
            level += 1
        elif c in _CLOSE and level:
            level -= 1
            if level == 0:
                inside = text[start : i + 1]
                out.append(inside if ", " in inside and c != "}" else inside.translate(_HIDDEN))
                start = i + 1
    return "".join(out) + text[start:]


def _depth_at(text: str, position: int) -> int:
    before = text[:position]
    return sum(before.count(c) for c in _OPEN) - sum(before.count(c) for c in _CLOSE)


def _split(text: str, separator: str) -> list[str]:
    """At separators outside all brackets."""
    pieces, level, start, i = [], 0, 0, 0
    while i < len(text):
        if text[i] in _OPEN:
            level += 1
        elif text[i] in _CLOSE:
            level -= 1
        elif level <= 0 and text.startswith(separator, i):
            pieces.append(text[start:i])
            start = i + len(separator)
            i = start - 1
        i += 1
    pieces.append(text[start:])
    return pieces


def _list(answers: list[Answer]) -> Answer:
    labels = {answer.label for answer in answers}
    units = {answer.unit for answer in answers if answer.unit}
    if len(labels) > 1:
        forms = [Form("labelled", a.label, parts=(a.form,)) if a.label else a.form for a in answers]
    else:
        forms = [answer.form for answer in answers]
    form = Form("list", parts=tuple(forms)) if len(forms) > 1 else forms[0]
    label = labels.pop() if len(labels) == 1 else ""
    return Answer(form, unit=units.pop() if len(units) == 1 else "", label=label)


def _relation(text: str, relations: list[re.Match[str]], depth: int) -> Answer:
    operators = [_OPERATOR.get(m.group(), m.group()) for m in relations]
    bounds = [0, *(i for m in relations for i in m.span()), len(text)]
    sides = [text[a:b].strip() for a, b in zip(bounds[::2], bounds[1::2], strict=True)]
    if "" in sides or "\\to" in operators:
        raise ExpressionError("a side of the relation is empty")
    if len(operators) == 2 and "=" not in operators:
        return _chain(sides, operators, depth)
    if set(operators) == {"="}:
        left, right = sides[0], sides[-1]
        if not _LABEL.fullmatch(left) and _LABEL.fullmatch(right) and len(operators) == 1:
            left, right = right, left
        if _LABEL.fullmatch(left):
            answer = _read(right, depth + 1)
            return replace(answer, label=_name(left), equation=_difference(left, right))
        return Answer(Form("relation", "="), equation=add(parse(left), negative(parse(right))))
    if len(operators) != 1:
        raise ExpressionError("a chain of relations")
    left, operator, right = sides[0], operators[0], sides[1]
    if operator == "in":
        return replace(_read(right, depth + 1), label=_name(left))
    if operator == "!=":
        return Answer(Form("relation", "!=", parts=(_scalar(left), _scalar(right))))
    if not _LABEL.fullmatch(left) and _LABEL.fullmatch(right):
        left, right, operator = right, left, _mirrored(operator)
    if not _LABEL.fullmatch(left):
        raise ExpressionError("an inequality without a single name")
    if operator[0] == "<":
        pair = (Form("infinite", "-"), _scalar(right))
        return Answer(
            Form("seq", "(" + (")" if operator == "<" else "]"), parts=pair), label=_name(left)
        )
    pair = (_scalar(right), Form("infinite", "+"))
    return Answer(
        Form("seq", ("(" if operator == ">" else "[") + ")", parts=pair), label=_name(left)
    )


def _chain(sides: list[str], operators: list[str], depth: int) -> Answer:
    """a < x <= b is an interval."""
    if operators[0][0] == ">":
        sides, operators = sides[::-1], [_mirrored(o) for o in operators[::-1]]
    if not _LABEL.fullmatch(sides[1]) or any(o[0] != "<" for o in operators):
        raise ExpressionError("a chain of relations")
    brackets = ("(" if operators[0] == "<" else "[") + (")" if operators[1] == "<" else "]")
    parts = (_scalar(sides[0]), _scalar(sides[2]))
    return Answer(Form("seq", brackets, parts=parts), label=_name(sides[1]))


def _mirrored(operator: str) -> str:
    return operator.translate(str.maketrans("<>", "><"))


def _name(text: str) -> str:
    return re.sub(r"[\s{}\\]", "", text)


def _difference(left: str, right: str) -> Node | None:
    try:
        return add(parse(left), negative(parse(right)))
    except ExpressionError:
        return None


def _split_unit(text: str) -> tuple[str, str]:
    match = _UNIT_TAIL.match(text)
    if match is None:
        if (base := re.fullmatch(r"([0-9A-F]*\d[0-9A-F]*)_\{?(\d+)\}?", text)) is not None:
            return base.group(1), f"base {base.group(2)}"
        return text, ""
    value = match["value"]
    if match["percent"]:
        return value, "%"
    if match["degree"] is not None:
        return value, f"degree {match['degree']}".strip()
    words = (match["words"] or "").strip()
    if not words:
        return text, ""
    unit = _unit(words)
    if unit is None or (len(words) == 1 and not re.fullmatch(r"-?[\d.]+", value)):
        return text, ""
    return value, unit + (f"^{match['power']}" if match["power"] else "")


def _unit(words: str) -> str | None:
    """The canonical name, or None if these words are rather names of variables or functions."""
    words = re.sub(r"\s*(?:/|\bper\b)\s*", "/", words.strip())
    power = ""
    if (match := re.match(r"(square|sq|cubic|cu) (.*)", words)) is not None:
        words, power = match.group(2), "^2" if match.group(1)[0] == "s" else "^3"
    names = []
    for word in words.split("/"):
        known = UNITS.get(word) or UNITS.get(word.lower())
        if known is None and (len(word) < 3 or word in FUNCTIONS or word in GREEK):
            return None
        singular = word[:-1] if word.endswith("s") and len(word) > 3 else word
        names.append(known or singular.lower())
    return "mph" if names == ["mi", "h"] else "/".join(names) + power


def _scalar(text: str) -> Form:
    text = text.strip()
    sign, bare = ("-", text[1:].strip()) if text[:1] == "-" else ("+", text.lstrip("+").strip())
    if bare in ("\\infty", "infinity", "inf", "oo", "\\infinity"):
        return Form("infinite", sign)
    text = _MIXED.sub(r"\1\\frac{\2}{\3}", text)
    return Form("scalar", node=parse(text))


def _structure(text: str, depth: int) -> Form:
    if (match := _MATRIX.match(text)) is not None:
        return _matrix(match.group(2), depth)
    if len(pieces := _split(text, "\\cup")) > 1:
        return Form("union", parts=tuple(_structure(piece.strip(), depth + 1) for piece in pieces))
    if text in ("\\emptyset", "{}", "\\{\\}", "\\{ \\}"):
        return Form("set")
    if (inside := _inside(text, "\\{", "\\}")) is not None or (
        (inside := _inside(text, "{", "}")) is not None and "," in inside
    ):
        return Form("set", parts=tuple(_read(p, depth + 1).form for p in _split(inside, ",")))
    for opening, closing in ("()", "[]", "[)", "(]"):
        inside = _inside(text, opening, closing)
        if inside is not None and len(pieces := _split(inside, ",")) > 1:
            parts = tuple(_read(piece, depth + 1).form for piece in pieces)
            rows = {(part.kind, part.text, len(part.parts)) for part in parts}
            if opening + closing == "[]" and len(rows) == 1 and rows.pop()[:2] == ("seq", "[]"):
                return Form("matrix", parts=tuple(replace(part, text="row") for part in parts))
            return Form("seq", opening + closing, parts=parts)
        if inside is not None and opening == "(" and closing == ")" and _CHOICE.match(inside):
            return Form("text", inside)
    if _is_words(text):
        return Form("text", _plain(text))
    return _scalar(text)


def _inside(text: str, opening: str, closing: str) -> str | None:
    """What stands between a bracket at the very start and its partner at the very end."""
    if not (text.startswith(opening) and text.endswith(closing)) or len(text) < len(
        opening + closing
    ):
        return None
    level, last = 0, len(text) - 1
    for i, c in enumerate(text):
        level += (c in _OPEN) - (c in _CLOSE)
        if level == 0 and c in _CLOSE:
            return text[len(opening) : -len(closing)] if i == last else None
    return None


def _matrix(body: str, depth: int) -> Form:
    rows = [row for row in body.split("\\\\") if row.strip()]
    cells = [tuple(_read(cell, depth + 1).form for cell in row.split("&")) for row in rows]
    if len({len(row) for row in cells}) != 1:
        raise ExpressionError("rows of different lengths")
    return Form("matrix", parts=tuple(Form("seq", "row", parts=row) for row in cells))


def _is_words(text: str) -> bool:
    """Letters and spaces with a word that is no product of variables, no function and no constant."""
    if not re.fullmatch(r"[A-Za-z][A-Za-z' -]*", text):
        return False
    return any(
        (len(word) >= 3 or word.lower() in _SMALL_WORDS)
        and word not in FUNCTIONS
        and word not in GREEK
        and word not in ("infinity", "inf")
        for word in re.findall(r"[A-Za-z]+", text)
    )
