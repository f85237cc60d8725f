"""Fields of requests: which are known, which are harmless, and what the OpenAPI document says of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moejet.request import MAX_LOGPROBS
from moejet.server.errors import ApiError, wrong
from moejet.validation import near_miss, short

Check = Callable[[Any], bool]
MAX_SALT_CHARS = 128
Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
# Limits for the document only: what is beyond them is refused elsewhere, with a remedy.
Count = Annotated[int, Field(json_schema_extra={"minimum": 1, "maximum": 2**63 - 1})]
CountOrZero = Annotated[int, Field(json_schema_extra={"minimum": 0, "maximum": 2**63 - 1})]
Int32 = Annotated[int, Field(json_schema_extra={"minimum": -(2**31), "maximum": 2**31 - 1})]
Temperature = Annotated[float, Field(json_schema_extra={"minimum": 0, "maximum": 100})]
TopP = Annotated[float, Field(json_schema_extra={"exclusiveMinimum": 0, "maximum": 1})]
TopK = Annotated[int, Field(json_schema_extra={"minimum": -1, "maximum": 2**31 - 1})]
MinP = Annotated[float, Field(json_schema_extra={"minimum": 0, "maximum": 1})]
Factor = Annotated[float, Field(json_schema_extra={"minimum": 0.01, "maximum": 100})]
Penalty = Annotated[float, Field(json_schema_extra={"minimum": -2, "maximum": 2})]
NumLogprobs = Annotated[int, Field(json_schema_extra={"minimum": 0, "maximum": MAX_LOGPROBS})]
Salt = Annotated[str, Field(json_schema_extra={"minLength": 1, "maxLength": MAX_SALT_CHARS})]


def anything(_: Any) -> bool:
    return True


def one_of(*values: Any) -> Check:
    return lambda value: value in values


# Fields that say something about the request and nothing about its answer, with the values for which that holds.
HARMLESS: dict[str, Check] = {
    "user": anything,
    "metadata": anything,
    "service_tier": anything,
    "safety_identifier": anything,
    "prompt_cache_key": anything,
    "prompt_cache_retention": anything,
    "prompt_cache_options": anything,
    "prediction": anything,
    "store": one_of(False),
    "logit_bias": one_of({}),
    "best_of": one_of(1),
    "min_tokens": one_of(0),
    "modalities": one_of(["text"]),
    "verbosity": one_of("medium"),
    "skip_special_tokens": one_of(True),
    "spaces_between_special_tokens": anything,
    "add_generation_prompt": one_of(True),
    "continue_final_message": one_of(False),
    "use_beam_search": one_of(False),
    "length_penalty": one_of(1, 1.0),
    "detokenize": one_of(True),
    "cache_prompt": one_of(True),
    "id_slot": one_of(-1),
    "timings_per_token": one_of(False),
    "functions": one_of([]),
    "function_call": one_of("auto", "none"),
    "web_search_options": one_of(),
}


def _describe(schema: dict[str, Any], kind: type[BaseModel]) -> None:
    """Adds the fields that are known without being declared; others are refused."""
    assert issubclass(kind, ApiModel), f"{kind=}"
    known = schema.setdefault("properties", {})
    for name in sorted({*kind.harmless, *kind.passed_on}):
        known.setdefault(name, {})
    schema["additionalProperties"] = False


class ApiModel(BaseModel):
    """Fields of a request. JSON types are taken as they are; fields that nobody declared are looked at one by one."""

    model_config = ConfigDict(strict=True, extra="allow", json_schema_extra=_describe)

    harmless: ClassVar[Mapping[str, Check]] = HARMLESS
    passed_on: ClassVar[frozenset[str]] = frozenset()  # fields that somebody else checks


class Part(BaseModel):
    """A part of a message's content."""

    model_config = ConfigDict(strict=True, extra="allow")

    type: str
    text: str | None = None


Model = TypeVar("Model", bound=ApiModel)


def parse(kind: type[Model], data: Any) -> Model:
    """Checks a request's body. Raises ApiError naming the first field that is wrong or unknown."""
    if not isinstance(data, dict):
        raise wrong(f"the body must be a JSON object, not {_json_type(data)}")
    try:
        model = kind.model_validate(data)
    except ValidationError as error:
        raise _field_error(error, data) from None
    except RecursionError:
        raise wrong("the body is nested too deeply") from None
    for name, value in (model.model_extra or {}).items():
        if value is not None and name not in kind.passed_on:
            _check_unknown(kind, name, value)
    return model


def _field_error(error: ValidationError, data: dict[str, Any]) -> ApiError:
    first = error.errors(include_url=False)[0]
    path = _field_path(first["loc"], data)
    if first["type"] == "missing":
        return wrong(f"{path} is missing: it must be given", path)
    message = first["msg"].replace("Input should", "must")
    if first["type"] == "extra_forbidden":
        message = "no such field is known; leave it out"
    return wrong(f"{path}={short(first['input'])}: {message}", path or None)


def _field_path(loc: tuple[int | str, ...], data: Any) -> str:
    """'messages[0].content' of a location in which pydantic also names the types that it tried."""
    path = ""
    for i, key in enumerate(loc):
        if isinstance(key, int) and isinstance(data, list) and key < len(data):
            path, data = f"{path}[{key}]", data[key]
        elif isinstance(data, dict) and (key in data or i == len(loc) - 1):
            path, data = f"{path}.{key}" if path else str(key), data.get(key)
    return path


def _check_unknown(kind: type[ApiModel], name: str, value: Any) -> None:
    check = kind.harmless.get(name)
    if check is not None:
        if check(value):
            return
        raise wrong(f"{name}={short(value)} is not supported here: leave it out", name)
    known = [*kind.model_fields, *kind.passed_on, *kind.harmless]
    hint = near_miss(name, known) or "; leave it out"
    raise wrong(f"unknown field {short(name)}{hint}", name[:80], "unknown_field")


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "a truth value", type(None): "null"}
    return names.get(type(value), "a number")


class StreamOptions(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None  # random padding, which nobody has to send
    continuous_usage_stats: Literal[False] | None = None
    include_progress: bool | None = None  # of a strategy


class SamplingFields(ApiModel):
    """Sampling, under the names that OpenAI, vLLM and llama.cpp agree on."""

    temperature: Temperature | None = None
    top_p: TopP | None = None
    top_k: TopK | None = None
    min_p: MinP | None = None
    repetition_penalty: Factor | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Int64 | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    logit_bias: dict[str, float] | None = None
    ignore_eos: bool | None = None
    n: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    structured_outputs: dict[str, Any] | None = None
    return_progress: bool | None = None
    priority: Int32 | None = None
    cache_salt: Salt | None = None
