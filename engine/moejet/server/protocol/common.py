"""What the dialects share: sampling parameters, log-probabilities and usage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from moejet.grammar import Grammar
from moejet.reasoning.effort import effort_budgets
from moejet.request import SamplingParams, TokenLogprobs
from moejet.server.backend import ModelCard
from moejet.server.config import ServerConfig
from moejet.server.errors import ApiError, wrong
from moejet.server.generation import Progress, Totals
from moejet.server.prompts import PromptMaker
from moejet.server.protocol.fields import MAX_SALT_CHARS, SamplingFields
from moejet.server.strategies import engine_usage
from moejet.server.tool_calls import ToolFormat
from moejet.tokenizer import Tokenizer
from moejet.validation import short


@dataclass(frozen=True, slots=True)
class Context:
    """What conversions need to know of model and server."""

    card: ModelCard
    config: ServerConfig
    prompts: PromptMaker
    tool_format: ToolFormat | None

    @property
    def tokenizer(self) -> Tokenizer:
        return self.prompts.tokenizer

    @property
    def effort_budgets(self) -> Mapping[str, int | None]:
        """Tokens of thinking that the model gets at each effort."""
        return effort_budgets(self.card.loaded_as or self.card.name)

    def check_model(self, name: str | None) -> None:
        """A request that names another model was meant for somebody else."""
        if name is not None and name not in (self.card.name, "", "default"):
            raise ApiError(
                404,
                f"model={short(name)} is not served here: use {self.card.name!r}, or leave it out",
                param="model",
                code="model_not_found",
            )


def sampling_params(
    fields: SamplingFields,
    context: Context,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    grammar: Grammar | None,
    max_thinking_tokens: int | None = None,
    max_tokens_field: str = "max_tokens",
) -> SamplingParams:
    """The request's choices over the checkpoint's own recommendation. Raises ApiError naming the field."""
    config = context.config
    stop = [fields.stop] if isinstance(fields.stop, str) else fields.stop
    if stop is not None and len(stop) > config.max_stop:
        raise wrong(
            f"stop holds {len(stop)} strings, and {config.max_stop} are allowed: send fewer", "stop"
        )
    if fields.n is not None and not 1 <= fields.n <= config.max_n:
        raise wrong(f"n={fields.n} must be between 1 and {config.max_n}", "n")
    if max_tokens is not None and not 1 <= max_tokens < 2**63:
        raise wrong(
            f"{max_tokens_field}={short(max_tokens)} must be an integer of at least 1",
            max_tokens_field,
        )
    for name in ("top_k", "priority"):
        value = getattr(fields, name)
        if value is not None and not -(2**31) <= value < 2**31:
            raise wrong(f"{name}={value} must fit 32 bits", name)
    given = {
        "temperature": fields.temperature,
        "top_p": fields.top_p,
        "top_k": 0 if fields.top_k == -1 else fields.top_k,
        "min_p": fields.min_p,
        "repetition_penalty": fields.repetition_penalty,
        "presence_penalty": fields.presence_penalty,
        "frequency_penalty": fields.frequency_penalty,
        "seed": fields.seed,
        "stop": tuple(stop) if stop is not None else None,
        "stop_token_ids": _ids(fields.stop_token_ids),
        "logit_bias": _biases(fields.logit_bias, context.card.vocab_size),
        "ignore_eos": fields.ignore_eos,
        "n": fields.n,
        "max_tokens": max_tokens,
        "logprobs": logprobs,
        "grammar": grammar,
        "max_thinking_tokens": max_thinking_tokens,
        "cache_salt": _salt(fields.cache_salt),
    }
    chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return replace(context.card.default_sampling, **chosen)


def _salt(salt: str | None) -> str | None:
    """vLLM's field: who sends another one shares no cached prefixes."""
    if salt is not None and not 1 <= len(salt) <= MAX_SALT_CHARS:
        raise wrong(
            f"cache_salt={short(salt)} has {len(salt)} characters: it must have 1 to {MAX_SALT_CHARS}",
            "cache_salt",
        )
    return salt


def _ids(ids: list[int] | None) -> tuple[int, ...] | None:
    if ids is not None and len(ids) > 64:
        raise wrong(f"stop_token_ids holds {len(ids)} ids, and 64 are allowed", "stop_token_ids")
    return tuple(ids) if ids is not None else None


def _biases(biases: Mapping[str, float] | None, vocab_size: int) -> dict[int, float] | None:
    found: dict[int, float] = {}
    for key, bias in (biases or {}).items():
        if not key.isascii() or not key.isdigit() or not int(key[:12]) < vocab_size:
            raise wrong(
                f"logit_bias holds {short(key)}: its keys must be token ids below {vocab_size}",
                "logit_bias",
            )
        found[int(key)] = bias
    return found or None


def response_grammar(format: Mapping[str, Any] | None, field: str) -> Grammar | None:
    """The grammar of OpenAI's response_format, in Chat's form or the flat one of Responses."""
    if format is None:
        return None
    kind = format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar.json_schema({"type": "object"})
    if kind != "json_schema":
        raise wrong(
            f"{field}.type={short(kind)} must be 'text', 'json_object' or 'json_schema'",
            f"{field}.type",
        )
    spec = format.get("json_schema", format)
    schema = spec.get("schema") if isinstance(spec, Mapping) else None
    if not isinstance(schema, Mapping):
        raise wrong(f"{field}.json_schema.schema must be a JSON schema", f"{field}.json_schema")
    try:
        return Grammar.json_schema(schema)
    except ValueError as error:
        raise wrong(f"{field}: {error}", field, "grammar_too_complex") from error


def structured_grammar(fields: Mapping[str, Any] | None) -> Grammar | None:
    """The grammar of vLLM's structured_outputs: one of json, regex, choice and grammar (Lark)."""
    if not fields:
        return None
    makers: dict[str, Callable[[Any], Grammar]] = {
        "json": Grammar.json_schema,
        "regex": Grammar.regex,
        "choice": Grammar.choice,
        "grammar": Grammar.lark,
    }
    given = [name for name, value in fields.items() if value is not None]
    if len(given) != 1 or given[0] not in makers:
        raise wrong(
            f"structured_outputs holds {short(given)}: give one of {', '.join(makers)}",
            "structured_outputs",
        )
    try:
        return makers[given[0]](fields[given[0]])
    except ValueError as error:
        raise wrong(f"structured_outputs.{given[0]}: {error}", "structured_outputs") from error


def string_field(item: Mapping[str, Any], name: str, where: str) -> str:
    """item[name], which must be a string; where: the item's path in the request."""
    value = item.get(name)
    if not isinstance(value, str):
        raise wrong(f"{where}.{name}={short(value)} must be a string", f"{where}.{name}")
    return value


def usage(totals: Totals) -> dict[str, Any]:
    """In OpenAI's Chat form. reasoning_tokens: all tokens of the thinking, tags that the model wrote included."""
    engine = {} if totals.outcome is None else {"engine": engine_usage(totals.outcome)}
    return {
        "prompt_tokens": totals.prompt_tokens,
        "completion_tokens": totals.completion_tokens,
        "total_tokens": totals.prompt_tokens + totals.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": totals.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": totals.reasoning_tokens},
        **engine,
    }


def progress(found: Progress) -> dict[str, Any]:
    """In llama.cpp's form, for a chunk that adds nothing else."""
    return {
        "prompt_progress": {
            "total": found.total,
            "cache": found.cached,
            "processed": found.processed,
            "time_ms": round(found.seconds * 1e3),
        }
    }


def timings(totals: Totals) -> dict[str, Any]:
    """In llama.cpp's form, in milliseconds; prompt_n leaves out what was cached."""
    prompt_n = totals.prompt_tokens - totals.cached_tokens
    return {
        "queue_ms": totals.queue_s * 1e3,
        "cache_n": totals.cached_tokens,
        "prompt_n": prompt_n,
        "prompt_ms": totals.prefill_s * 1e3,
        "prompt_per_second": prompt_n / totals.prefill_s if totals.prefill_s > 0 else 0.0,
        "predicted_n": totals.completion_tokens,
        "predicted_ms": totals.decode_s * 1e3,
        "predicted_per_second": (
            max(0, totals.completion_tokens - 1) / totals.decode_s if totals.decode_s > 0 else 0.0
        ),
    }


def token_text(tokenizer: Tokenizer | None, token_id: int) -> str:
    """A token in a list of log-probabilities; parts of characters are shown by their bytes."""
    if tokenizer is None:
        return f"token_id:{token_id}"
    raw = tokenizer.token_bytes(token_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def finite(logprob: float) -> float:
    """JSON has no infinity; what was forbidden is as unlikely as can be said."""
    return max(logprob, -9999.0)


def chat_logprobs(
    tokenizer: Tokenizer | None, entries: tuple[TokenLogprobs, ...]
) -> list[dict[str, Any]]:
    """In OpenAI's Chat form, for all tokens, those of the thinking and the end of the answer included."""

    def described(token_id: int, logprob: float) -> dict[str, Any]:
        raw = tokenizer.token_bytes(token_id) if tokenizer is not None else b""
        return {
            "token": token_text(tokenizer, token_id),
            "logprob": finite(logprob),
            "bytes": list(raw),
        }

    return [
        {
            **described(entry.token_id, entry.logprob),
            "top_logprobs": [described(*alternative) for alternative in entry.top],
        }
        for entry in entries
    ]
