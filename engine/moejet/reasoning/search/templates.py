"""Thought templates: a library, its retrieval, and a planner and a worker that solve problems with it."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import resources
from pathlib import Path

from moejet.llm import LLM
from moejet.reasoning.result import Result
from moejet.reasoning.search.prompting import ask, question, with_question
from moejet.reasoning.search.tree import Tree
from moejet.reasoning.task import Run, Task
from moejet.validation import checked, require_int

_K1, _B = 1.5, 0.75  # of BM25: how soon repetition saturates, how much length counts
_ITEM = re.compile(r"^\s*(?:\d+[.):]|[-*])\s+(.+?)\s*$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
@checked
class Template:
    """A way to solve a kind of problem. section: its chapter · when: what it fits"""

    name: str
    section: str
    tags: tuple[str, ...]
    when: str
    steps: tuple[str, ...]

    @property
    def text(self) -> str:
        """As a model reads it."""
        steps = "\n".join(f"{number}. {step}" for number, step in enumerate(self.steps, 1))
        return f"{self.name} ({self.section})\nFits when: {self.when}\n{steps}"


@dataclass(frozen=True)
@checked
class Library:
    """Templates and their retrieval by BM25 (Robertson and Zaragoza, 2009) over name, section, tags and use."""

    templates: tuple[Template, ...]

    def __post_init__(self) -> None:
        if not self.templates:
            raise ValueError("templates is empty: a library needs at least one")

    @classmethod
    def load(cls, path: str | Path | None = None) -> Library:
        """From a JSON file, a list of objects with the fields of `Template`; None: the library of the package."""
        if path is None:
            text = resources.files(__package__).joinpath("templates.json").read_text("utf-8")
        else:
            text = Path(path).read_text("utf-8")
        try:
            return cls(
                tuple(
                    Template(
                        name=entry["name"],
                        section=entry["section"],
                        tags=tuple(entry["tags"]),
                        when=entry["when"],
                        steps=tuple(entry["steps"]),
                    )
                    for entry in json.loads(text)
                )
            )
        except (json.JSONDecodeError, KeyError, TypeError, RecursionError) as error:
            fields = ", ".join(Template.__dataclass_fields__)
            raise ValueError(f"{path} is no list of objects with {fields}: {error!r}") from error

    def find(self, query: str, count: int = 1) -> list[tuple[Template, float]]:
        """The templates that fit a text best, with their scores, best first; of equals the earlier one."""
        words = set(_words(query))
        scores = [
            sum(self._weight(word, number) for word in words) for number in range(len(self._counts))
        ]
        order = sorted(range(len(scores)), key=lambda number: -scores[number])
        return [(self.templates[number], scores[number]) for number in order[:count]]

    @cached_property
    def _counts(self) -> list[Counter[str]]:
        return [
            Counter(_words(" ".join((t.name, t.section, *t.tags, t.when)))) for t in self.templates
        ]

    @cached_property
    def _frequencies(self) -> Counter[str]:
        """In how many templates a word occurs."""
        return Counter(word for counts in self._counts for word in counts)

    def _weight(self, word: str, number: int) -> float:
        counts = self._counts[number]
        if word not in counts:
            return 0.0
        total, frequency = len(self._counts), self._frequencies[word]
        rarity = math.log(1 + (total - frequency + 0.5) / (frequency + 0.5))
        mean = sum(c.total() for c in self._counts) / total
        length = 1 - _B + _B * counts.total() / mean
        return rarity * counts[word] * (_K1 + 1) / (counts[word] + _K1 * length)


@dataclass(frozen=True, slots=True)
@checked
class Templates:
    """A navigator plans, a worker carries out each step by the template that fits it (ReasonFlux, arXiv 2502.06772).

    The navigator sees what came of a step and says whether to go on, to change the next step, or that it is done; at
    most `iterations` steps, 10 as published. Then the worker answers. navigator, worker: None for the task's own model
    """

    library: Library = field(default_factory=Library.load)
    navigator: LLM | None = None
    worker: LLM | None = None
    iterations: int = 10
    plan: str = (
        "Problem:\n{problem}\n\nPlan how to solve it, without solving it: a numbered list of few steps, "
        "each naming the technique that it uses."
    )
    work: str = (
        "Problem:\n{problem}\n\nFound so far:\n{found}\n\nA way that may fit:\n{template}\n\n"
        "Carry out only this step, and say what comes of it: {step}"
    )
    review: str = (
        "Problem:\n{problem}\n\nFound so far:\n{found}\n\nNext steps:\n{rest}\n\n"
        "Reply NEXT to go on with them, DONE if the problem is solved, or CHANGE: and another next step."
    )
    answer: str = "Problem:\n{problem}\n\nFound so far:\n{found}\n\nGive the answer to the problem."

    def __post_init__(self) -> None:
        require_int("iterations", self.iterations, 1)

    def run(self, task: Task) -> Run[Result]:
        problem, tree, node = question(task), Tree(), 0
        plan = yield from self._say(task, self.navigator, self.plan, problem=problem)
        steps = _ITEM.findall(plan) or [line for line in plan.splitlines() if line.strip()]
        rest, found, used = list(steps), list[str](), list[str]()
        yield from task.tell("note", f"a plan of {len(rest)} steps", plan=list(rest))
        while rest and len(found) < self.iterations and not task.is_ending:
            step = rest.pop(0)
            [(template, _)] = self.library.find(f"{step} {problem}")
            used.append(template.name)
            said = yield from self._say(
                task,
                self.worker,
                self.work,
                problem=problem,
                found=_listed(found),
                template=template.text,
                step=step,
            )
            found.append(f"{step}: {said.strip()}")
            node = tree.add(node, found[-1], state="chosen")
            yield from tree.tell(task, [node], f"step {len(found)}: {template.name}")
            if not rest or task.is_ending:
                break
            verdict = yield from self._say(
                task,
                self.navigator,
                self.review,
                problem=problem,
                found=_listed(found),
                rest=_listed(rest),
            )
            rest = _revised(rest, verdict)
        messages = with_question(task, self.answer.format(problem=problem, found=_listed(found)))
        candidate = yield from ask(task, messages, llm=self.worker)
        parts = [*found, *([candidate.reasoning] if candidate.reasoning else [])]
        candidate = replace(candidate, reasoning="\n\n".join(parts) or None, parent=node)
        details = {"plan": steps, "templates": used}
        return Result(candidate, (candidate,), nodes=tree.nodes, details=details)

    def _say(self, task: Task, llm: LLM | None, prompt: str, **parts: str) -> Run[str]:
        candidate = yield from ask(task, with_question(task, prompt.format(**parts)), llm=llm)
        return candidate.content


def _revised(rest: Sequence[str], verdict: str) -> list[str]:
    """What is left to do, after the navigator has spoken; anything unclear changes nothing."""
    said = verdict.strip()
    if said.upper().startswith("DONE"):
        return []
    if said.upper().startswith("CHANGE:") and (changed := said[len("CHANGE:") :].strip()):
        return [changed.splitlines()[0], *rest[1:]]
    return list(rest)


def _listed(items: Sequence[str]) -> str:
    return "\n".join(f"{number}. {item}" for number, item in enumerate(items, 1)) or "nothing yet"


def _words(text: str) -> list[str]:
    """Lower-case words; a plural s is dropped, since queries and templates use both."""
    words = re.findall(r"[a-z0-9]+", text.casefold())
    return [w[:-1] if len(w) > 3 and w.endswith("s") and not w.endswith("ss") else w for w in words]
