"""Several answers that read each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from moejet.prompt_reader import Message
from moejet.reasoning.result import Candidate, Result
from moejet.reasoning.search.prompting import ask, conversation, reply
from moejet.reasoning.select import Majority, Select
from moejet.reasoning.task import Run, Task
from moejet.validation import checked, require_int


@dataclass(frozen=True, slots=True)
@checked
class Debate:
    """k answers; then for `rounds` rounds each reads the others' and answers again (arXiv 2305.14325).

    k=3 and 2 rounds, as published. It ends early once all agree. select: chooses among the last answers · heading,
    closing: what stands around the others' answers
    """

    k: int = 3
    rounds: int = 2
    select: Select = field(default_factory=Majority)
    stops_agreed: bool = True
    heading: str = "Others have answered the same question as follows."
    closing: str = "Where do they differ from you, and who is right? Then solve the question once more and answer it."

    def __post_init__(self) -> None:
        require_int("k", self.k, 2)
        require_int("rounds", self.rounds, 1)

    def run(self, task: Task) -> Run[Result]:
        messages = conversation(task)
        own: list[list[Message]] = [messages] * self.k
        branches = yield from task.open(self.k)  # the question is computed once
        segments = yield from task.complete(branches)
        answers = [
            task.candidate(branch, segment)
            for branch, segment in zip(branches, segments, strict=True)
        ]
        task.release(branches)
        history = [answers]
        for number in range(1, self.rounds + 1):
            yield from task.tell(
                "note", f"round {number}", answers=[answer.answer for answer in answers]
            )
            yield from task.classify(answer.answer for answer in answers)
            if task.is_ending or (self.stops_agreed and self._agree(task, answers)):
                break
            own = [
                reply(own[i], answers[i].content, self._others(answers, i)) for i in range(self.k)
            ]
            spoken = yield from task.gather([ask(task, messages) for messages in own])
            answers = [answer for answer in spoken if answer is not None]
            history.append(answers)
        # Who was cut off keeps what it said before.
        final = [
            next((said[i] for said in reversed(history) if said[i].answer is not None), answers[i])
            for i in range(self.k)
        ]
        result = yield from self.select.choose(task, final)
        rounds = [[answer.answer for answer in said] for said in history]
        return replace(result, details={**result.details, "rounds": rounds})

    def _others(self, answers: Sequence[Candidate], own: int) -> str:
        said = [answer.content for i, answer in enumerate(answers) if i != own]
        parts = [f"Answer {number}:\n{text}" for number, text in enumerate(said, 1)]
        return "\n\n".join([self.heading, *parts, self.closing])

    def _agree(self, task: Task, answers: Sequence[Candidate]) -> bool:
        given = [answer.answer for answer in answers]
        return task.answers.count(given[0], given) == len(given)
