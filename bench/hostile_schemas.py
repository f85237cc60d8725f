"""How long a server is busy with hostile schemas and grammars, and how long others wait meanwhile.

    python bench/hostile_schemas.py [--repeats 3] [--limit 6] [--json FILE]

Each request goes to an application without compiled grammars, in this process. `others_ms` is the longest time that
GET /version took while the request ran: compiling has to happen beside the event loop. Exit code 1 if a request took
longer than --limit seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import Iterator
from typing import Any

from moejet.cli.environment import describe_environment, summary
from moejet.cli.results import add_json_option, line_writer

CHAT = "/v1/chat/completions"


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, fields of the request)."""
    from moejet.testing import hostile_schemas as hostile

    for name, schema in {**hostile.REFUSED, **hostile.LARGE}.items():
        yield name, {"response_format": hostile.response_format(schema)}
    for name, grammar in hostile.GRAMMARS.items():
        yield name, {"structured_outputs": {"grammar": grammar}}


async def ask(app: Any, fields: dict[str, Any]) -> tuple[int, float, float]:
    """Status, seconds, and the longest seconds of anybody else's request."""
    import httpx

    body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1, **fields}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        begin = time.perf_counter()
        request = asyncio.ensure_future(client.post(CHAT, json=body))
        longest = 0.0
        while not request.done():
            asked = time.perf_counter()
            await client.get("/version")
            longest = max(longest, time.perf_counter() - asked)
            await asyncio.sleep(0.005)
        return (await request).status_code, time.perf_counter() - begin, longest


def measure(fields: dict[str, Any], repeats: int) -> dict[str, Any]:
    from moejet import AsyncLLM
    from moejet.server import asgi_app

    found = []
    for _ in range(repeats):
        llm = AsyncLLM()
        try:
            asyncio.run(ask(asgi_app(llm), {}))  # what is made at the first request
            found.append(asyncio.run(ask(asgi_app(llm), fields)))
        finally:
            asyncio.run(llm.close(drain=False))
    return {
        "status": sorted({status for status, _, _ in found}),
        "ms_p50": 1e3 * statistics.median(seconds for _, seconds, _ in found),
        "ms_max": 1e3 * max(seconds for _, seconds, _ in found),
        "others_ms": 1e3 * max(longest for _, _, longest in found),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--limit", type=float, default=6.0, metavar="SECONDS")
    add_json_option(parser)
    args = parser.parse_args()
    environment = describe_environment()
    print(summary(environment))
    print("| case | status | ms | at most | others at most |\n|---|---|---|---|---|")
    is_slow = False
    for name, fields in cases():
        found = measure(fields, args.repeats)
        is_slow |= found["ms_max"] > 1e3 * args.limit
        times = " | ".join(f"{found[key]:.1f}" for key in ("ms_p50", "ms_max", "others_ms"))
        print(f"| {name} | {', '.join(map(str, found['status']))} | {times} |", flush=True)
        with line_writer(args.json) as write:
            write({**environment, "bench": "hostile_schemas", "case": name, **found})
    return int(is_slow)


if __name__ == "__main__":
    raise SystemExit(main())
