"""What a model can be asked for: checks of requests, and the policies that follow from their parameters."""

from __future__ import annotations

from functools import cached_property

from moejet.config import ModelConfig
from moejet.grammar import GrammarCompiler, GrammarPolicy
from moejet.policy import ThinkingBudget, TokenPolicy
from moejet.request import SamplingParams
from moejet.thinking import prompt_opens_thinking
from moejet.tokenizer import Tokenizer
from moejet.validation import short

_END_TOKENS = 64  # of a prompt, which tell whether it ends with a tag: the whole may be very long


class RequestRules:
    """Depends on the model alone and keeps nothing but compiled grammars, so any thread may ask."""

    def __init__(
        self,
        model_config: ModelConfig,
        tokenizer: Tokenizer | None,
        *,
        max_context: int,
        eos_token_ids: frozenset[int],
    ):
        self.model_config = model_config
        self.tokenizer = tokenizer
        self.max_context = max_context
        self.eos_token_ids = eos_token_ids

    def check_prompt(self, token_ids: list[int], params: SamplingParams) -> None:
        """Raises ValueError if a prompt cannot be served as asked."""
        if not token_ids:
            raise ValueError("the prompt is empty: it needs at least one token")
        self._check_ids("the prompt", token_ids)
        if len(token_ids) >= self.max_context:
            raise ValueError(
                f"the prompt has {len(token_ids)} tokens, and a context of max_context="
                f"{self.max_context} leaves no room for an answer; shorten the prompt or raise "
                f"max_context (the model allows {self.model_config.max_position_embeddings})"
            )
        self.check_params(params)

    def check_scoring(self, token_ids: list[int]) -> None:
        """Raises ValueError if a prompt cannot be scored."""
        if len(token_ids) < 2:
            raise ValueError(
                f"token_ids={short(token_ids)} has {len(token_ids)} entries: score needs at least 2 tokens"
            )
        if len(token_ids) > self.max_context:
            raise ValueError(
                f"token_ids has {len(token_ids)} tokens, more than max_context={self.max_context}: "
                "raise max_context or shorten the input"
            )
        self._check_ids("token_ids", token_ids)

    def _check_ids(self, name: str, token_ids: list[int]) -> None:
        vocab = self.model_config.vocab_size
        for token_id in (min(token_ids), max(token_ids)):
            if not 0 <= token_id < vocab:
                raise ValueError(
                    f"{name} holds token id {short(token_id)}, which is outside the vocabulary of "
                    f"{vocab}: use those from 0 to {vocab - 1}"
                )

    def check_params(self, params: SamplingParams) -> None:
        """Raises ValueError if this model cannot do what is asked."""
        vocab = self.model_config.vocab_size
        for token_id in (*(params.logit_bias or {}), *params.stop_token_ids):
            if token_id >= vocab:
                raise ValueError(
                    f"token id {token_id} in logit_bias or stop_token_ids is outside the "
                    f"vocabulary of {vocab}"
                )
        if params.stop and self.tokenizer is None:
            raise ValueError("stop strings need a tokenizer, and this model has none")
        tags = self.tokenizer.think_tags if self.tokenizer is not None else None
        if params.max_thinking_tokens is not None and tags is None:
            raise ValueError(
                f"max_thinking_tokens={params.max_thinking_tokens} needs a model that marks its "
                "thinking with tags, and this one does not"
            )
        if params.grammar is not None:
            self._grammars.compile(params.grammar)

    @cached_property
    def _grammars(self) -> GrammarCompiler:
        vocab_size = self.model_config.vocab_size
        return GrammarCompiler(self.tokenizer, vocab_size, self.eos_token_ids)

    def policies_of(self, params: SamplingParams) -> list[TokenPolicy]:
        """One sample's policies, in the order in which they are asked."""
        policies: list[TokenPolicy] = []
        if params.max_thinking_tokens is not None:
            policies.append(ThinkingBudget(params.max_thinking_tokens))
        for maker in params.policies:
            policy = maker()
            if not isinstance(policy, TokenPolicy):
                raise ValueError(
                    f"policy made {policy!r}, which is not a moejet.policy.TokenPolicy"
                )
            policies.append(policy)
        if params.grammar is not None:
            policies.append(GrammarPolicy(self._grammars, params.grammar))
        return policies

    def thinking_of(self, token_ids: list[int]) -> tuple[bool, tuple[str, str] | None]:
        """Whether a prompt leaves the model inside its thinking, and the tags around that."""
        if self.tokenizer is None or self.tokenizer.think_tags is None:
            return False, None
        tags = self.tokenizer.think_tags
        text = self.tokenizer.decode(token_ids[-_END_TOKENS:], False)
        if len(text.rstrip()) <= len(tags[0]):  # almost nothing but blanks
            text = self.tokenizer.decode(token_ids, False)
        return prompt_opens_thinking(text, *tags), tags
