"""Concurrent streams end to end beside the forward passes alone, and what the engine costs per step.

    python bench/streams.py [--shape deepseek-v2-lite] [--format int4_g32] [-b 1,16] [-n 32] [--repeat 3]

A shape with random weights decodes n tokens in each of b sequences: as forward passes without scheduler, sampling and
output ("kernels"), as requests of the synchronous engine ("engine"), and as streams of an `AsyncLLM`, one reader each
("streams"). The first two take turns, the streams follow, with the engine to themselves. Prints a JSON line per batch:
tokens per second of each (median of the turns, all turns beside it), the streams' share of the kernels' rate, and the
gain over one stream.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time

from moejet import LLM, AsyncLLM, SamplingParams
from moejet.cli.environment import describe_environment
from moejet.cli.results import add_json_option, line_writer


def params(num_tokens: int, seed: int) -> SamplingParams:
    # Greedy sequences would repeat themselves, and with them the experts that they load. The first token comes out of
    # the prompt's step, which is not counted.
    return SamplingParams(temperature=1.0, seed=seed, max_tokens=num_tokens + 1, ignore_eos=True)


def engine_rate(llm: LLM, batch: int, num_tokens: int) -> float:
    with llm.exclusive() as engine:
        for i in range(batch):
            engine.add_request([i + 1], params(num_tokens, i))
        engine.step()
        start = time.perf_counter()
        while engine.has_work:
            engine.step()
        return batch * num_tokens / (time.perf_counter() - start)


async def stream_rate(llm: AsyncLLM, batch: int, num_tokens: int) -> float:
    firsts: list[float] = []
    ends: list[float] = []

    async def read(token: int) -> None:
        first = None
        async for delta in llm.generate([token], params(num_tokens, token)):
            if delta.token_ids and first is None:
                first = time.perf_counter()
        assert first is not None
        firsts.append(first)
        ends.append(time.perf_counter())

    await asyncio.gather(*(read(i + 1) for i in range(batch)))
    return batch * num_tokens / (max(ends) - max(firsts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="deepseek-v2-lite")
    parser.add_argument("--format", default="int4_g32")
    parser.add_argument("-b", "--batches", default="1,16")
    parser.add_argument("-n", "--tokens", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=3)
    add_json_option(parser, "-")
    args = parser.parse_args()
    batches = [int(text) for text in args.batches.split(",")]
    options = {
        "expert_format": args.format,
        "max_context": 4 * args.tokens,
        "prefix_caching": False,
    }
    environment = describe_environment()
    rates: dict[tuple[str, int], list[float]] = {}
    llm = LLM.synthetic(args.shape, **options)
    for _ in range(args.repeat):
        for batch in batches:
            took = llm.bench_decode(args.tokens, 0, batch)
            rates.setdefault(("kernels", batch), []).append(batch * args.tokens / took)
            rates.setdefault(("engine", batch), []).append(engine_rate(llm, batch, args.tokens))
    streams = AsyncLLM.from_llm(llm)

    async def all_streams() -> None:
        async with streams:
            for _ in range(args.repeat):
                for batch in batches:
                    rate = await stream_rate(streams, batch, args.tokens)
                    rates.setdefault(("streams", batch), []).append(rate)

    asyncio.run(all_streams())
    for batch in batches:
        row = {"bench": "streams", **environment, "shape": args.shape, "format": args.format}
        row |= {"batch": batch, "tokens": args.tokens}
        for kind in ("kernels", "engine", "streams"):
            row[f"{kind}_tokens_per_s"] = statistics.median(rates[kind, batch])
            row[f"{kind}_all"] = [round(rate, 2) for rate in rates[kind, batch]]
        row["streams_of_kernels"] = row["streams_tokens_per_s"] / row["kernels_tokens_per_s"]
        row["gain_over_one_stream"] = row["streams_tokens_per_s"] / statistics.median(
            rates["streams", batches[0]]
        )
        with line_writer(args.json) as write:
            write(row)


if __name__ == "__main__":
    main()
