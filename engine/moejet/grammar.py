"""Answers that follow a grammar: a JSON schema, a regular expression, a list of choices, or a Lark grammar.

>>> SamplingParams(grammar=Grammar.json_schema({"type": "object", "properties": {"age": {"type": "integer"}}}))

Before each token, everything that the grammar does not allow is masked; llguidance (`pip install 'moejet[grammar]'`)
says what that is. Where only one continuation is possible its tokens are injected without being sampled. Thinking is
free: the grammar holds from the closing tag on, after which the model may put an empty line, or from the beginning if
the model does not think. The answer ends when nothing can follow, or with an eos where the grammar allows an end; one
that max_tokens cuts off has finish_reason "length" and is incomplete.
"""

from __future__ import annotations

import json
import logging
import re
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from moejet.policy import Inject, Stop, TokenPolicy
from moejet.validation import checked, require_text, short

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer
    from torch import Tensor

    from moejet.sample_state import SampleState
    from moejet.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

MAX_LENGTH = 1 << 18  # characters of a grammar
MAX_DEPTH = 64  # of a schema
MAX_MEMBERS = 2000  # of one object in a schema; llguidance's time grows with their square
MAX_CHOICES = 4096
MAX_REPETITIONS = 20_000  # in nested {m,n} of regular expressions, multiplied
_MAX_CACHED = 64
_MAX_PARTS = 1 << 16
_MAX_NEWLINES = 2  # tokens, between the closing tag and the answer
_MAX_TIME_S = 0.5  # of the processor, for one token
# In JSON. A space or a line's indentation: with more, a model that is unsure might write nothing else.
WHITE_SPACE = r"(\x20|\n\x20{0,16})?"


@dataclass(frozen=True, slots=True)
@checked
class Grammar:
    """What an answer must look like. Its class methods make one; they raise ValueError for what cannot be."""

    kind: Literal["json_schema", "regex", "lark"]
    text: str
    is_compact: bool = False

    def __post_init__(self) -> None:
        if len(self.text) > MAX_LENGTH:
            raise ValueError(
                f"the {self.kind} has {len(self.text)} characters, and {MAX_LENGTH} are allowed"
            )
        if (times := _repetitions(self.text)) > MAX_REPETITIONS:
            raise ValueError(
                f"the {self.kind} repeats something {times} times, and {MAX_REPETITIONS} are allowed"
            )

    @classmethod
    def json_schema(cls, schema: Mapping[str, Any] | str, *, compact: bool = False) -> Grammar:
        """JSON that fits a schema, given as a dict or its text; {} is any JSON. compact=True: without white space.

        A keyword that cannot be enforced is refused when the request is made.
        """
        if isinstance(schema, str):
            if len(schema) > MAX_LENGTH:
                raise ValueError(
                    f"schema has {len(schema)} characters, and {MAX_LENGTH} are allowed"
                )
            try:
                schema = json.loads(schema)
            except (json.JSONDecodeError, RecursionError) as error:
                raise ValueError(f"schema={short(schema)} must be JSON: {error}") from error
        if not isinstance(schema, Mapping):
            raise ValueError(f"schema={short(schema)} must be a dict or its JSON text")
        _check_depth(schema)
        try:
            text = json.dumps(schema, ensure_ascii=False, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"schema={short(schema)} must be writable as JSON: {error}") from error
        return cls("json_schema", text, is_compact=compact)

    @classmethod
    def regex(cls, pattern: str) -> Grammar:
        r"""A text that matches all of `pattern`; no look-around, no back-references, and \d, \w and \s are ASCII."""
        require_text("pattern", pattern)
        return cls("regex", pattern)

    @classmethod
    def choice(cls, choices: Sequence[str]) -> Grammar:
        """One of these texts."""
        is_list = isinstance(choices, Sequence) and not isinstance(choices, str)
        if not is_list or not choices or not all(isinstance(c, str) and c for c in choices):
            raise ValueError(f"choices={short(choices)} must be a list of non-empty strings")
        if len(choices) > MAX_CHOICES:
            raise ValueError(f"{len(choices)} choices given, and {MAX_CHOICES} are allowed")
        texts = dict.fromkeys(choices)
        return cls("lark", "start: " + " | ".join(json.dumps(c, ensure_ascii=False) for c in texts))

    @classmethod
    def lark(cls, text: str) -> Grammar:
        """A context-free grammar in Lark's EBNF notation, beginning at the rule `start`."""
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"text={short(text)} must be a Lark grammar: a non-empty string")
        return cls("lark", text)


def _check_depth(schema: object) -> None:
    level = [schema]
    for _ in range(MAX_DEPTH):
        check_members(level)
        level = [
            child
            for node in level
            if isinstance(node, Mapping | list | tuple)
            for child in (node.values() if isinstance(node, Mapping) else node)
        ]
        if not level:
            return
        # Also ends what refers to itself, or to the same part again and again.
        if len(level) > _MAX_PARTS:
            raise ValueError(f"schema has more than {_MAX_PARTS} parts on one level")
    raise ValueError(f"schema is nested deeper than {MAX_DEPTH} levels")


def check_members(nodes: Sequence[object], where: str = "schema") -> None:
    """Raises ValueError if one of a schema's parts is too large to compile in time."""
    largest = max((len(node) for node in nodes if isinstance(node, Mapping)), default=0)
    if largest > MAX_MEMBERS:
        raise ValueError(
            f"{where} has an object of {largest} members, and {MAX_MEMBERS} are allowed"
        )


def _repetitions(text: str) -> int:
    """The largest product of nested repetition counts: (a{9}){8} has 72."""
    stack, item, end = [1], 1, -1  # the largest in every open group; the item that ends at `end`
    for match in re.finditer(r"\\.|[()]|\{(\d{1,9})(?:,(\d{0,9}))?\}", text):
        token = match.group()
        if token == "(":
            stack.append(1)
            continue
        if token == ")" and len(stack) > 1:
            item = stack.pop()
        elif token[0] == "{":
            item = (item if match.start() == end else 1) * max(1, int(match[2] or match[1]))
        else:
            continue
        end = match.end()
        stack[-1] = max(stack[-1], item)
    return max(stack)


class GrammarCompiler:
    """Compiles grammars for one model and keeps those used last."""

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, eos_token_ids: frozenset[int]):
        if tokenizer is None or not eos_token_ids:
            raise ValueError("a grammar needs a model with a tokenizer and an eos token")
        self.vocab_size = vocab_size
        self.eos_token_ids = eos_token_ids
        self._tokenizer = tokenizer
        self._cache: OrderedDict[Grammar, LLMatcher] = OrderedDict()

    @cached_property
    def _ll_tokenizer(self) -> LLTokenizer:
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise ValueError("a grammar needs llguidance: pip install 'moejet[grammar]'") from error
        try:
            return LLTokenizer(
                self._tokenizer.raw.to_str(),
                n_vocab=max(self.vocab_size, self._tokenizer.vocab_size),
                eos_token=sorted(self.eos_token_ids),
            )
        except Exception as error:  # the library raises its own kinds
            raise ValueError(f"llguidance cannot use this model's tokenizer: {error}") from error

    @cached_property
    def newline_ids(self) -> list[int]:
        """Tokens of nothing but newlines."""
        ids = (self._tokenizer.encode("\n" * n, add_special_tokens=False) for n in (1, 2))
        return [tokens[0] for tokens in ids if len(tokens) == 1]

    @cached_property
    def opening_id(self) -> int | None:
        """The opening tag, where it is one token."""
        tags = self._tokenizer.think_tags
        return self._tokenizer.token_to_id(tags[0]) if tags is not None else None

    def tokenize(self, text: str) -> list[int]:
        return self._ll_tokenizer.tokenize_str(text)

    def compile(self, grammar: Grammar) -> LLMatcher:
        """A matcher at its beginning. Raises ValueError for a grammar that is wrong, unsupported or too large."""
        matcher = self._cache.get(grammar)
        if matcher is None:
            matcher = self._compile(grammar)
            self._cache[grammar] = matcher
            if len(self._cache) > _MAX_CACHED:
                self._cache.popitem(last=False)
        self._cache.move_to_end(grammar)
        return matcher.deep_copy()

    def _compile(self, grammar: Grammar) -> LLMatcher:
        tokenizer = self._ll_tokenizer  # first: it says what is to be installed
        from llguidance import LLMatcher, regex_to_lark

        if grammar.kind == "json_schema":
            # Stated here, so that a schema cannot switch its own checks off.
            source = LLMatcher.grammar_from_json_schema(
                grammar.text,
                overrides={
                    "lenient": False,
                    "coerce_one_of": False,
                    "whitespace_flexible": not grammar.is_compact,
                    "whitespace_pattern": None if grammar.is_compact else WHITE_SPACE,
                },
            )
        elif grammar.kind == "regex":
            source = LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(grammar.text, 'dws')}/")
        else:
            source = LLMatcher.grammar_from_lark(grammar.text)
        matcher = LLMatcher(tokenizer, source, log_level=0, limits=_limits())
        if not matcher.is_error():
            # Some limits are met with the first token only.
            first = matcher.deep_copy()
            with _within_time():
                first.compute_bitmask()
            if first.is_error():
                matcher = first
        if matcher.is_error():
            raise ValueError(f"the {grammar.kind} cannot be used: {_message(matcher)}")
        for warning in matcher.get_grammar_warnings():
            logger.warning("%s: %s", grammar.kind, warning)
        return matcher


class GrammarPolicy(TokenPolicy):
    """Keeps one sample's answer within a grammar."""

    needs_logits = True

    def __init__(self, compiler: GrammarCompiler, grammar: Grammar):
        self._compiler = compiler
        self._matcher = compiler.compile(grammar)
        self._num_read = 0  # of the output's tokens
        self._has_begun = False

    def on_logits(self, state: SampleState, row: Tensor) -> Tensor | None:
        if state.content_start is None:
            return None
        self._catch_up(state)
        import numpy as np
        import torch

        with _within_time():
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        self._check()
        mask = torch.from_numpy(np.unpackbits(bits, bitorder="little")[: row.numel()]).bool()
        opening = self._compiler.opening_id
        if state.num_output_tokens == 0 and state.may_open_thinking and opening is not None:
            mask[opening] = True
        num_tokens = state.num_output_tokens - state.content_start
        if state.content_start > 0 and not self._has_begun and num_tokens < _MAX_NEWLINES:
            mask[self._compiler.newline_ids] = True
        return mask

    def on_append(self, state: SampleState, token_id: int) -> Inject | Stop | None:
        if state.content_start is None:
            return None
        if token_id in self._compiler.eos_token_ids:
            return Stop()
        self._catch_up(state)
        if self._has_begun and self._matcher.is_stopped():
            return Stop()
        if state.num_pending or not self._has_begun:
            return None
        with _within_time():
            forced = self._matcher.compute_ff_tokens()
        return Inject(forced) if forced else None

    def _catch_up(self, state: SampleState) -> None:
        """Reads what the answer has got since the last call; a branch's answer may be longer than its policy's life."""
        start = state.content_start
        assert start is not None, "the thinking is free"
        if self._num_read < start:
            self._num_read = start
            if start == state.num_output_tokens and state.content:
                # The token that closed the thinking went on with the answer.
                self._has_begun = True
                self._consume(self._compiler.tokenize(state.content))
        for token_id in state.token_ids[state.num_prompt_tokens + self._num_read :]:
            self._num_read += 1
            # Newlines after the closing tag are not part of the answer, unless the grammar begins with them.
            is_blank = start > 0 and not self._has_begun and token_id in self._compiler.newline_ids
            if not is_blank or self._matcher.validate_tokens([token_id]) == 1:
                self._has_begun = True
                self._consume([token_id])

    def _consume(self, token_ids: list[int]) -> None:
        self._matcher.consume_tokens(token_ids)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise ValueError(f"the grammar cannot be followed here: {_message(self._matcher)}")


@contextmanager
def _within_time() -> Iterator[None]:
    begin = time.thread_time()
    yield
    if time.thread_time() - begin > _MAX_TIME_S:
        raise ValueError(
            f"the grammar cannot be used: one token takes more than {_MAX_TIME_S} s; repeat less in it"
        )


def _limits() -> LLParserLimits:
    """About a tenth of a second for compiling and a few milliseconds a token; at most 100 MB of automaton."""
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=500_000,
        step_lexer_fuel=100_000,
        step_max_items=30_000,
        max_lexer_states=50_000,
        max_grammar_size=100_000,
        precompute_large_lexemes=False,
        verbose_errors=False,
    )


def _message(matcher: LLMatcher) -> str:
    lines = [line.strip() for line in matcher.get_error().splitlines()]
    found = [line for line in lines if line and not line.startswith("<")]
    errors = [line for line in found if line.startswith("error:")]
    return " ".join([*found[:1], *errors[:1]])
