"""Many requests at once with asyncio: they are computed together, and leaving one ends its computation."""

import asyncio
from contextlib import aclosing

from moejet import AsyncLLM, SamplingParams

GREEDY = SamplingParams(temperature=0)


async def ask(llm: AsyncLLM, question: str) -> str:
    output = await llm.chat([{"role": "user", "content": question}], GREEDY).result()
    return f"{question} {output.outputs[0].content}"


async def first_line(llm: AsyncLLM, question: str) -> str:
    """Leaves when the first line of the thinking is there; aclosing ends the request at once."""
    thinking = ""
    async with aclosing(llm.chat([{"role": "user", "content": question}], GREEDY)) as stream:
        async for delta in stream:
            thinking += delta.reasoning
            if "\n" in thinking.strip():
                break
    return f"{question} {thinking.strip().splitlines()[0]}"


async def main() -> None:
    async with AsyncLLM() as llm:
        questions = [f"Start with {number}, add 25." for number in range(2, 8)]
        for answer in await asyncio.gather(*[ask(llm, question) for question in questions]):
            print(answer)
        print(await first_line(llm, "Take 90, subtract 34."))

        endless = llm.generate("Start", SamplingParams(ignore_eos=True, max_tokens=1500))
        task = asyncio.create_task(endless.result())
        await asyncio.sleep(0.05)
        task.cancel()  # a cancelled task ends its request within one step
        await asyncio.gather(task, return_exceptions=True)
        while llm.health()["requests"]:
            await asyncio.sleep(0.01)
        counters = llm.counters()
        print(
            f"{counters['generated_tokens']} tokens in {counters['steps']} steps, "
            f"still running: {llm.health()['requests']}"
        )


asyncio.run(main())
