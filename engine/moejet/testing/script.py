"""A policy that makes a model say what a script wants, so that the real engine runs strategies beyond its skill."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from moejet.policy import TokenPolicy
from moejet.request import SamplingParams

if TYPE_CHECKING:
    from torch import Tensor

    from moejet.llm import LLM
    from moejet.sample_state import SampleState


class Script(TokenPolicy):
    """Forces reply(context) and then an eos, given all text before it: prompt, appended texts and earlier steps.

    Each advance of a branch asks again, with what the branch has by then.
    """

    needs_logits = True

    def __init__(self, reply: Callable[[str], str], decode: Callable[[list[int]], str]):
        self._reply = reply
        self._decode = decode
        self._begin = -1
        self._ids: list[int] = []

    def on_logits(self, state: SampleState, row: Tensor) -> Tensor:
        if self._begin < 0:
            self._begin = len(state.token_ids)
            text = self._reply(self._decode(list(state.token_ids)))
            self._ids = state.encode(text) if text else []
        place = len(state.token_ids) - self._begin
        token_id = self._ids[place] if place < len(self._ids) else min(state.eos_token_ids)
        mask = torch.zeros_like(row, dtype=torch.bool)
        mask[token_id] = True
        return mask


def scripted(llm: LLM, reply: Callable[[str], str], **options: Any) -> SamplingParams:
    """Sampling parameters with which a model follows a script. options: of `SamplingParams`."""

    def decode(ids: list[int]) -> str:
        return llm.tokenizer.decode(ids, False)

    return SamplingParams(policy=lambda: Script(reply, decode), **options)
