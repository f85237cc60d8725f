"""Text to token ids and back, on the `tokenizers` library; no transformers (its import costs seconds).

`Tokenizer` reads tokenizer.json, or Kimi's tiktoken.model, and the settings beside it. Ids, decoded text and rendered
templates equal those of transformers' AutoTokenizer, with one difference: `add_bos_token: true` in
tokenizer_config.json is honoured where tokenizer.json itself adds none (DeepSeek-V3 is published like that and was
trained with it; transformers 5 ignores it).

`IncrementalDecoder` turns a stream of ids into text that may be shown at once.
"""

from __future__ import annotations

import codecs
import copy
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer

from moejet import tiktoken_files
from moejet.chat_template import ChatTemplate
from moejet.thinking import detect_think_tags
from moejet.tokenizer_files import NAMED_TOKENS, read_tokenizer
from moejet.tool_markers import KNOWN_TOOL_MARKERS
from moejet.validation import short


class Tokenizer:
    """A checkpoint's tokenizer, its special tokens and its chat template."""

    def __init__(
        self,
        raw: RawTokenizer,
        *,
        special_tokens: dict[str, str] | None = None,
        chat_templates: dict[str, str] | None = None,
        add_bos_token: bool = False,
        add_eos_token: bool = False,
        eos_token_ids: Sequence[int] = (),
    ):
        """`special_tokens`: e.g. {"bos_token": "<s>"} · `chat_templates` by name, "default" for the usual one."""
        self.raw = raw
        self.raw.no_truncation()
        self.raw.no_padding()
        self.special_tokens = dict(special_tokens or {})
        self._templates = dict(chat_templates or {})
        self._compiled: dict[str, ChatTemplate] = {}
        ids = {name: raw.token_to_id(token) for name, token in self.special_tokens.items()}
        for name in ("bos_token", "eos_token"):
            if name in ids and ids[name] is None:
                raise ValueError(
                    f"{name}={self.special_tokens[name]!r} is not in tokenizer.json's vocabulary: "
                    "the tokenizer files do not belong together"
                )
        self.bos_token_id: int | None = ids.get("bos_token")
        self.eos_token_id: int | None = ids.get("eos_token")
        own = () if self.eos_token_id is None else (self.eos_token_id,)
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys((*eos_token_ids, *own)))
        probe = raw.encode("a", add_special_tokens=True).ids
        self._adds_bos = (
            add_bos_token and self.bos_token_id is not None and probe[:1] != [self.bos_token_id]
        )
        self._adds_eos = (
            add_eos_token and self.eos_token_id is not None and probe[-1:] != [self.eos_token_id]
        )

    @classmethod
    def from_path(cls, path: str | Path) -> Tokenizer:
        """Reads tokenizer.json or tiktoken.model and, where present, tokenizer_config.json, chat_template.jinja,
        special_tokens_map.json and the eos ids of generation_config.json or config.json.

        Raises ValueError if both are missing (saying what is supported) or a file cannot be read.
        """
        return cls(**read_tokenizer(Path(path)))

    def parts(self) -> dict[str, Any]:
        """What `from_parts` makes the same tokenizer of, in another process: texts, flags and ids."""
        return {
            "raw": self.raw.to_str(),
            "special_tokens": self.special_tokens,
            "chat_templates": self._templates,
            "add_bos_token": self._adds_bos,
            "add_eos_token": self._adds_eos,
            "eos_token_ids": list(self.eos_token_ids),
        }

    @classmethod
    def from_parts(cls, *, raw: str, **settings: Any) -> Tokenizer:
        return cls(RawTokenizer.from_str(raw), **settings)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included."""
        return int(self.raw.get_vocab_size(with_added_tokens=True))

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out."""
        added: dict[int, AddedToken] = self.raw.get_added_tokens_decoder()
        return frozenset(i for i, token in added.items() if token.special)

    @cached_property
    def hidden_token_ids(self) -> frozenset[int]:
        """Ids without text in a reply: the special ones, except those that tell its parts from each other."""
        tags = {self.token_to_id(tag) for tag in self.think_tags or ()}
        return self.special_token_ids - tags - self.tool_marker_ids.keys()

    @cached_property
    def tool_marker_ids(self) -> dict[int, str]:
        """Tokens that are markers of tool calls, with their text."""
        found = {self.token_to_id(marker): marker for marker in KNOWN_TOOL_MARKERS}
        return {token_id: marker for token_id, marker in found.items() if token_id is not None}

    @cached_property
    def think_tags(self) -> tuple[str, str] | None:
        """The (open, close) tags around this model's reasoning, or None."""
        return detect_think_tags(self)

    def token_to_id(self, token: str) -> int | None:
        """Id of exactly this token, or None."""
        result: int | None = self.raw.token_to_id(token)
        return result

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with bos and eos as the checkpoint wants them unless `add_special_tokens` is False.

        A text that already starts with bos gets no second one. The text of special tokens becomes those tokens.
        """
        if not isinstance(text, str):
            raise ValueError(f"text must be a string, not {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {short(text)} is not valid Unicode: lone surrogate at position {error.start}; "
                "remove it"
            ) from error
        ids: list[int] = self.raw.encode(text, add_special_tokens=add_special_tokens).ids
        if not add_special_tokens:
            return ids
        bos = self.bos_token_id
        if self._adds_bos and bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        elif bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        if self._adds_eos and self.eos_token_id is not None:
            ids = [*ids, self.eos_token_id]
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids outside the vocabulary give nothing."""
        text: str = self.raw.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What one token stands for, which need not be whole characters; nothing for ids outside the vocabulary."""
        token = self.raw.id_to_token(token_id)
        if token is None:
            return b""
        if self.is_byte_level:
            return _token_bytes(token)
        if _is_byte_token(token):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    @cached_property
    def is_byte_level(self) -> bool:
        """Whether tokens are strings of bytes, so that none of a text is lost."""
        if self.raw.decoder is None:
            return False
        decoder = json.loads(self.raw.to_str()).get("decoder")
        parts = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
        kinds = [part["type"] for part in parts]
        return "ByteLevel" in kinds and set(kinds) <= {"ByteLevel", "Fuse"}

    @property
    def chat_template(self) -> str | None:
        """Source of the default chat template."""
        return self._templates.get("default")

    @property
    def chat_template_sources(self) -> tuple[str, ...]:
        """All of its templates; checkpoints may have one for tools and one for the rest."""
        return tuple(self._templates.values())

    @cached_property
    def template_variables(self) -> frozenset[str]:
        """Variables of its templates that a request may set, such as `enable_thinking`."""
        found = (self._compile(source).variables for source in self._templates.values())
        return frozenset().union(*found) - {*NAMED_TOKENS, *self.special_tokens}

    @property
    def has_chat_template(self) -> bool:
        return bool(self._templates)

    def apply_chat_template(
        self, messages: object, add_generation_prompt: bool = True, **kwargs: Any
    ) -> str:
        """Renders a conversation to the text of a prompt; encode it with `add_special_tokens=False`.

        messages: dicts with role and content (a string or a list of text parts) · kwargs: variables of the template
        (`tools`, `enable_thinking`, ...); `chat_template` chooses one by name or gives one as text.
        Raises ValueError for malformed messages, without a template, and with a template's own refusal.
        """
        template = self._choose_template(kwargs.pop("chat_template", None), kwargs.get("tools"))
        variables = {**self.special_tokens, **kwargs}
        return template.render(messages, add_generation_prompt=add_generation_prompt, **variables)

    def _choose_template(self, wanted: str | None, tools: object) -> ChatTemplate:
        if wanted is None:
            if not self._templates:
                raise ValueError(
                    "the tokenizer has no chat template: it is probably a base model; generate from "
                    "plain text (or pass chat_template=...)"
                )
            wanted = "tool_use" if tools and "tool_use" in self._templates else "default"
            if wanted not in self._templates:
                names = ", ".join(sorted(self._templates))
                raise ValueError(f"no default chat template: pass chat_template= one of {names}")
        return self._compile(self._templates.get(wanted, wanted))

    def _compile(self, source: str) -> ChatTemplate:
        template = self._compiled.get(source)
        if template is None:  # another thread may be here too: whoever comes last stays
            if len(self._compiled) >= 8:
                self._compiled.clear()
            template = self._compiled[source] = ChatTemplate(source)
        return template


class IncrementalDecoder:
    """Decodes a stream of ids; the pieces joined, `flush` included, equal `Tokenizer.decode` of all ids.

    Never emits part of a UTF-8 character. A byte-level tokenizer's tokens are bytes, so a standard incremental UTF-8
    decoder does it. Any other decoder looks at its neighbours (leading space dropped, runs of byte tokens joined):
    there the last emitted tokens are decoded with and without the new ones, and the difference is the new text. Work
    per token does not depend on the length of the stream.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._raw = tokenizer.raw
        self._skipped = tokenizer.hidden_token_ids if skip_special_tokens else frozenset()
        self._is_byte_level = (
            tokenizer.is_byte_level
        )  # found once: it takes a copy of the vocabulary
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._context: list[int] = []
        self._pending: list[int] = []

    def copy(self) -> IncrementalDecoder:
        """The same state, to go on with other ids."""
        other = copy.copy(self)
        other._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        other._utf8.setstate(self._utf8.getstate())
        other._context, other._pending = list(self._context), list(self._pending)
        return other

    def push(self, token_id: int) -> str:
        """Adds one id; returns text that is complete now (often empty or more than one token's)."""
        if token_id in self._skipped:
            return ""
        token = self._raw.id_to_token(token_id)
        if token is None:
            return ""
        if self._is_byte_level:
            return self._utf8.decode(_token_bytes(token))
        self._pending.append(token_id)
        # A run of byte tokens decodes as a whole: one bad byte turns all of it into U+FFFD.
        return "" if _is_byte_token(token) else self._emit()

    def flush(self) -> str:
        """Ends the stream; bytes that form no character come out as U+FFFD."""
        if self._is_byte_level:
            text = self._utf8.decode(b"", final=True)
            self._utf8.reset()
            return text
        text = self._emit() if self._pending else ""
        self._context = []
        return text

    def _emit(self) -> str:
        before = self._decode(self._context)
        after = self._decode(self._context + self._pending)
        # Context whose text is empty would let a decoder drop a leading space that is not the stream's.
        self._context = self._pending if after[len(before) :] else self._context + self._pending
        self._pending = []
        return after[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        text: str = self._raw.decode(ids, skip_special_tokens=False) if ids else ""
        return text


def _is_byte_token(token: str) -> bool:
    return len(token) == 6 and token.startswith("<0x") and token.endswith(">")


def _token_bytes(token: str) -> bytes:
    """Bytes of a byte-level token; an added token with characters outside the alphabet is its own text."""
    table = tiktoken_files.byte_of_char()
    if all(c in table for c in token):
        return bytes(table[c] for c in token)
    return token.encode()
