"""Asking a model something else in the course of a strategy: what the programs of prompts share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moejet.llm import LLM
from moejet.prompt_reader import Message
from moejet.reasoning.result import Candidate
from moejet.reasoning.task import Run, Task
from moejet.request import SamplingParams


def conversation(task: Task) -> list[Message]:
    """The conversation to be answered; a prompt that was given as a text is its only message."""
    if task.messages:
        return list(task.messages)
    if task.prompt is None:
        raise ValueError(
            "this strategy asks the model further questions: give messages or a text, not token ids"
        )
    return [{"role": "user", "content": task.prompt}]


def question(task: Task) -> str:
    """What the user said last."""
    return text_of(conversation(task)[-1])


def text_of(message: Message) -> str:
    """The text of a message, whose content may be a list of parts."""
    content: Any = message["content"]
    if isinstance(content, str):
        return content
    return "".join(part.get("text", "") for part in content or ())


def with_question(task: Task, text: str) -> list[Message]:
    """The conversation with another last message of the user."""
    messages = conversation(task)
    return [*messages[:-1], {**messages[-1], "content": text}]


def reply(messages: Sequence[Message], answer: str, more: str) -> list[Message]:
    """A conversation that has gone on by an answer and what the user says to it."""
    return [
        *messages,
        {"role": "assistant", "content": answer},
        {"role": "user", "content": more},
    ]


def ask(
    task: Task,
    messages: Sequence[Message],
    *,
    llm: LLM | None = None,
    params: SamplingParams | None = None,
) -> Run[Candidate]:
    """One answer to a conversation. What begins like earlier ones is found in the cache."""
    child = yield from task.on(messages, llm=llm, params=params)
    [branch] = yield from child.open()
    [segment] = yield from child.complete([branch])
    candidate = child.candidate(branch, segment)
    child.close()
    return candidate
