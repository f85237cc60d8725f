"""What the clients of a long run ask, and how each answer is checked.

The engine is deterministic, so most questions have one answer: the one that they got at the start, when nothing else
ran. The others are asked only once: problems that nobody has posed before, which the thinking has to restate, and
answers that have to repeat a number of their own.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from moejet.testing import arithmetic
from serving.clients import HOST, MODEL, PATHS, Answer, ask, ask_json, exchange, send
from serving.ledger import Ledger, Ticket

MAX_TOKENS = 260
SALTS = (None, None, "a", "b")
STRATEGIES = ("vote:4", "beam:4x2", "mcts:3", "adaptive:8", "best:3:logprob", "check:1")
_DOUBTS = 40  # answers of one phase that are asked for again
_THINK = re.compile(r"</?think>")


@dataclass(frozen=True, slots=True)
class Case:
    """A question with its answer when nothing else runs: (reasoning, content, finish reason) of each choice."""

    name: str
    api: str
    body: dict[str, Any]
    answers: tuple[tuple[str, str, str], ...] = ()


def body_of(
    api: str, messages: list[dict[str, Any]], max_tokens: int, seed: int | None = None
) -> dict[str, Any]:
    """Greedily, or drawn with the seed where the API has one. Completions get their prompt from `tokenized`."""
    body: dict[str, Any] = {"model": MODEL}
    is_drawn = seed is not None and api in ("chat", "completions")
    body["temperature"] = 1.0 if is_drawn else 0.0
    if is_drawn:
        body["seed"] = seed
    body["input" if api == "responses" else "messages"] = messages
    body["max_output_tokens" if api == "responses" else "max_tokens"] = max_tokens
    return body


async def tokenized(port: int, body: dict[str, Any]) -> dict[str, Any]:
    """A conversation as the prompt of a completion."""
    found = await ask_json(port, "/tokenize", {"messages": body["messages"]})
    return {**{k: v for k, v in body.items() if k != "messages"}, "prompt": found["tokens"]}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


@dataclass(slots=True)
class Cases:
    """All questions with known answers, by what they are for."""

    short: list[Case] = field(default_factory=list)
    long: list[Case] = field(default_factory=list)
    turns: list[Case] = field(default_factory=list)
    strategies: list[Case] = field(default_factory=list)


class CaseMaker:
    """Asks a server on which nothing else runs."""

    def __init__(self, port: int, ledger: Ledger, rng: random.Random):
        self._port = port
        self._ledger = ledger
        self._rng = rng

    async def make(self, scale: int) -> Cases:
        """scale: how many of each kind, about."""
        cases = Cases()
        for number in range(scale):
            same = [await self._short(number, api) for api in PATHS]
            cases.short += same
            chat, *others = (case for case in same if case.api != "completions")
            if any(case.answers != chat.answers for case in others if not number % 2):
                self._ledger.violate("APIs differ", f"short {number}: {same}")
            cases.turns += await self._session(number)
        cases.long = [await self._long(number) for number in range((scale + 1) // 2)]
        for number, spec in enumerate(STRATEGIES[: scale + 1]):
            text = self._question(3)
            body = {**body_of("chat", [user(text)], MAX_TOKENS, number), "reasoning_strategy": spec}
            cases.strategies.append(await self._asked(f"{spec} {number}", "chat", body))
        return cases

    def _question(self, steps: int) -> str:
        problem = arithmetic.generate_problem(self._rng, steps)
        return arithmetic.word_problem(problem, self._rng)

    async def _asked(self, name: str, api: str, body: dict[str, Any]) -> Case:
        """Twice: streamed or not, the answer is the same."""
        found = []
        for is_streamed in (True, False):
            ticket = self._ledger.begin("reference", api)
            answer = await exchange(self._port, api, streamed(api, body, is_streamed))
            if self._ledger.settle(ticket, answer) != "complete":
                raise RuntimeError(f"{name} has no answer: {answer.error} {answer.message}")
            found.append(answer.choices)
        if found[0] != found[1]:
            self._ledger.violate("streamed and whole answers differ", f"{name}: {found}")
        return Case(name, api, body, found[0])

    async def _short(self, number: int, api: str) -> Case:
        """Every fourth question in each API, with one or three samples, greedily or drawn."""
        rng = random.Random(f"short {number}")  # the same one in all APIs
        text = arithmetic.word_problem(arithmetic.generate_problem(rng, 2 + number % 4), rng)
        body = body_of(api, [user(text)], MAX_TOKENS, number if number % 2 else None)
        if api == "completions":
            body = await tokenized(self._port, body)
        if number % 4 == 3 and api in ("chat", "completions"):
            body["n"] = 3
        return await self._asked(f"short {number} {api}", api, body)

    async def _session(self, number: int) -> list[Case]:
        """A conversation of four turns, one case each."""
        messages = [user(self._question(2))]
        cases = []
        for turn in range(4):
            api = ("chat", "messages", "responses")[(number + turn) % 3]
            body = body_of(api, list(messages), MAX_TOKENS)
            cases.append(await self._asked(f"session {number} turn {turn}", api, body))
            problem = arithmetic.generate_problem(self._rng, 2, start=100)
            messages += [
                assistant(cases[-1].answers[0][1]),
                user(arithmetic.follow_up(problem, self._rng)),
            ]
        return cases

    async def _long(self, number: int) -> Case:
        """A conversation that leaves no more room than its answer takes; all of them begin alike."""
        rng = random.Random(f"long {number // 3}")
        limit = (await ask_json(self._port, "/props"))["max_context"]
        messages: list[dict[str, Any]] = []
        count = 0
        while count < limit - 400 - 40 * (number % 3):
            text = arithmetic.word_problem(arithmetic.generate_problem(rng, 3), rng)
            last = [*messages, user(text)]
            count = (await ask_json(self._port, "/tokenize", {"messages": last}))["count"]
            messages = [*last, assistant("The answer is 100.")]
        body = body_of("chat", last, limit - count)
        return await self._asked(f"long {number}", "chat", body)


def streamed(api: str, body: dict[str, Any], is_streamed: bool = True) -> dict[str, Any]:
    if not is_streamed:
        return body
    options = {"stream_options": {"include_usage": True}} if api in ("chat", "completions") else {}
    return {**body, "stream": True, **options}


class Traffic:
    """The kinds of requests; a client calls one of them after the other."""

    def __init__(self, port: int, ledger: Ledger, cases: Cases, has_grammars: bool):
        self.port = port
        self.cases = cases
        self.ledger = ledger
        self.doubts: list[Case] = []
        self._has_grammars = has_grammars
        self._nonces = random.Random()  # never repeated, whatever the seed
        self.kinds: dict[str, Callable[[random.Random], Any]] = {
            "known": lambda rng: self._known("known", rng.choice(cases.short), rng),
            "turn": lambda rng: self._known("turn", rng.choice(cases.turns), rng),
            "long": lambda rng: self._known("long", rng.choice(cases.long), rng),
            "strategy": lambda rng: self._known("strategy", rng.choice(cases.strategies), rng),
            "new": self._new,
            "form": self._form,
            "leave": self._leave,
            "hasty": self._hasty,
            "abort": self._abort,
            "wrong": self._wrong,
            "broken": self._broken,
        }

    async def one(self, kind: str, rng: random.Random) -> None:
        await self.kinds[kind](rng)

    async def _send(
        self, kind: str, api: str, body: dict[str, Any], **how: Any
    ) -> tuple[Ticket, Answer, str]:
        prompt = body.get("prompt") or json.dumps(body.get("input") or body.get("messages"))
        samples = 32 if kind == "strategy" else body.get("n", 1)
        tokens = body.get("max_tokens") or body.get("max_output_tokens") or 16
        ticket = self.ledger.begin(kind, api, len(prompt) + 64, tokens * samples)
        try:
            async with asyncio.timeout(120):
                answer = await exchange(self.port, api, body, **how)
        except TimeoutError:
            self.ledger.end(ticket, "stuck")
            self.ledger.violate("stuck", f"{ticket}: no end within 120 s")
            return ticket, Answer(api), "stuck"
        outcome = self.ledger.settle(ticket, answer)
        if outcome in ("refused", "failed"):
            wait_s = float(answer.headers.get("retry-after", "1"))
            await asyncio.sleep(min(wait_s, 1.0) * random.random())
        return ticket, answer, outcome

    async def _known(self, kind: str, case: Case, rng: random.Random) -> None:
        """With one of a few salts, or with one of its own, which must find nothing in the cache."""
        body = streamed(case.api, case.body, rng.random() < 0.7)
        is_new = rng.random() < 0.1
        salt = f"{self._nonces.randrange(2**62)}" if is_new else rng.choice(SALTS)
        if salt is not None:
            body = {**body, "cache_salt": salt}
        _, answer, outcome = await self._send(kind, case.api, body)
        if outcome != "complete":
            return
        if answer.choices != case.answers:
            self._crossed(case, answer)
        if is_new and answer.cached and kind != "strategy":
            self.ledger.violate("another's prefix", f"{answer.cached} tokens of {case.name}")

    def _crossed(self, case: Case, answer: Answer) -> None:
        self.ledger.violate(
            "not the answer of this question",
            f"{case.name} ({answer.id}): {answer.choices} instead of {case.answers}",
        )

    async def _new(self, rng: random.Random) -> None:
        """A problem that was never posed. What restates another one is asked for again when nothing else runs."""
        problem = arithmetic.generate_problem(self._nonces, rng.choice((2, 3, 4)))
        api = rng.choice(list(PATHS))
        text = arithmetic.word_problem(problem, rng)
        body = body_of(api, [user(text)], MAX_TOKENS)
        if api == "completions":
            try:
                body = await tokenized(self.port, body)
            except (OSError, RuntimeError, asyncio.IncompleteReadError):
                return  # the server is being started again: this is no request for an answer
        _, answer, outcome = await self._send("new", api, streamed(api, body, rng.random() < 0.7))
        if outcome != "complete":
            return
        [(reasoning, content, _)] = answer.choices
        lines = _THINK.sub("\n", reasoning + "\n" + content).split("\n")
        plans = [plan for line in lines if (plan := arithmetic.parse_plan(line)) is not None]
        self.ledger.tally.posed += 1
        self.ledger.tally.right += arithmetic.extract_answer(content) == problem.answer
        is_restated = bool(plans) and plans[0].canonical == problem.canonical
        if (not is_restated or rng.random() < 0.05) and len(self.doubts) < _DOUBTS:
            self.doubts.append(Case(f"new {problem.canonical}", api, body, answer.choices))

    async def ask_doubts_again(self) -> int:
        """With nothing beside them; returns how many there were."""
        doubts, self.doubts = self.doubts, []
        for case in doubts:
            _, answer, outcome = await self._send("again", case.api, case.body)
            if outcome == "complete" and answer.choices != case.answers:
                self._crossed(case, answer)
        return len(doubts)

    async def _form(self, rng: random.Random) -> None:
        """An answer of a given form that holds a number of its own."""
        if not self._has_grammars:
            return await self._new(rng)
        nonce = f"n{self._nonces.randrange(10**12):012d}"
        api = rng.choice(("chat", "responses", "messages", "choice", "regex"))
        schema = {
            "type": "object",
            "properties": {
                "nonce": {"const": nonce},
                "answer": {"type": "integer", "minimum": 0, "maximum": 999},
            },
            "required": ["nonce", "answer"],
            "additionalProperties": False,
        }
        wanted: dict[str, Any] = {
            "chat": {"response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
            "responses": {
                "text": {"format": {"type": "json_schema", "name": "sum", "schema": schema}}
            },
            "messages": {"output_config": {"format": {"type": "json_schema", "schema": schema}}},
            "choice": {"structured_outputs": {"choice": [nonce, f"{nonce} again"]}},
            "regex": {"structured_outputs": {"regex": f"{nonce}: [0-9]{{1,3}}"}},
        }[api]
        is_json = api in PATHS
        api = api if is_json else "chat"
        text = arithmetic.word_problem(arithmetic.generate_problem(self._nonces, 2), rng)
        body = {**body_of(api, [user(text)], MAX_TOKENS), **wanted}
        _, answer, outcome = await self._send("form", api, streamed(api, body, rng.random() < 0.5))
        if outcome != "complete":
            return
        [(_, content, finish)] = answer.choices
        if finish == "length":  # it thought for too long
            is_good = nonce in content or len(content) < 40
        else:
            try:
                is_good = not is_json or json.loads(content)["nonce"] == nonce
            except (ValueError, KeyError):
                is_good = False
            is_good = is_good and nonce in content
        if not is_good:
            self.ledger.violate("not the form asked for", f"{nonce} in {content!r} ({finish})")

    async def _leave(self, rng: random.Random) -> None:
        """A client that hangs up in mid-stream; what it has read must be how the answer begins."""
        pool = self.cases.strategies if rng.random() < 0.1 else self.cases.short
        case, count = rng.choice(pool), rng.randint(1, 60)
        body = streamed(case.api, {**case.body})
        if pool is self.cases.strategies:
            body["stream_options"] = {"include_progress": True}
        kind = "strategy" if pool is self.cases.strategies else "leave"
        _, answer, outcome = await self._send(
            kind, case.api, body, leave=lambda answer: answer.num_events >= count
        )
        if outcome in ("left", "complete"):
            self._check_beginning(case, answer)

    def _check_beginning(self, case: Case, answer: Answer) -> None:
        for index, (reasoning, content) in answer.texts.items():
            wanted = case.answers[index]
            # White space at the end of the thinking belongs to it until the thinking has ended.
            if not wanted[0].startswith(reasoning.rstrip()) or not wanted[1].startswith(content):
                self._crossed(case, answer)

    async def _hasty(self, rng: random.Random) -> None:
        """A client that hangs up before there is an answer."""
        case = rng.choice(self.cases.short + self.cases.long)
        patience_s = rng.random() * 0.1
        _, answer, outcome = await self._send("hasty", case.api, case.body, patience_s=patience_s)
        if outcome == "complete" and answer.choices != case.answers:
            self._crossed(case, answer)

    async def _abort(self, rng: random.Random) -> None:
        """A stream that is ended from elsewhere, by its id."""
        case, count = rng.choice(self.cases.short), rng.randint(1, 30)
        calls: list[asyncio.Task[Any]] = []

        async def abort(request_id: str) -> None:
            try:
                status, content = await ask(self.port, f"/v1/requests/{request_id}/abort", {})
            except (OSError, asyncio.IncompleteReadError):
                return  # a kill or a restart, of which the stream tells
            if status not in (200, 404, 503):
                self.ledger.violate("abort", f"{status} {content[:200]!r}")

        def when(answer: Answer) -> bool:
            if answer.num_events == count and answer.id:
                calls.append(asyncio.create_task(abort(answer.id)))
            return False

        body = streamed(case.api, case.body)
        _, answer, outcome = await self._send("abort", case.api, body, leave=when)
        await asyncio.gather(*calls)
        if outcome == "complete":
            self._check_beginning(case, answer)

    async def _wrong(self, rng: random.Random) -> None:
        """Refused with 400, and not counted as begun."""
        api = rng.choice(list(PATHS))
        body = body_of(api, [user("Start with 1, add 1.")], MAX_TOKENS)
        body |= rng.choice(
            ({"temperature": -1}, {"surprise": 1}, {"top_p": 7}, {"messages": []}, {"input": 5})
        )
        ticket = self.ledger.begin("wrong", api)
        answer = await exchange(self.port, api, body)
        if answer.status == 400:
            self.ledger.end(ticket, "rejected")
        else:
            outcome = self.ledger.settle(ticket, answer)
            if outcome in ("complete", "left"):
                self.ledger.violate("wrong input was taken", f"{api}: {body}")

    async def _broken(self, rng: random.Random) -> None:
        """Half a request, or a connection that asks for nothing."""
        ticket = self.ledger.begin("broken", "none")
        try:
            _, writer = await asyncio.open_connection(HOST, self.port)
        except OSError:
            is_excused = self.ledger.excused(ticket, "restart")
            self.ledger.end(ticket, "refused" if is_excused else "lost")
            if not is_excused:
                self.ledger.violate("lost", f"{ticket}: no connection")
            return
        if rng.random() < 0.7:
            head = f"POST {PATHS['chat']} HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: 500\r\n\r\n"
            data = head.encode() + b'{"messages": ['
            writer.write(data[: rng.randrange(1, len(data))])
        else:
            send(writer, "/health")
        await asyncio.sleep(rng.random() * 0.02)
        writer.transport.abort()
        self.ledger.end(ticket, "left")
