"""Less thinking and more of it: a budget, a level of effort, and forced checks."""

from moejet import LLM, SamplingParams
from moejet.policy import ForceContinuation
from moejet.reasoning.effort import with_effort

question = [{"role": "user", "content": "Start with 17, add 25, multiply by 3, then subtract 26."}]
greedy = SamplingParams(temperature=0, max_tokens=400)

with LLM() as llm:
    variants = {
        "free": greedy,
        "at most 20 tokens": SamplingParams(temperature=0, max_tokens=400, max_thinking_tokens=20),
        "effort low": with_effort(greedy, "low", llm.config.model),
        "one forced check": SamplingParams(
            temperature=0, max_tokens=400, policy=lambda: ForceContinuation(times=1, text="Wait")
        ),
    }
    for name, params in variants.items():
        [result] = llm.chat(question, params)
        answer = result.outputs[0]
        print(f"{name}: {len(answer.token_ids)} tokens, {answer.content}")
    print("--- the checked thinking ---")
    print(answer.reasoning)
