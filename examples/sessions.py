"""A conversation kept in a file: its next turn, in another process, computes only what is new."""

import tempfile
from pathlib import Path

from moejet import LLM, SamplingParams

greedy = SamplingParams(temperature=0, max_tokens=300)
turns = [
    {"role": "user", "content": "Begin with 61, minus 7, then times 9, plus 38, divided by 4."}
]
with tempfile.TemporaryDirectory() as directory:
    file = Path(directory) / "sums"
    with LLM() as llm:
        [result] = llm.chat(turns, greedy)
        turns.append({"role": "assistant", "content": result.outputs[0].content})
        llm.save_session(file, turns)
        print(turns[-1]["content"], f"({file.stat().st_size} bytes saved)")

    with LLM() as llm:  # most likely another program, another day
        session = llm.load_session(file)
        question = {"role": "user", "content": "Start with 17, add 25."}
        [result] = llm.chat([*session.messages, question], greedy)
        cached, total = result.timings.cached_tokens, len(result.prompt_token_ids)
        print(result.outputs[0].content, f"({cached} of {total} prompt tokens were there)")
