"""Prompts as users give them: texts, token ids or conversations, to token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

from moejet.tokenizer import Tokenizer
from moejet.validation import require_ids, short

Message = Mapping[str, Any]


class PromptReader:
    """Results are a prompt's text, None if it was given as token ids, and its tokens. Any thread may ask.

    Raises ValueError for what is no prompt, and for texts where the model has no tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer | None):
        self._tokenizer = tokenizer

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise ValueError("this model has no tokenizer: pass token ids instead of text")
        return self._tokenizer

    def read(
        self, prompt: str | Sequence[int] | Sequence[Message], template_kwargs: dict[str, Any]
    ) -> tuple[str | None, list[int]]:
        """A text, token ids, or a conversation."""
        is_list = isinstance(prompt, Sequence) and not isinstance(prompt, str)
        if is_list and prompt and isinstance(prompt[0], Mapping):
            return self.render(cast(Sequence[Message], prompt), template_kwargs)
        if template_kwargs:
            raise ValueError(
                f"template_kwargs={short(template_kwargs)}: a text has no chat template; pass messages"
            )
        return self.tokenise(prompt)

    def tokenise(self, prompt: Any) -> tuple[str | None, list[int]]:
        """A text or token ids, which are checked."""
        if isinstance(prompt, str):
            if not prompt:
                raise ValueError("the prompt is empty: it needs at least one token")
            return prompt, self.tokenizer.encode(prompt)
        if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
            raise ValueError(f"a prompt must be text or a list of token ids, not {kind(prompt)}")
        return None, require_ids("prompt", prompt)

    def render(
        self, messages: Sequence[Message], template_kwargs: dict[str, Any]
    ) -> tuple[str | None, list[int]]:
        """A conversation, through the chat template."""
        if "add_generation_prompt" in template_kwargs:
            raise ValueError(
                "add_generation_prompt cannot be set here: chat always asks for a reply"
            )
        text = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, **template_kwargs
        )
        return text, self.tokenizer.encode(text, add_special_tokens=False)


def kind(value: object) -> str:
    """What a value is, for messages about it."""
    return type(value).__name__
