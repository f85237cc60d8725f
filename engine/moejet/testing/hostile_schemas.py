"""JSON schemas and grammars that try to keep a server busy: for tests of what it answers and benchmarks of how fast."""

from __future__ import annotations

from typing import Any


def properties(number: int) -> dict[str, Any]:
    """An object with so many properties."""
    return {"type": "object", "properties": {f"p{i}": {"type": "integer"} for i in range(number)}}


# By what is wrong with them; each has to be refused.
REFUSED: dict[str, Any] = {
    "reference to http": {
        "type": "object",
        "properties": {"a": {"$ref": "http://localhost:1/x"}},
    },
    "reference to a file": {"$ref": "file:///etc/passwd"},
    "nested repetition": {"type": "string", "pattern": "(a{1,1000}){1,1000}"},
    "empty range": {"type": "integer", "minimum": 5, "maximum": 4},
    "contradiction": {"type": "string", "not": {"type": "string"}},
    "empty enum": {"enum": []},
    "5000 properties": properties(5000),
}

# These may be served, too.
LARGE: dict[str, Any] = {
    "2000 properties": properties(2000),
    "maxLength 1e6": {"type": "string", "maxLength": 1_000_000},
    "itself": {"$ref": "#"},
    "recursive array": {
        "$defs": {"a": {"type": "array", "items": {"$ref": "#/$defs/a"}}},
        "$ref": "#/$defs/a",
    },
}

# In Lark's form; they may be served or refused.
GRAMMARS: dict[str, str] = {
    "60000 parentheses": "start: " + "(" * 60_000 + '"a"' + ")" * 60_000,
    "left recursion": 'start: start "a" | "a"',
    "nullable repetition": 'start: ("" | "a"?)*',
    "nested stars": "start: /(a*)*/ ",
    "no rule": "nothing",
}


def response_format(schema: Any) -> dict[str, Any]:
    """The schema as OpenAI's response_format."""
    return {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
