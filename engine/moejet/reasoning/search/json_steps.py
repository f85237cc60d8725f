"""Steps as JSON objects, for models that do not think by themselves."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from moejet.grammar import Grammar
from moejet.prompt_reader import Message
from moejet.reasoning.result import Candidate, Result
from moejet.reasoning.search.prompting import ask, question, reply, with_question
from moejet.reasoning.search.tree import Tree
from moejet.reasoning.task import Run, Task
from moejet.request import SamplingParams
from moejet.validation import checked, require_int

CONTINUE, FINAL = "continue", "final_answer"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "minLength": 1, "maxLength": 80},
        "content": {"type": "string", "minLength": 1},
        "next_action": {"enum": [CONTINUE, FINAL]},
    },
    "required": ["title", "content", "next_action"],
    "additionalProperties": False,
}


@dataclass(frozen=True, slots=True)
@checked
class JsonSteps:
    """One JSON object per step, {title, content, next_action}, until the model wants to answer, as g1 does.

    The answer is then written freely. Numbers as in g1: 25 steps of 300 tokens at temperature 0.2, an answer of 1200;
    a step that is no such object is asked for again, 3 times in all, after which the answer has to do without it.
    is_constrained: a grammar keeps steps in form (needs `moejet[grammar]`); they can still be cut off
    """

    max_steps: int = 25
    max_tokens: int = 300
    answer_tokens: int = 1200
    tries: int = 3
    temperature: float = 0.2
    is_constrained: bool = True
    instruction: str = (
        "Solve this in steps. Reply with a single JSON object for each step: "
        '{"title": what the step does, "content": the step worked out, "next_action": "continue" or "final_answer"}. '
        "Take at least three steps. Try a second way to the result, and ask yourself where you could be wrong, before "
        'you choose "final_answer".'
    )
    go_on: str = "Next step."
    finish: str = "Now give the final answer in plain words, without JSON."

    def __post_init__(self) -> None:
        for name in ("max_steps", "max_tokens", "answer_tokens", "tries"):
            require_int(name, getattr(self, name), 1)

    def run(self, task: Task) -> Run[Result]:
        params = self._params(task)
        tree, steps = Tree(), list[dict[str, str]]()
        messages = with_question(task, f"{self.instruction}\n\n{question(task)}")
        spent, node, is_last = 0, 0, False
        while not is_last and not task.is_ending:
            step, text, tokens = yield from self._step(task, messages, params)
            spent += tokens
            if step is None:
                break
            steps.append(step)
            is_last = step["next_action"] == FINAL or len(steps) == self.max_steps
            node = tree.add(node, f"{step['title']}\n{step['content']}", state="chosen")
            yield from tree.tell(task, [node], f"step {len(steps)}: {step['title']}")
            messages = reply(messages, text, self.finish if is_last else self.go_on)
        if not is_last:
            messages = [*messages[:-1], _with_more(messages[-1], self.finish)]
        answer = yield from ask(
            task, messages, params=replace(task.params, max_tokens=self.answer_tokens)
        )
        reasoning = "\n\n".join(f"{step['title']}\n{step['content']}" for step in steps)
        candidate = replace(
            answer,
            reasoning="\n\n".join(part for part in (reasoning, answer.reasoning) if part) or None,
            num_tokens=answer.num_tokens + spent,
            parent=node,
        )
        return Result(candidate, (candidate,), nodes=tree.nodes, details={"steps": steps})

    def _step(
        self, task: Task, messages: list[Message], params: SamplingParams
    ) -> Run[tuple[dict[str, str] | None, str, int]]:
        """A step, its text, and what all tries took."""
        spent = 0
        for _ in range(self.tries):
            said: Candidate = yield from ask(task, messages, params=params)
            spent += said.num_tokens
            step = parse_step(said.content)
            if step is not None:
                return step, said.content, spent
            if task.is_ending:
                break
        yield from task.tell("note", f"no valid step in {self.tries} tries")
        return None, "", spent

    def _params(self, task: Task) -> SamplingParams:
        """Steps take the place of the thinking."""
        params = replace(task.params, max_tokens=self.max_tokens, temperature=self.temperature)
        if self.is_constrained:
            params = replace(params, grammar=Grammar.json_schema(SCHEMA))
        if task.tokenizer.think_tags is not None:
            params = replace(params, max_thinking_tokens=0)
        return params


def parse_step(text: str) -> dict[str, str] | None:
    """The step that a text is; None if it is none."""
    begin, end = text.find("{"), text.rfind("}")
    try:
        step = json.loads(text[begin : end + 1])
    except (json.JSONDecodeError, RecursionError):
        return None
    if not isinstance(step, dict) or step.get("next_action") not in (CONTINUE, FINAL):
        return None
    fields = {name: step.get(name) for name in SCHEMA["required"]}
    if not all(isinstance(value, str) and value for value in fields.values()):
        return None
    return {name: str(value) for name, value in fields.items()}


def _with_more(message: Message, text: str) -> Message:
    return {**message, "content": f"{message['content']}\n\n{text}"}
