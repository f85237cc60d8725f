"""A policy of one's own: it may edit the logits before a token is chosen, and sees each token before it counts.

This one lets the model think at any temperature, but without second thoughts, and makes it answer greedily.
"""

from collections import Counter

import torch

from moejet import LLM, SamplingParams, TokenPolicy
from moejet.policy import Action, Keep, Replace
from moejet.sample_state import SampleState


class Decided(TokenPolicy):
    needs_logits = True

    def on_logits(self, state: SampleState, row: torch.Tensor) -> torch.Tensor | None:
        if state.is_thinking:
            return None
        return torch.arange(len(row)) == row.argmax()  # a mask of the tokens that may come

    def on_token(self, state: SampleState, token_id: int) -> Action:
        if state.is_thinking and [token_id] == state.encode("Wait"):
            return Replace(state.closing_ids(""))  # what it replaces is never computed
        return Keep()


question = [{"role": "user", "content": "Begin with 61, minus 7, then times 9, plus 38."}]
with LLM() as llm:
    for policy in (None, Decided):  # made anew for every sample
        params = SamplingParams(temperature=1, seed=3, n=16, max_tokens=400, policy=policy)
        [result] = llm.chat(question, params)
        again = sum("Wait" in (output.reasoning or "") for output in result.outputs)
        tokens = sum(len(output.token_ids) for output in result.outputs)
        answers = Counter(output.content for output in result.outputs).most_common(1)
        print(f"{policy and policy.__name__}: {again} thought again, {tokens} tokens, {answers}")
