"""Every request of a long run from its beginning to its one end, and whether the server has counted the same.

An answer is refused a clean bill unless it ended as its API says, or a kill or a restart explains why it did not.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from serving.clients import Answer, ask_json
from serving.process import Metrics, ServerProcess, scrape, total

_SLACK_S = 1.0  # the server notices a death and a recovery a little later than we do
_MOST_SHOWN = 20


@dataclass(slots=True)
class Outage:
    """kind: "kill" of the engine or "restart" of the whole server."""

    kind: str
    begin_s: float
    end_s: float = float("inf")


@dataclass(slots=True)
class Ticket:
    """One request. most_tokens: that an answer nobody reads to its end may have had, over all choices."""

    number: int
    kind: str
    api: str
    begin_s: float
    most_prompt: int
    most_tokens: int
    outcome: str = ""


@dataclass(slots=True)
class Tally:
    """What the clients have seen in one phase; spans are the least and the most that the server may have counted."""

    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    first_s: list[float] = field(default_factory=list)
    gaps_s: list[float] = field(default_factory=list)
    answer_s: list[float] = field(default_factory=list)
    least: Counter[str] = field(default_factory=Counter)
    most: Counter[str] = field(default_factory=Counter)
    right: int = 0
    posed: int = 0

    def count(self, name: str, least: int = 1, more: int = 0) -> None:
        self.least[name] += least
        self.most[name] += least + more


class Ledger:
    """Begins and ends requests; keeps what went wrong."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.outages: list[Outage] = []
        self.violations: Counter[str] = Counter()
        self.shown: list[str] = []
        self.outcomes: Counter[str] = Counter()
        self.open: dict[int, Ticket] = {}
        self.num_sent = 0
        self._ids: set[str] = set()

    def violate(self, what: str, detail: object = "") -> None:
        self.violations[what] += 1
        if len(self.shown) < _MOST_SHOWN:
            self.shown.append(f"{what}: {detail}")
            print(f"VIOLATED {self.shown[-1]}", file=sys.stderr, flush=True)

    def begin(self, kind: str, api: str, most_prompt: int = 0, most_tokens: int = 0) -> Ticket:
        self.num_sent += 1
        now = time.perf_counter()
        ticket = Ticket(self.num_sent, kind, api, now, most_prompt, most_tokens)
        self.open[ticket.number] = ticket
        self.tally.kinds[kind] += 1
        return ticket

    def end(self, ticket: Ticket, outcome: str) -> None:
        if ticket.outcome:
            self.violate("ended twice", f"{ticket} as {outcome}")
        ticket.outcome = outcome
        self.open.pop(ticket.number, None)
        self.outcomes[outcome] += 1
        self.tally.outcomes[outcome] += 1

    @contextmanager
    def outage(self, kind: str) -> Iterator[Outage]:
        found = Outage(kind, time.perf_counter())
        self.outages.append(found)
        try:
            yield found
        finally:
            found.end_s = time.perf_counter()

    def excused(self, ticket: Ticket, *kinds: str) -> bool:
        """Whether there was an outage while the request ran."""
        now = time.perf_counter()
        return any(
            o.kind in kinds and o.begin_s - _SLACK_S < now and o.end_s + _SLACK_S > ticket.begin_s
            for o in self.outages
        )

    def settle(self, ticket: Ticket, answer: Answer) -> str:
        """Ends a request with what came of it; "complete" means that the answer is there, not that it is right."""
        tally = self.tally
        for fault in answer.faults:
            self.violate("form of a stream", f"{ticket}: {fault}")
        if answer.status == 200 and answer.id:
            if answer.id in self._ids:
                self.violate("an id was used twice", answer.id)
            self._ids.add(answer.id)
        outcome = self._outcome(ticket, answer)
        self.end(ticket, outcome)
        self._expect(ticket, answer, outcome)
        if outcome == "complete":
            tally.answer_s.append(answer.seconds)
            if answer.arrivals:
                tally.first_s.append(answer.arrivals[0])
                tally.gaps_s += [
                    b - a for a, b in zip(answer.arrivals, answer.arrivals[1:], strict=False)
                ]
        return outcome

    def _outcome(self, ticket: Ticket, answer: Answer) -> str:
        if answer.is_good:
            return "complete"
        if answer.has_left:
            return "left"
        code = answer.error
        where = f"{ticket}: {answer.status} {code} {answer.message[:200]}"
        if code == "connection":
            # A listening socket that is being closed may take connections that nobody looks at any more.
            if answer.status == 0 and self.excused(ticket, "restart"):
                return "refused"
            self.violate("lost", where)
            return "lost"
        if answer.status == 503 and "retry-after" not in answer.headers:
            self.violate("503 without Retry-After", where)
        # Anthropic's errors have no code.
        is_overload = "queue is full" in answer.message or "strategies" in answer.message
        if code == "queue_full" or (answer.api == "messages" and is_overload):
            return "refused"
        if code in ("closing", "loading") and self.excused(ticket, "restart"):
            return "refused"
        if self.excused(ticket, "kill") and (code == "engine_dead" or answer.api == "messages"):
            return "failed"
        self.violate("an error without a cause", where)
        return "lost"

    def _expect(self, ticket: Ticket, answer: Answer, outcome: str) -> None:
        """What the server should have counted of it."""
        tally = self.tally
        was_begun = answer.status == 200 or answer.status == 503
        is_open = outcome == "left" and answer.status != 200
        tally.count("started", int(was_begun), int(is_open))
        is_strategy = ticket.kind == "strategy"
        if outcome == "complete":
            tally.count("success")
            prompt, generated = answer.usage or (0, 0)
            unknown = answer.usage is None
            tally.count("prompt_tokens", prompt, ticket.most_prompt * unknown)
            tally.count("tokens", generated, ticket.most_tokens * unknown)
            tally.count("strategies", int(is_strategy))
        elif outcome == "left":
            tally.count("success", 0, 1)
            tally.count("cancelled", 0, 1)
            tally.count("rejected", 0, int(is_open))  # which it did not wait to read
            tally.count("left")
            tally.count("prompt_tokens", 0, ticket.most_prompt)
            tally.count("tokens", 0, ticket.most_tokens)
            tally.count("strategies", 0, int(is_strategy))
        elif answer.status == 503:
            # A whole answer that a kill has ended has the status of one that was refused.
            tally.count("rejected", int(outcome == "refused"), int(outcome == "failed"))
            tally.count("strategies", 0, int(is_strategy))
        elif answer.status == 200:
            tally.count("broken")
            tally.count("strategies", int(is_strategy))

    def disagreements(self, before: Metrics, after: Metrics, has_kills: bool) -> list[str]:
        """Of the server's counters with what clients have seen between two quiet moments."""

        def grown(name: str, label: str = "") -> float:
            return total(after, name, label) - total(before, name, label)

        found = {
            "started": grown("http_requests_started_total"),
            "success": grown("request_success_total"),
            "cancelled": grown("cancelled_requests_total"),
            "rejected": grown("admission_rejections_total"),
            "prompt_tokens": grown("request_prompt_tokens_sum"),
            "tokens": grown("request_generation_tokens_sum"),
            "strategies": grown("strategies_finished_total"),
        }
        tally = self.tally
        wrong = [
            f"{name}: {value:.0f} counted, {tally.least[name]} to {tally.most[name]} expected"
            for name, value in found.items()
            if not tally.least[name] <= value <= tally.most[name]
        ]
        # What began has ended in one way: all the server's own figures.
        ended = found["success"] + found["cancelled"] + found["rejected"]
        rest, kills = found["started"] - ended, has_kills * tally.least["left"]
        low, high = tally.least["broken"], tally.least["broken"] + tally.most["rejected"]
        if not low - kills <= rest <= (high + kills if has_kills else low):
            wrong.append(f"{rest:.0f} requests began and have no end: {found}")
        if not has_kills:
            # Positions that are given up are generated as well.
            engine = grown("generation_tokens_total")
            if engine < tally.least["tokens"]:
                wrong.append(f"the engine has generated {engine:.0f} of {tally.least['tokens']}")
        return wrong


_IDLE = ("num_requests_running", "num_requests_waiting", "num_requests", "strategies_running")


async def quiet(server: ServerProcess, timeout_s: float = 60.0) -> tuple[Metrics, str]:
    """The metrics once nothing runs any more, and what still runs when that takes too long."""
    until = time.perf_counter() + timeout_s
    while True:
        metrics = await scrape(server.port)
        health = await ask_json(server.port, "/health")
        busy = {n: total(metrics, n) for n in (*_IDLE, "kv_cache_usage_perc")}
        busy["queued"] = health["queued_requests"]
        if not any(busy.values()):
            await asyncio.sleep(0.6)  # two more reports of the engine, in which its last tokens are
            return await scrape(server.port), ""
        if time.perf_counter() > until:
            return metrics, str({name: value for name, value in busy.items() if value})
        await asyncio.sleep(0.1)


def fallen(before: Metrics, after: Metrics) -> list[str]:
    """Counters that have become smaller, which they must not as long as the server's process lives."""
    return [
        f"{name}{{{labels}}} from {value:g} to {after.get((name, labels), 0):g}"
        for (name, labels), value in before.items()
        if name.endswith(("_total", "_count", "_bucket")) and after.get((name, labels), 0) < value
    ]
