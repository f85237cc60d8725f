"""Chat templates: Jinja from the checkpoint, so foreign code, rendered in Jinja's sandbox with an end to its loops.

What a template can call and see follows the conventions that transformers set and published templates rely on:
`raise_exception`, `strftime_now`, `tojson` without HTML escapes, break and continue, `{% generation %}` blocks, blocks
trimmed of their newline. Messages reach it as plain JSON types only.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from functools import cached_property
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.sandbox
import jinja2.utils

_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
_OF_EVERY_CALL = frozenset(("messages", "add_generation_prompt", "tools", "documents"))
# Python errors that a template's own expressions can raise.
_MAX_SECONDS = 5.0  # of the processor, for one conversation
_MAX_REPEATED = 1 << 20  # characters or items that one operator may make of fewer
_until_s: ContextVar[float] = ContextVar("until_s")  # on the clock of time.thread_time
_EXPRESSION_ERRORS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class ChatTemplate:
    """One compiled template."""

    def __init__(self, source: str):
        """Raises ValueError if the template is not valid Jinja."""
        self.source = source
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"the chat template is not valid Jinja: {error}") from error

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names that a caller may set: read by the template and not its own, nor part of every call."""
        tree = _environment().parse(self.source)
        own = {n.name for n in tree.find_all(jinja2.nodes.Name) if n.ctx != "load"}
        # `set x = x | default(...)`: its own, with a value that a caller may give.
        asked = {
            node.node.name
            for node in tree.find_all((jinja2.nodes.Test, jinja2.nodes.Filter))
            if isinstance(node.node, jinja2.nodes.Name)
            and node.name in ("defined", "undefined", "default", "d")
        }
        return frozenset(
            jinja2.meta.find_undeclared_variables(tree) - (own - asked) - _OF_EVERY_CALL
        )

    def render(
        self, messages: object, *, add_generation_prompt: bool = True, **variables: Any
    ) -> str:
        """Renders a conversation; `variables` are names that the template may use.

        Raises ValueError if messages are malformed or the template refuses them, with its own message.
        """
        conversation = [_plain_message(m) for m in check_messages(messages)]
        known = {"tools": None, "documents": None}
        _until_s.set(time.thread_time() + _MAX_SECONDS)
        try:
            return self._template.render(
                {**known, **_plain(variables)},
                messages=conversation,
                add_generation_prompt=add_generation_prompt,
            )
        except (jinja2.TemplateError, RecursionError, *_EXPRESSION_ERRORS) as error:
            detail = str(error) or type(error).__name__
            raise ValueError(f"the chat template refused the conversation: {detail}") from error


def check_messages(messages: object) -> list[dict[str, Any]]:
    """Copies a conversation with content as text; raises ValueError naming the first malformed message.

    content is a string, a list of `{"type": "text", "text": ...}` parts (joined by newlines), or, beside tool calls,
    missing. Keys with the value None are dropped: templates would print them.
    """
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(
            f"messages must be a list of {{'role', 'content'}} dicts, not {type(messages).__name__}"
        )
    if not messages:
        raise ValueError("messages is empty ([]): it needs at least one message")
    return [_check_message(i, message) for i, message in enumerate(messages)]


def _check_message(i: int, message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(
            f"messages[{i}] must be a dict with 'role' and 'content', not {type(message).__name__}"
        )
    checked = {key: value for key, value in message.items() if value is not None}
    role = checked.get("role")
    if not isinstance(role, str) or not role:
        raise ValueError(f"messages[{i}].role={role!r} must be a name such as 'user'")
    if "content" in checked:
        checked["content"] = _text_of(i, checked["content"])
    elif checked.get("tool_calls"):
        # Templates of DeepSeek-V3 recognise a call by `content is none`; a missing key would not do.
        checked["content"] = None
    else:
        raise ValueError(f"messages[{i}].content is missing: it must be a string")
    return checked


def _text_of(i: int, content: object) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ValueError(
            f"messages[{i}].content must be a string or a list of text parts, "
            f"not {type(content).__name__}"
        )
    texts = []
    for j, part in enumerate(content):
        where = f"messages[{i}].content[{j}]"
        if not isinstance(part, Mapping) or part.get("type", "text") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"{where}: type {kind!r} is not supported; supported: 'text'")
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where}.text must be a string")
        texts.append(part["text"])
    return "\n".join(texts)


def _plain_message(message: dict[str, Any]) -> Any:
    reasoning = next((message[k] for k in _REASONING_KEYS if k in message), None)
    if reasoning is not None:
        # Templates disagree on the name under which they look for past reasoning.
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return _plain(message)


def _plain(value: Any) -> Any:
    """Rebuilds a value from plain JSON types, so that a template has no object whose methods it could call."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    raise ValueError(
        f"a value of type {type(value).__name__} cannot be given to a chat template: use JSON types"
    )


class _Generation(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks assistant text for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012 (the base class declares a plain set)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """`namespace(...)` that refuses names through which Python's internals are reached."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"namespace attribute {name!r} is not allowed")
        super().__setitem__(name, value)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox keeps a template from reaching Python, but not from working for ever."""

    intercepted_binops = frozenset("*%") | {"**"}

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        if operator == "*":
            _check_repeated(left, right)
            _check_repeated(right, left)
        elif operator == "%" and isinstance(left, str):
            widths = [int(digits) for digits in re.findall(r"[0-9]{1,18}", left)]
            stars = "*" in left
            if stars or sum(widths) > _MAX_REPEATED:
                raise jinja2.exceptions.SecurityError("a format's width is too large")
        elif operator == "**" and isinstance(right, int) and abs(right) > 1000:
            raise jinja2.exceptions.SecurityError("an exponent is too large")
        return super().call_binop(context, operator, left, right)

    def _parse(self, source: str, name: str | None, filename: str | None) -> jinja2.nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(jinja2.nodes.For):
            loop.iter = jinja2.nodes.Filter(
                loop.iter, "timed", [], [], None, None, lineno=loop.lineno
            )
        return tree


def _check_repeated(value: Any, times: Any) -> None:
    is_sized = isinstance(value, str | list | tuple)
    if is_sized and isinstance(times, int) and len(value) * times > _MAX_REPEATED:
        raise jinja2.exceptions.SecurityError("something is repeated too often")


def _timed(items: Iterable[Any]) -> Iterator[Any]:
    """What a loop goes through, until the conversation's time is up."""
    until_s = _until_s.get()
    for item in items:
        if time.thread_time() > until_s:
            raise jinja2.exceptions.SecurityError(f"it runs for more than {_MAX_SECONDS:g} s")
        yield item


def _environment() -> jinja2.Environment:
    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["timed"] = _timed
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
