"""Conversations to token ids, so that nobody's text can pass for a turn of the conversation.

A tokenizer turns the text of a special token into that token, also where a user wrote it. Such texts in messages are
therefore broken up by a character that occurs nowhere else, the conversation is rendered, the special tokens that are
still whole (the template's own) become tokens, and what lies between them is encoded as plain text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Tokenizer as RawTokenizer

from moejet.server.errors import ApiError, wrong
from moejet.server.tool_calls import Tool
from moejet.tokenizer import Tokenizer

# Noncharacters, which no text in interchange may hold (Unicode 16, section 23.7).
_BREAKS = [chr(c) for c in range(0xFDD0, 0xFDF0)]
_PROBE_ARGUMENTS = '{"probe": 1}'


class PromptMaker:
    """Prompts of one model; any thread may use it. Without a tokenizer only token ids are accepted."""

    def __init__(self, tokenizer: Tokenizer | None, max_context: int):
        self._tokenizer = tokenizer
        self.max_context = max_context

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise wrong("this model has no tokenizer: send token ids to /v1/completions", "prompt")
        return self._tokenizer

    def of_text(self, text: str, field: str, *, add_special_tokens: bool = True) -> list[int]:
        """A plain text, in which special tokens are what they say."""
        self._check_length(text, field)
        return self.checked(self.tokenizer.encode(text, add_special_tokens), field)

    def of_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        kwargs: Mapping[str, Any],
        *,
        field: str = "messages",
        is_checked: bool = True,
    ) -> tuple[str, list[int]]:
        """The rendered conversation and its tokens; kwargs are the template's variables.

        field: of the request that holds it · is_checked=False: also where it leaves no room for an answer.
        """
        prompt, token_ids = self._of_chat(messages, kwargs, field)
        return prompt, self.checked(token_ids, field) if is_checked else token_ids

    def _of_chat(
        self, messages: Sequence[Mapping[str, Any]], kwargs: Mapping[str, Any], field: str
    ) -> tuple[str, list[int]]:
        if self._tokenizer is None or not self._tokenizer.has_chat_template:
            raise wrong(
                "this model has no chat template: it is a base model; use /v1/completions",
                "messages",
            )
        for message in messages:
            self._check_length(message.get("content") or "", field)
        shaped = [self._shaped(message) for message in messages]
        texts = json.dumps([shaped, kwargs], ensure_ascii=False)
        if self._special_text.search(texts) is None:
            prompt = self.tokenizer.apply_chat_template(shaped, **kwargs)
            return prompt, self.tokenizer.encode(prompt, add_special_tokens=False)
        mark = next((c for c in _BREAKS if c not in texts), None)
        if mark is None:
            raise wrong("messages hold too many kinds of noncharacters (U+FDD0 to U+FDEF)")
        broken = [self._broken_message(message, mark) for message in shaped]
        text = self.tokenizer.apply_chat_template(broken, **self._broken(kwargs, mark))
        return text.replace(mark, ""), self._encode_broken(text, mark)

    def _check_length(self, text: str, field: str) -> None:
        """Refuses a text without tokenising it, which can take a minute, if it is too long however it is cut."""
        if self._max_token_chars is None or len(text) < self.max_context * self._max_token_chars:
            return
        count = len(text) // self._max_token_chars
        raise self._too_long(f"at least {count} tokens ({len(text)} characters)", field)

    def _too_long(self, length: str, field: str) -> ApiError:
        # Clients recognise it by OpenAI's words.
        return wrong(
            f"this model's maximum context length is {self.max_context} tokens, for prompt and "
            f"answer, and the prompt has {length}: shorten it",
            field,
            "context_length_exceeded",
        )

    @cached_property
    def _max_token_chars(self) -> int | None:
        """The longest token; None where a tokenizer may drop characters. A token has no more characters than bytes."""
        tokenizer = self.tokenizer
        if not tokenizer.is_byte_level:
            return None
        ids = range(tokenizer.vocab_size)
        return max((len(tokenizer.token_bytes(i)) for i in ids), default=1)

    def checked(self, token_ids: list[int], field: str) -> list[int]:
        """Raises ApiError if a prompt leaves no room for an answer."""
        if len(token_ids) >= self.max_context:
            raise self._too_long(f"{len(token_ids)} tokens", field)
        return token_ids

    @cached_property
    def _special_tokens(self) -> dict[str, int]:
        found = self.tokenizer.raw.get_added_tokens_decoder()
        return {token.content: token_id for token_id, token in found.items()}

    @cached_property
    def _special_text(self) -> re.Pattern[str]:
        texts = sorted(self._special_tokens, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    @cached_property
    def _plain(self) -> RawTokenizer:
        """The same without any special tokens."""
        settings = json.loads(self.tokenizer.raw.to_str())
        settings["added_tokens"], settings["post_processor"] = [], None
        return RawTokenizer.from_str(json.dumps(settings))

    @cached_property
    def _takes_argument_text(self) -> bool:
        """Whether the template writes a call's JSON arguments as they are; others want the object, and write it."""
        function = {"name": "probe", "arguments": _PROBE_ARGUMENTS}
        call = {"id": "probe", "type": "function", "function": function}
        messages = [
            {"role": "user", "content": "probe"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "user", "content": "probe"},
        ]
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tools=[Tool("probe").for_template()]
            )
        except ValueError:
            return False
        return _PROBE_ARGUMENTS in text

    def _shaped(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of earlier calls as the template wants them: JSON text, or the object itself."""
        shaped = dict(message)
        if not shaped.get("tool_calls"):
            return shaped
        calls = []
        for call in shaped["tool_calls"]:
            function = dict(call["function"])
            if not self._takes_argument_text:
                function["arguments"] = json.loads(function["arguments"])
            calls.append({**call, "function": function})
        return {**shaped, "tool_calls": calls}

    def _broken_message(self, message: Mapping[str, Any], mark: str) -> Any:
        """An earlier answer may hold its thinking in tags: templates cut there."""
        kept = self.tokenizer.think_tags or () if message.get("role") == "assistant" else ()
        return self._broken(message, mark, kept)

    def _broken(self, value: Any, mark: str, kept: Sequence[str] = ()) -> Any:
        if isinstance(value, str):
            return self._special_text.sub(
                lambda m: m[0] if m[0] in kept else m[0][0] + mark + m[0][1:], value
            )
        if isinstance(value, Mapping):
            return {
                self._broken(k, mark, kept): self._broken(v, mark, kept) for k, v in value.items()
            }
        if isinstance(value, list | tuple):
            return [self._broken(item, mark, kept) for item in value]
        return value

    def _encode_broken(self, text: str, mark: str) -> list[int]:
        """Encodes a rendered text in which `mark` stands within everything that is no special token."""
        ids: list[int] = []
        at = 0
        for match in self._special_text.finditer(text):
            ids += self._encode_piece(text[at : match.start()], mark)
            ids.append(self._special_tokens[match[0]])
            at = match.end()
        return ids + self._encode_piece(text[at:], mark)

    def _encode_piece(self, text: str, mark: str) -> list[int]:
        if not text:
            return []
        if mark not in text:
            return self.tokenizer.encode(text, add_special_tokens=False)
        plain = text.replace(mark, "")
        try:
            plain.encode()
        except UnicodeEncodeError:
            return self.tokenizer.encode(plain)  # which says what is wrong
        ids: list[int] = self._plain.encode(plain, add_special_tokens=False).ids
        return ids
