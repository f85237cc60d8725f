"""Small programs of prompts: think step by step, plan and solve, criticise and improve."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from moejet.reasoning.result import Candidate, Result
from moejet.reasoning.search.prompting import ask, conversation, question, reply, with_question
from moejet.reasoning.single import Single
from moejet.reasoning.task import Run, Strategy, Task
from moejet.validation import checked, require_int, require_text


@dataclass(frozen=True, slots=True)
@checked
class ChainOfThought:
    """The question with an instruction to think first (arXiv 2205.11916), for models that do not by themselves."""

    instruction: str = "Work through this one step after the other before you give the answer."
    inner: Strategy = field(default_factory=Single)

    def run(self, task: Task) -> Run[Result]:
        messages = with_question(task, f"{question(task)}\n\n{self.instruction}")
        asked = yield from task.on(messages)
        result = yield from self.inner.run(asked)
        return result


@dataclass(frozen=True, slots=True)
@checked
class PlanAndSolve:
    """A plan first, then `inner` carries it out in the same conversation (arXiv 2305.04091)."""

    plan: str = "Do not solve this yet. Say what is given and what is asked, and write a short plan of numbered steps."
    solve: str = "Now carry out the plan, step by step, with every intermediate result, and then give the answer."
    inner: Strategy = field(default_factory=Single)

    def run(self, task: Task) -> Run[Result]:
        messages = with_question(task, f"{question(task)}\n\n{self.plan}")
        plan = yield from ask(task, messages)
        yield from task.tell("note", "a plan has been made", plan=plan.content)
        asked = yield from task.on(reply(messages, plan.content, self.solve))
        result = yield from self.inner.run(asked)
        return replace(result, details={**result.details, "plan": plan.content})


@dataclass(frozen=True, slots=True)
@checked
class SelfCritique:
    """The model criticises its answer and improves it, at most `rounds` times (Self-Refine, arXiv 2303.17651).

    accept: a critique that holds this, in whatever letters, ends it. Confidence is not told: a model's word on its own
    work is weak evidence.
    """

    rounds: int = 2
    inner: Strategy = field(default_factory=Single)
    criticise: str = (
        "Check the answer above line by line. Name each mistake and where it is. "
        "If there is none, reply only: NO MISTAKES"
    )
    improve: str = (
        "Write the whole solution again without these mistakes, and then give the answer."
    )
    accept: str = "no mistakes"

    def __post_init__(self) -> None:
        require_int("rounds", self.rounds, 1)
        require_text("accept", self.accept)

    def run(self, task: Task) -> Run[Result]:
        result = yield from self.inner.run(task)
        candidates: list[Candidate] = [result.candidate]
        critiques: list[str] = []
        messages = conversation(task)
        for number in range(1, self.rounds + 1):
            if task.is_ending:
                break
            messages = reply(messages, candidates[-1].content, self.criticise)
            critique = yield from ask(task, messages)
            critiques.append(critique.content)
            if self.accept.casefold() in critique.content.casefold():
                yield from task.tell("stop", f"critique {number} finds no mistakes")
                break
            if task.is_ending:
                break
            messages = reply(messages, critique.content, self.improve)
            candidates.append((yield from ask(task, messages)))
            answer = candidates[-1].answer
            yield from task.tell("candidate", f"improvement {number}: {answer}", answer=answer)
        last = next((c for c in reversed(candidates) if c.answer is not None), candidates[-1])
        return Result(last, tuple(candidates), details={"critiques": critiques})
