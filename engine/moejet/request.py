"""What goes into the engine and what comes out: sampling parameters, requests, outputs."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Literal

from moejet.grammar import Grammar
from moejet.policy import TokenPolicy
from moejet.statistics import TokenStatistics
from moejet.validation import require_bool, require_int, require_number, short

if TYPE_CHECKING:
    from moejet.sample_state import SampleState

PolicyMaker = Callable[[], TokenPolicy]
if TYPE_CHECKING:
    Policies = PolicyMaker | tuple[PolicyMaker, ...] | None
else:
    Policies = Any  # msgspec reads parameters from frames between processes, and has no unions of functions
FinishReason = Literal["stop", "length", "abort"]
MAX_LOGPROBS = 20
MAX_N = 64
MAX_SALT_CHARS = 256


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens. Impossible values raise ValueError naming the field.

    Order: penalties and logit_bias, temperature, top_k, top_p, min_p. temperature=0 is greedy. top_k=0 and top_p=1
    are off. max_tokens=None: as many as the context holds. Log-probabilities come from the raw logits.
    Randomness depends on (seed, sample index, position) only, never on what else is in the batch. The logits it is
    applied to are the same up to rounding: kernels choose their arithmetic by the number of rows, on AMX between int8
    and bf16 activations, so an unlikely tie may fall differently in another batch.
    Stop strings end the answer; inside the thinking they count only with stop_in_reasoning=True.
    max_thinking_tokens ends the thinking, and the model answers (see `moejet.policy.ThinkingBudget`).
    policy makes a `moejet.policy.TokenPolicy` for each sample; several are asked in their order.
    grammar: what the answer must look like (`Grammar`).
    statistics=True: see `moejet.statistics`.
    cache_salt: cached prefixes are found by requests of the same salt only, so that nobody can tell by the time to
    the first token what others have asked.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    stop_in_reasoning: bool = False
    logit_bias: Mapping[int, float] | None = None
    logprobs: int | None = None
    ignore_eos: bool = False
    n: int = 1
    max_thinking_tokens: int | None = None
    policy: Policies = None
    grammar: Grammar | None = None
    statistics: bool = False
    cache_salt: str | None = None

    def __post_init__(self) -> None:
        require_number("temperature", self.temperature, 0.0, 100.0)
        require_int("top_k", self.top_k, 0, None, "0 switches it off")
        require_number(
            "top_p", self.top_p, above=0, high=1, hint="use temperature=0 for greedy decoding"
        )
        require_number("min_p", self.min_p, 0.0, 1.0)
        require_number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        require_number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        require_number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        require_int("seed", self.seed, -(2**63), 2**63 - 1, or_none=True)
        require_int("max_tokens", self.max_tokens, 1, or_none=True)
        require_int("n", self.n, 1, MAX_N)
        require_int("logprobs", self.logprobs, 0, MAX_LOGPROBS, or_none=True)
        object.__setattr__(self, "stop", _as_strings(self.stop))
        if not isinstance(self.stop_token_ids, list | tuple | set | frozenset):
            raise ValueError(
                f"stop_token_ids={short(self.stop_token_ids)} must be a list of token ids"
            )
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        if self.logit_bias is not None and not isinstance(self.logit_bias, Mapping):
            raise ValueError(f"logit_bias={short(self.logit_bias)} must map token ids to biases")
        require_int("max_thinking_tokens", self.max_thinking_tokens, 0, or_none=True)
        if isinstance(self.policy, list):
            object.__setattr__(self, "policy", tuple(self.policy))
        if not all(callable(maker) for maker in self.policies):
            raise ValueError(
                f"policy={short(self.policy)} must be a function that makes a policy, called for every "
                "sample, or a list of such: pass its class, or lambda: YourPolicy(...)"
            )
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise ValueError(
                f"grammar={short(self.grammar)} must be a Grammar: Grammar.json_schema(...), .regex(...), "
                ".choice(...) or .lark(...)"
            )
        for name in ("ignore_eos", "stop_in_reasoning", "statistics"):
            require_bool(name, getattr(self, name))
        if self.cache_salt is not None:
            _check_salt(self.cache_salt)
        for token_id in self.stop_token_ids:
            require_int("stop_token_ids", token_id, 0)
        for token_id, bias in (self.logit_bias or {}).items():
            require_int("logit_bias key", token_id, 0)
            require_number(f"logit_bias[{short(token_id)}]", bias, -100.0, 100.0)

    @property
    def policies(self) -> tuple[PolicyMaker, ...]:
        """What `policy` holds, one or several or none."""
        if self.policy is None:
            return ()
        return self.policy if isinstance(self.policy, tuple) else (self.policy,)

    @property
    def has_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


def _check_salt(salt: Any) -> None:
    if not isinstance(salt, str) or not 1 <= len(salt) <= MAX_SALT_CHARS:
        raise ValueError(
            f"cache_salt={short(salt)} must be a text of 1 to {MAX_SALT_CHARS} characters, or None"
        )


def _as_strings(stop: Any) -> tuple[str, ...]:
    if stop is not None and not isinstance(stop, str | list | tuple | set | frozenset):
        raise ValueError(f"stop={short(stop)} must be a string or a list of strings")
    strings = (stop,) if isinstance(stop, str) else tuple(stop or ())
    for item in strings:
        if not isinstance(item, str) or not item:
            raise ValueError(f"stop={short(stop)} must hold non-empty strings")
    return strings


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probability of one chosen token and of the `top` alternatives [(token_id, logprob), ...].

    is_injected: a policy put it there; nothing was sampled, and its log-probability is given as 0.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    is_injected: bool = False


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One finished sample.

    text: everything generated, tags included · reasoning: the thinking, None without · content: the answer.
    num_reasoning_tokens: of token_ids, those of the thinking, tags that the model wrote itself included.
    """

    index: int
    text: str
    reasoning: str | None
    content: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: str | int | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    cumulative_logprob: float | None = None
    statistics: TokenStatistics | None = None
    num_reasoning_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds and token counts of one request; completion_tokens counts all n samples.

    prefill_s: first scheduling to first token · decode_s: first token to last · queue_s: arrival to first scheduling
    cached_tokens: of the prompt, that were in the cache already and were not computed again.
    """

    prompt_tokens: int
    completion_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float
    cached_tokens: int = 0

    @property
    def time_to_first_token_s(self) -> float:
        return self.queue_s + self.prefill_s

    @property
    def prompt_tokens_per_s(self) -> float:
        return self.prompt_tokens / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """The first token of a sample belongs to its prefill, so it is not counted here."""
        return max(0, self.completion_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """The finished result of one prompt: `outputs` holds n samples.

    prompt_logprobs: of the prompt's tokens from the second on, where it was to be scored · prompt_top: the most likely
    alternatives [(token_id, logprob), ...] in the place of each of those, as many as were asked for
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: tuple[int, ...]
    outputs: tuple[CompletionOutput, ...]
    timings: Timings
    prompt_logprobs: tuple[float, ...] | None = None
    prompt_top: tuple[tuple[tuple[int, float], ...], ...] | None = None

    @property
    def text(self) -> str:
        """Text of the first sample."""
        return self.outputs[0].text


@dataclass(frozen=True, slots=True)
class StreamDelta:
    """What one step added to one sample; `finish_reason` on its last, `output` on the very last of the request.

    stop_reason: with finish_reason "stop", the stop string or token that ended the sample, or what a policy gave

    error: what ended it with finish_reason "abort": something that a policy of this request raised or, with
    is_step_error, that went wrong whenever it was computed.
    tool_markers: where tokens of this delta are markers of tool calls, counted in characters of the sample's reasoning
    followed by its content; their text may come with a later delta
    logprobs: of token_ids, where they were asked for
    """

    request_id: str
    index: int
    text: str
    reasoning: str
    content: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    output: RequestOutput | None = None
    error: Exception | None = None
    is_step_error: bool = False
    tool_markers: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    stop_reason: str | int | None = None


class RequestState(Enum):
    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Request:
    """One sample in the engine: tokens that exist, and how far the latent cache has caught up with them.

    block_table, block_hashes, num_computed_tokens and state are set by the scheduler; token_ids and logprobs grow at
    commit, and a token that is there never changes.
    """

    request_id: str
    index: int
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    seed: int
    max_total_tokens: int
    eos_token_ids: frozenset[int]
    order: int = 0  # of arrival
    priority: int = 0
    is_branch: bool = False  # keeps its blocks when it ends, and may go on later
    arrival_s: float = field(default_factory=time.perf_counter)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    cumulative_logprob: float = 0.0
    sample_state: SampleState | None = None  # only where a policy or statistics need it
    scores: list[float] | None = None  # of the prompt's tokens from the second on, if it is scored
    num_top: int = 0  # alternatives to be noted beside each score
    top: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    state: RequestState = RequestState.WAITING
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    block_hashes: list[bytes] = field(default_factory=list)
    num_offered_blocks: int = 0  # that a store behind the pool has been told of
    num_cached_tokens: int = 0  # of the prompt, that were found when it first ran
    num_disk_tokens: int = 0  # those of them that came from a store behind the pool
    is_counted: bool = False  # its prompt, in the engine's counters
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    first_scheduled_s: float = 0.0
    first_token_s: float = 0.0
    finished_s: float = 0.0

    def __post_init__(self) -> None:
        self.token_ids = list(self.prompt_token_ids)

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def wants_tokens(self) -> bool:
        """Whether more of them may come; of a branch, perhaps only the latents of those it has."""
        return len(self.token_ids) < self.max_total_tokens

    def finish(self, reason: FinishReason, stop_reason: str | int | None = None) -> None:
        self.state = RequestState.FINISHED
        self.finish_reason = reason
        self.stop_reason = stop_reason
        self.finished_s = time.perf_counter()
