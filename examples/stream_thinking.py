"""An answer as it comes, with the thinking told apart from what is said."""

from moejet import LLM

with LLM() as llm:  # the embedded tiny reasoner; LLM("org/name") or LLM("./directory") for others
    question = [{"role": "user", "content": "Start with 17, add 25, then multiply by 3."}]
    has_answered = False
    for delta in llm.stream_chat(question):
        print(delta.reasoning, end="", flush=True)
        if delta.content and not has_answered:
            print("\n--- answer ---")
            has_answered = True
        print(delta.content, end="", flush=True)
        if delta.output is not None:  # the last one holds the whole
            timings = delta.output.timings
    print(f"\n--- {timings.decode_tokens_per_s:.0f} tokens/s ---")
