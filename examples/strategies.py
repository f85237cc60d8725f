"""Answering by more thinking: a vote, the best of several and a search, each beside what it has cost."""

from moejet import LLM
from moejet.reasoning import parse_strategy, solve

question = [
    {"role": "user", "content": "Begin with 61, minus 7, then times 9, plus 38, divided by 4."}
]
print("strategy             answer  confidence  tokens  steps  distinct experts per layer and step")
with LLM() as llm:
    layers = llm.model_config.num_moe_layers
    for spec in ("single", "vote:8", "best:8:logprob", "beam:4x2"):
        result = solve(llm, question, parse_strategy(spec, llm), seed=5)
        usage = result.usage
        print(
            f"{spec:20} {result.answer or '-':>6} {result.confidence:11.2f} "
            f"{usage.generated_tokens:7} {usage.steps:6} {usage.distinct_experts(layers):9.1f}"
        )
