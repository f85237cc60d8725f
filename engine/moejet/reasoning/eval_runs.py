"""Runs of strategies over a file of problems, graded, and kept in a file that a later run goes on with.

A results file is JSON lines: the settings first, then one line for each run of a strategy on a problem, written as soon
as it has ended. A last line that was cut off in writing is dropped when the file is opened again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from moejet.llm import LLM
from moejet.reasoning.answers import AnswerKey, Choice, LastNumber
from moejet.reasoning.budget import Budget
from moejet.reasoning.datasets import Problem, Shape
from moejet.reasoning.equality import NumericEqual
from moejet.reasoning.metrics import Solution
from moejet.reasoning.result import Candidate, Result, Usage, json_value
from moejet.reasoning.solver import Prompt, solve_many
from moejet.reasoning.task import Run, Strategy, Task
from moejet.request import SamplingParams
from moejet.sampler import derive_seed
from moejet.tokenizer import Tokenizer

KIND = "moejet-eval"
_START = f'{{"kind": "{KIND}"'.encode()
BOXED = "Please reason step by step, and put your final answer within \\boxed{}."
INSTRUCTIONS: Mapping[Shape, str] = {
    "aime": BOXED,
    "math500": BOXED,
    "gsm8k": BOXED,
    "gpqa": "Please reason step by step, and end with the line 'Answer: X', where X is the letter of your choice.",
    "plain": "",
}
REFLECTION_WORDS = (
    "wait",
    "hmm",
    "alternatively",
    "let me check",
    "let me double-check",
    "let me verify",
    "let me re-check",
    "let me rethink",
    "let me reconsider",
    "on second thought",
    "hold on",
    "recheck",
    "re-examine",
    "mistake",
)
_TURN = re.compile(rf"(?<!\w)(?={'|'.join(re.escape(w) for w in REFLECTION_WORDS)})", re.IGNORECASE)

Key = tuple[str, str, int]  # strategy, problem, sample


@dataclass(frozen=True, slots=True)
class Row:
    """One run: a strategy's answer to a problem.

    confidence: as `Result`, None if it could not tell · logprob, mean_logprob: of the chosen candidate's tokens; None
    is minus infinity · solutions: attempts at the answer within its text
    """

    strategy: str
    problem: str
    sample: int
    seed: int
    correct: bool
    answer: str | None
    confidence: float | None
    logprob: float | None
    mean_logprob: float | None
    finish_reason: str
    is_exhausted: bool
    num_candidates: int
    usage: Usage
    solutions: tuple[Solution, ...] = ()
    text: str | None = None

    @property
    def key(self) -> Key:
        return self.strategy, self.problem, self.sample

    def to_json(self) -> str:
        return json.dumps(json_value(asdict(self)), allow_nan=False)

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Row:
        usage, solutions = Usage(**fields.pop("usage")), fields.pop("solutions")
        return cls(**fields, usage=usage, solutions=tuple(Solution(**s) for s in solutions))


@dataclass(frozen=True, slots=True)
class Job:
    """A run to be done: sample number `sample` of a problem."""

    problem: Problem
    sample: int
    seed: int


def jobs_of(
    problems: Sequence[Problem], samples: int, seed: int, *, limit: int | None = None
) -> list[Job]:
    """Seeds depend on the seed, the place of the problem in its file, and the sample only: strategies are paired."""
    return [
        # From 1 on: number 0 would keep the seed, and runs of different problems would share theirs.
        Job(problem, sample, derive_seed(derive_seed(seed, 1 + number), 1 + sample))
        for number, problem in enumerate(problems[:limit])
        for sample in range(samples)
    ]


@dataclass(frozen=True)
class Graded:
    """A strategy whose answers are compared with the right ones once they are given, in the background.

    jobs: by the seed of their run. What the strategy itself sees knows nothing of the right answer.
    """

    inner: Strategy
    key: AnswerKey
    shape: Shape
    jobs: Mapping[int, Job]

    def run(self, task: Task) -> Run[Result]:
        result = yield from self.inner.run(task)
        right = self.jobs[task.ledger.seed].problem.answer
        answer = result.answer
        correct = answer is not None and (
            yield from task.background(lambda: self.key.equal(answer, right))
        )
        solutions = yield from task.background(
            lambda: attempts(result.candidate, right, self.shape, task.tokenizer)
        )
        graded = {"eval_correct": correct, "eval_solutions": solutions}
        return replace(result, details={**result.details, **graded})


def attempts(
    candidate: Candidate, right: str, shape: Shape, tokenizer: Tokenizer
) -> tuple[Solution, ...]:
    """What a text is made of: attempts at the answer, each up to the words with which the next one begins.

    A new attempt begins where the thinking looks back ("wait", "let me check", ...: REFLECTION_WORDS), and
    with the answer. The answer of an attempt is its last number, or its letter; an attempt without one belongs to the
    next.
    """
    extract = Choice() if shape == "gpqa" else LastNumber()
    equal: Callable[[str, str], bool] = str.__eq__ if shape == "gpqa" else NumericEqual()
    found: list[Solution] = []
    pending = ""
    for piece in (*_TURN.split(candidate.reasoning or ""), candidate.content):
        pending += piece
        answer = extract(piece)
        if answer is None:
            continue
        found.append(Solution(_count(pending, tokenizer), answer, equal(answer, right)))
        pending = ""
    if found and pending:
        last = found.pop()
        found.append(replace(last, tokens=last.tokens + _count(pending, tokenizer)))
    return tuple(found)


def _count(text: str, tokenizer: Tokenizer) -> int:
    return max(1, len(tokenizer.encode(text, add_special_tokens=False)))


def prompt_of(
    llm: LLM,
    problem: Problem,
    *,
    instruction: str,
    system: str | None,
    template: Mapping[str, Any],
) -> Prompt:
    """The problem as the model is asked. Raises ValueError, naming the problem, if the model cannot read it.

    template: what the chat template is told
    """
    text = f"{problem.prompt}\n\n{instruction}" if instruction else problem.prompt
    messages = [] if system is None else [{"role": "system", "content": system}]
    messages.append({"role": "user", "content": text})
    _, token_ids = llm.read_prompt(messages, **template)
    if len(token_ids) >= llm.max_context:
        raise ValueError(
            f"problem {problem.id!r} has {len(token_ids)} tokens, max_context={llm.max_context} "
            "leaves no room for an answer: raise --max-context or remove the problem"
        )
    return messages


def run_jobs(
    llm: LLM,
    spec: str,
    strategy: Strategy,
    jobs: Sequence[Job],
    prompts: Mapping[str, Prompt],
    *,
    key: AnswerKey,
    shape: Shape,
    template: Mapping[str, Any],
    params: SamplingParams,
    budget: Budget,
    concurrency: int,
    keep_text: bool,
    on_row: Callable[[Row], None],
) -> None:
    """Does the jobs in common steps; on_row gets each as soon as it is done. prompts: by the problem's id."""

    def done(index: int, result: Result) -> None:
        on_row(_row(spec, jobs[index], result, keep_text))

    solve_many(
        llm,
        [prompts[job.problem.id] for job in jobs],
        Graded(strategy, key, shape, {job.seed: job for job in jobs}),
        params=params,
        budget=budget,
        seeds=[job.seed for job in jobs],
        answers=key,
        template_kwargs=template,
        concurrency=concurrency,
        on_result=done,
    )


def _row(spec: str, job: Job, result: Result, keep_text: bool) -> Row:
    chosen = result.candidate
    return Row(
        strategy=spec,
        problem=job.problem.id,
        sample=job.sample,
        seed=job.seed,
        correct=bool(result.details["eval_correct"]),
        answer=result.answer,
        confidence=None if math.isnan(result.confidence) else result.confidence,
        logprob=chosen.logprob,
        mean_logprob=chosen.mean.logprob,
        finish_reason=chosen.finish_reason,
        is_exhausted=result.is_exhausted,
        num_candidates=len(result.candidates),
        usage=result.usage,
        solutions=result.details["eval_solutions"],
        text=result.text if keep_text else None,
    )


def digest_of(problems: Sequence[Problem]) -> str:
    """Of what is asked and what is right."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps([problem.id, problem.prompt, problem.answer]).encode())
    return digest.hexdigest()


@dataclass
class ResultsFile:
    """Rows on disk, or in memory only (path None). Use `open`."""

    path: Path | None
    rows: dict[Key, Row] = field(default_factory=dict)
    _fd: int = -1

    @classmethod
    def open(
        cls, path: Path | None, settings: Mapping[str, Any], *, resume: bool = False
    ) -> ResultsFile:
        """A new file, or one that is there if `resume`. Raises ValueError if that was written with other settings."""
        results = cls(path)
        if path is None:
            return results
        try:
            there = path.read_bytes()
        except FileNotFoundError:
            there = b""
        if there and not resume:
            raise ValueError(f"{path} exists: go on with it (--resume) or choose another --out")
        if there and not there.startswith(_START[: len(there)]):
            raise ValueError(f"{path} holds no results of 'moejet eval': choose another --out")
        head = json.dumps({"kind": KIND, "settings": settings}, allow_nan=False)
        whole = there[: there.rfind(b"\n") + 1]  # what follows was cut off in writing
        if whole:
            results._read(whole, json.loads(head)["settings"])
        results._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:
            fcntl.flock(results._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{path} is being written by another process") from error
        os.ftruncate(results._fd, len(whole))
        if not whole:
            results._write(head)
        return results

    def add(self, row: Row) -> None:
        self._write(row.to_json())
        self.rows[row.key] = row

    def close(self) -> None:
        if self._fd >= 0:
            os.fsync(self._fd)
            os.close(self._fd)
            self._fd = -1

    def _write(self, line: str) -> None:
        data = f"{line}\n".encode()
        while data and self._fd >= 0:
            data = data[os.write(self._fd, data) :]

    def _read(self, data: bytes, settings: Mapping[str, Any]) -> None:
        lines = _objects(data, self.path)
        written = next(lines).get("settings") or {}
        for name in dict.fromkeys([*settings, *written]):
            if settings.get(name) != written.get(name):
                raise ValueError(
                    f"{self.path} was written with {name}={written.get(name)!r}, this is "
                    f"{name}={settings.get(name)!r}: use the same, or another --out"
                )
        for fields in lines:
            try:
                row = Row.from_fields(fields)
            except (KeyError, TypeError) as error:
                raise ValueError(f"{self.path} holds a line that is no result: {error}") from error
            self.rows[row.key] = row


def _objects(data: bytes, path: Path | None) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(data.splitlines(), 1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: no JSON ({error})") from error
        if not isinstance(value, dict):
            raise ValueError(f"{path}, line {number}: no JSON object")
        yield value
