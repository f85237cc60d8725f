"""Answering prompts by strategies.

>>> from moejet import LLM
>>> from moejet.reasoning import Majority, Sample, solve
>>> with LLM() as llm:
...     result = solve(llm, [{"role": "user", "content": "Start with 17, add 25."}], Sample(16, select=Majority()))
...     print(result.answer, result.confidence, result.usage)
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor
from concurrent.futures import wait as wait_for_futures
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from moejet.llm import LLM
from moejet.prompt_reader import Message
from moejet.reasoning.answer_classes import Answers
from moejet.reasoning.budget import Budget
from moejet.reasoning.driver import Driver
from moejet.reasoning.ledger import Ledger
from moejet.reasoning.result import Progress, Result
from moejet.reasoning.task import Render, Run, Strategy, Task, messages_of
from moejet.request import SamplingParams
from moejet.validation import require_ids, require_int, require_text, require_type, short

_THREADS = 4  # for what runs in the background
Prompt = str | Sequence[int] | Sequence[Message]


def solve(
    llm: LLM,
    prompt: Prompt,
    strategy: Strategy,
    *,
    params: SamplingParams | None = None,
    budget: Budget | None = None,
    seed: int = 0,
    answers: Answers | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    watch: Callable[[Progress], None] | None = None,
) -> Result:
    """Answers a prompt (text, token ids, or messages) by a strategy.

    params: how candidates are sampled, the model's own recommendation unless given · seed: decides everything random ·
    answers: finds answers in texts and compares them, `AnswerKey()` unless given · template_kwargs: for the chat
    template · watch: gets the progress
    Raises what the strategy raises; ValueError for a wrong prompt.
    """
    _check_functions(watch=watch)
    require_int("seed", seed, -(2**63), 2**64 - 1)
    [result] = solve_many(
        llm,
        [prompt],
        strategy,
        params=params,
        budget=budget,
        seeds=[seed],
        answers=answers,
        template_kwargs=template_kwargs,
        watch=None if watch is None else lambda _, progress: watch(progress),
    )
    return result


def solve_many(
    llm: LLM,
    prompts: Sequence[Prompt],
    strategy: Strategy,
    *,
    params: SamplingParams | None = None,
    budget: Budget | None = None,
    seeds: Sequence[int] | None = None,
    answers: Answers | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
    concurrency: int = 8,
    watch: Callable[[int, Progress], None] | None = None,
    on_result: Callable[[int, Result], None] | None = None,
) -> list[Result]:
    """Answers each prompt on its own, `concurrency` of them at the same time in common steps.

    seeds: of each prompt, its number unless given · on_result: called with a prompt's number as soon as it is done.
    The first error ends all.
    """
    check_strategy(strategy)
    require_type("llm", llm, LLM)
    require_int("concurrency", concurrency, 1)
    _check_functions(watch=watch, on_result=on_result)
    if not isinstance(prompts, Sequence) or isinstance(prompts, str | bytes):
        raise ValueError(f"prompts={short(prompts)} must be a list of prompts; solve answers one")
    if seeds is not None and len(require_ids("seeds", seeds)) != len(prompts):
        raise ValueError(
            f"seeds={short(seeds)} has {len(seeds)} entries for {len(prompts)} prompts: give one for each"
        )
    results: dict[int, Result] = {}
    errors: list[BaseException] = []

    def ended(index: int, result: Any, error: BaseException | None) -> None:
        if error is not None:
            errors.append(error)
            return
        results[index] = result
        if on_result is not None:
            on_result(index, result)

    with _driving() as driver:
        for index, prompt in enumerate(prompts):
            while driver.num_runs >= concurrency:
                _step(driver)
            if errors:
                break
            seed = index if seeds is None else seeds[index]
            task = make_task(llm, prompt, params, budget, seed, answers, template_kwargs)
            driver.start(
                supervised(task, strategy),
                task.ledger,
                watch=_ignore if watch is None else partial(watch, index),
                end=partial(ended, index),
            )
        while driver.num_runs and not errors:
            _step(driver)
    if errors:
        raise errors[0]
    return [results[index] for index in range(len(prompts))]


def stream(
    llm: LLM,
    prompt: Prompt,
    strategy: Strategy,
    *,
    params: SamplingParams | None = None,
    budget: Budget | None = None,
    seed: int = 0,
    answers: Answers | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Iterator[Progress | Result]:
    """As `solve`, with the progress as it comes and the result at the end. Closing the iterator ends the run."""
    check_strategy(strategy)
    events: deque[Progress | Result] = deque()
    errors: list[BaseException] = []

    def ended(result: Any, error: BaseException | None) -> None:
        if error is not None:
            errors.append(error)
        else:
            events.append(result)

    with _driving() as driver:
        task = make_task(llm, prompt, params, budget, seed, answers, template_kwargs)
        driver.start(supervised(task, strategy), task.ledger, watch=events.append, end=ended)
        while driver.num_runs or events:
            while events:
                yield events.popleft()
            if errors:
                break
            if driver.num_runs:
                _step(driver)
    if errors:
        raise errors[0]


def _check_functions(**functions: object) -> None:
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise ValueError(f"{name}={short(function)} must be a function or None")


def _ignore(progress: Progress) -> None:
    pass


@contextmanager
def _driving() -> Iterator[Driver]:
    executor = ThreadPoolExecutor(_THREADS, thread_name_prefix="moejet-strategy")
    driver = Driver(executor)
    try:
        yield driver
    finally:
        driver.cancel_all()
        executor.shutdown(wait=False, cancel_futures=True)


def _step(driver: Driver) -> None:
    """One step of every model that has something to do; else waits for the background."""
    requests = driver.requests()
    if not requests and (futures := driver.futures()):
        wait_for_futures(futures, return_when=FIRST_COMPLETED)
    driver.take_futures()
    for llm, ids in requests.items():
        assert isinstance(llm, LLM), f"{llm=}"
        ended = llm.wait(ids, max_steps=1)
        driver.charge(llm)
        driver.deliver(llm, ended)


def make_task(
    llm: LLM,
    prompt: Prompt,
    params: SamplingParams | None,
    budget: Budget | None,
    seed: int,
    answers: Answers | None,
    template_kwargs: Mapping[str, Any] | None = None,
    messages: Sequence[Message] | None = None,
    render: Render | None = None,
) -> Task:
    """The task of a new run; arguments as of `solve`. Raises ValueError for a wrong prompt. Any thread may call it.

    messages: of which a prompt of token ids was made · render: makes prompts of further conversations
    """
    require_type("llm", llm, LLM)
    _check_optional(template_kwargs=(template_kwargs, Mapping), budget=(budget, Budget))
    _check_optional(params=(params, SamplingParams), messages=(messages, Sequence))
    require_int("seed", seed, -(2**63), 2**64 - 1)
    _check_functions(render=render)
    if messages is not None and not all(isinstance(m, Mapping) and m for m in messages):
        raise ValueError(f"messages={short(messages)} must be messages, as {{'role': 'user', ...}}")
    if answers is not None and not isinstance(answers, Answers):
        raise ValueError(f"answers={short(answers)} must be an object as AnswerKey()")
    for key in template_kwargs or {}:
        require_text("template_kwargs' name", key)
    kwargs = dict(template_kwargs or {})
    text, token_ids = llm.read_prompt(prompt, **kwargs)
    if answers is None:
        from moejet.reasoning.answers import AnswerKey

        answers = AnswerKey()
    params = llm.default_sampling() if params is None else params
    return Task(
        llm,
        token_ids,
        text,
        params=replace(params, cache_salt=None),
        answers=answers,
        ledger=Ledger(budget or Budget(), seed, params.cache_salt),
        messages=messages_of(prompt) if messages is None else list(messages),
        render=render or partial(llm.read_prompt, **kwargs),
    )


def _check_optional(**given: tuple[object, type]) -> None:
    for name, (value, kind) in given.items():
        if value is not None:
            require_type(name, value, kind)


def check_strategy(strategy: object) -> None:
    """Raises ValueError for what is no strategy."""
    if not isinstance(strategy, Strategy) or isinstance(strategy, type):
        raise ValueError(
            f"strategy={short(strategy)} must be an object as Sample(8); "
            "moejet.reasoning.parse_strategy makes one of a text"
        )


def supervised(task: Task, strategy: Strategy) -> Run[Result]:
    """The strategy's run, after which nothing of it is left in the cache."""
    try:
        result = yield from strategy.run(task)
    finally:
        task.close()
    usage = task.ledger.usage
    usage.seconds = time.monotonic() - task.ledger.start_s
    is_exhausted = result.is_exhausted or task.ledger.has_cut or task.is_exhausted
    return replace(result, usage=usage, is_exhausted=is_exhausted)
