"""Thinking controls of every dialect mean the same, and what contradicts itself is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moejet import LLM, SamplingParams
from moejet.chat_template import ChatTemplate
from moejet.server.reasoning_controls import (
    BUDGET_FIELDS,
    EFFORT_BUDGETS,
    EFFORTS,
    REASONING_FIELDS,
    ReasoningControls,
    normalise_reasoning,
)
from moejet.testing.checkpoints import write_tokenizer
from moejet.tokenizer import Tokenizer

TAIL = "{% for m in messages %}{{ m.content }}{% endfor %}<think></think>"
TEMPLATES = {
    "switch": "{% if enable_thinking is defined and enable_thinking %}on{% endif %}" + TAIL,
    "deepseek": "{% if not thinking is defined %}{% set thinking = false %}{% endif %}"
    "{{ bos_token }}{{ thinking }}" + TAIL,
    "effort": "{{ reasoning_effort }}{{ language | default('en') }}" + TAIL,
    "none": TAIL,
    "no thinking": "{{ messages[0].content }}",
}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    made = {}
    for name, template in TEMPLATES.items():
        path = tmp_path_factory.mktemp("tokenizer")
        write_tokenizer(path)
        settings = json.loads((path / "tokenizer_config.json").read_text())
        settings["chat_template"] = template
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
        made[name] = Tokenizer.from_path(path)
        if name == "no thinking":
            made[name].__dict__["think_tags"] = None
    return made


OFF = [
    {"reasoning_effort": "none"},
    {"reasoning": {"effort": "none"}},
    {"reasoning": {"enabled": False}},
    {"output_config": {"effort": "none"}},
    {"thinking": {"type": "disabled"}},
    {"thinking": False},
    {"enable_thinking": False},
    {"think": False},
    {"think": "none"},
    {"chat_template_kwargs": {"enable_thinking": False}},
    {"chat_template_kwargs": {"thinking": False}},
    {"thinking": {"budget_tokens": 0}},
    *({name: 0} for name in BUDGET_FIELDS),
]
ON = [
    {"thinking": {"type": "enabled"}},
    {"thinking": True},
    {"reasoning": {"enabled": True}},
    {"enable_thinking": True},
    {"think": True},
    {"chat_template_kwargs": {"thinking": True}},
    {"reasoning_effort": "high"},
    {"thinking": {"type": "enabled", "budget_tokens": 5000, "display": "summarized"}},
]


@pytest.mark.parametrize("fields", OFF)
def test_off_in_every_dialect(tokenizers, fields):
    for name, kwargs in {
        "switch": {"enable_thinking": False},
        "deepseek": {"thinking": False},
        "effort": {},
        "none": {},
    }.items():
        controls = normalise_reasoning(fields, tokenizers[name])
        assert controls.is_enabled is False
        assert controls.max_thinking_tokens == 0
        assert controls.template_kwargs == kwargs
    assert normalise_reasoning(fields, tokenizers["no thinking"]).max_thinking_tokens is None


@pytest.mark.parametrize("fields", ON)
def test_on_in_every_dialect(tokenizers, fields):
    for name, kwargs in {
        "switch": {"enable_thinking": True},
        "deepseek": {"thinking": True},
        "none": {},
    }.items():
        controls = normalise_reasoning(fields, tokenizers[name])
        assert controls.is_enabled is True
        assert controls.max_thinking_tokens != 0
        assert controls.template_kwargs == kwargs
    with pytest.raises(ValueError, match="this model does not think"):
        normalise_reasoning(fields, tokenizers["no thinking"])


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("on", ON)
def test_on_and_off_together_are_refused(tokenizers, on, off):
    if on.keys() & off.keys():
        return
    with pytest.raises(ValueError, match="contradicts") as error:
        normalise_reasoning({**on, **off}, tokenizers["switch"])
    for fields in (on, off):
        assert next(iter(fields)) in str(error.value)


def test_nothing_asked_for_is_the_models_own_way(tokenizers):
    assert normalise_reasoning({}, tokenizers["switch"]) == ReasoningControls()
    nulls = dict.fromkeys(REASONING_FIELDS)
    assert normalise_reasoning(nulls, tokenizers["switch"]) == ReasoningControls()
    assert normalise_reasoning({}, None) == ReasoningControls()
    adaptive = {"thinking": {"type": "adaptive"}, "reasoning": {"summary": "auto", "effort": None}}
    assert normalise_reasoning(adaptive, tokenizers["switch"]) == ReasoningControls()


@pytest.mark.parametrize("effort", EFFORTS)
def test_efforts_are_budgets_where_a_template_knows_none(tokenizers, effort):
    for fields in (
        {"reasoning_effort": effort},
        {"think": effort},
        {"reasoning": {"effort": effort}},
    ):
        controls = normalise_reasoning(fields, tokenizers["none"])
        assert controls.max_thinking_tokens == EFFORT_BUDGETS[effort]
        assert controls.effort == effort
        native = normalise_reasoning(fields, tokenizers["effort"])
        if effort != "none":
            assert native.template_kwargs == {"reasoning_effort": effort}
            assert native.max_thinking_tokens is None
    table = {**dict.fromkeys(EFFORTS), effort: 7}
    own = normalise_reasoning(
        {"reasoning_effort": effort}, tokenizers["none"], effort_budgets=table
    )
    assert own.max_thinking_tokens == (7 if effort != "none" else 0)


def test_efforts_rise():
    numbers = [float("inf") if n is None else n for n in EFFORT_BUDGETS.values()]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("name", [*BUDGET_FIELDS, "thinking.budget_tokens", "reasoning.max_tokens"])
def test_budgets_by_every_name(tokenizers, name):
    def fields(value: object) -> dict[str, Any]:
        outer, _, inner = name.partition(".")
        return {outer: {inner: value} if inner else value}

    tokenizer = tokenizers["none"]
    assert normalise_reasoning(fields(300), tokenizer).max_thinking_tokens == 300
    assert normalise_reasoning(fields(300), tokenizer).is_enabled is None
    assert normalise_reasoning(fields(-1), tokenizer).max_thinking_tokens is None
    # A number is more exact than an effort.
    both = normalise_reasoning({"reasoning_effort": "low", **fields(300)}, tokenizer)
    assert (both.max_thinking_tokens, both.effort) == (300, "low")
    assert normalise_reasoning({"reasoning_effort": "low", **fields(-1)}, tokenizer).effort == "low"
    for wrong in (-2, 1.5, True, "300", 2**31, [1]):
        with pytest.raises(ValueError, match=f"{name.replace('.', '[.]')}=.* must be a number"):
            normalise_reasoning(fields(wrong), tokenizer)
    other = "thinking_budget" if name != "thinking_budget" else "max_thinking_tokens"
    with pytest.raises(ValueError, match="contradicts"):
        normalise_reasoning({**fields(300), other: 301}, tokenizer)
    assert normalise_reasoning({**fields(300), other: 300}, tokenizer).max_thinking_tokens == 300


def test_whether_the_thinking_is_returned(tokenizers):
    tokenizer = tokenizers["none"]
    for fields in (
        {"include_reasoning": False},
        {"reasoning": {"exclude": True}},
        {"thinking": {"type": "enabled", "display": "omitted"}},
    ):
        assert not normalise_reasoning(fields, tokenizer).include_reasoning
    assert normalise_reasoning({"reasoning": {"exclude": False}}, tokenizer).include_reasoning
    with pytest.raises(ValueError, match=r"include_reasoning=True contradicts reasoning\.exclude"):
        normalise_reasoning({"include_reasoning": True, "reasoning": {"exclude": True}}, tokenizer)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"reasoning_effort": "huge"}, "reasoning_effort='huge' must be one of none, minimal"),
        ({"reasoning_effort": 3}, "reasoning_effort=3 must be one of"),
        ({"reasoning_effort": ["high"]}, "must be one of"),
        ({"reasoning_effort": "low", "reasoning": {"effort": "high"}}, "contradicts"),
        ({"reasoning": "high"}, "reasoning='high' must be an object with effort"),
        ({"reasoning": {"level": 1}}, "reasoning has no field 'level'"),
        ({"reasoning": {"summary": "poem"}}, r"reasoning\.summary='poem' must be"),
        ({"thinking": {"type": "maybe"}}, r"thinking\.type='maybe' must be 'enabled'"),
        ({"thinking": {"type": []}}, r"thinking\.type=\[\] must be"),
        ({"thinking": {"type": "enabled", "depth": 1}}, "thinking has no field 'depth'"),
        ({"thinking": {"display": 1}}, r"thinking\.display=1 must be"),
        ({"enable_thinking": "yes"}, "enable_thinking='yes' must be true or false"),
        ({"think": 1}, "think=1 must be true or false"),
        ({"separate_reasoning": False}, "separate_reasoning=False is not supported"),
        ({"output_config": {"effort": "wild"}}, r"output_config\.effort='wild' must be one of"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs must be an object"),
        ({"chat_template_kwargs": {"enable_thinking": 1}}, "enable_thinking=1 must be true"),
        ({"chat_template_kwargs": {"messages": []}}, "'messages', which is not a variable"),
        ({"chat_template_kwargs": {"bos_token": "x"}}, "is not a variable"),
        ({"chat_template_kwargs": {"raise_exception": 1}}, "is not a variable"),
        ({"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "is not a variable"),
        ({"chat_template_kwargs": {"language": "x" * (1 << 20)}}, "characters as JSON, and 16384"),
        ({"chat_template_kwargs": {"x" * 9999: 1}}, r"x\.\.\., which is not a variable"),
    ],
)
def test_what_is_wrong_is_named(tokenizers, fields, message):
    with pytest.raises(ValueError, match=message) as error:
        normalise_reasoning(fields, tokenizers["effort"])
    assert len(str(error.value)) < 400


def test_variables_of_the_template_are_passed_on(tokenizers):
    fields = {"chat_template_kwargs": {"language": "de", "reasoning_effort": "low"}}
    controls = normalise_reasoning(fields, tokenizers["effort"])
    assert controls.template_kwargs == {"language": "de", "reasoning_effort": "low"}
    assert controls.effort == "low"


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["type", "effort", "budget_tokens", "exclude", "thinking", "x"]),
            inner,
            max_size=3,
        ),
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(REASONING_FIELDS), JSON, max_size=4))
def test_any_json_is_understood_or_refused(tokenizers, fields):
    for tokenizer in (*tokenizers.values(), None):
        try:
            controls = normalise_reasoning(fields, tokenizer)
        except ValueError as error:
            assert any(name in str(error) for name in fields)  # noqa: PT017
            continue
        SamplingParams(max_thinking_tokens=controls.max_thinking_tokens)


def test_variables_that_a_template_reads():
    def names(source: str) -> set[str]:
        return set(ChatTemplate(source).variables)

    assert names(TEMPLATES["deepseek"]) == {"thinking", "bos_token"}
    assert names("{% if a %}{% set t = 1 %}{% endif %}{{ t }}") == {"a"}
    assert names(
        "{% set x = x | default(1) %}{{ x }}{% for m in messages %}{{ m }}{% endfor %}"
    ) == {"x"}
    assert names("{% set x = x if x is defined else 1 %}{{ x }}") == {"x"}
    assert names("{% macro f(y) %}{{ y }}{{ w }}{% endmacro %}{{ f(tools) }}") == {"w"}
    assert names("{% set ns = namespace(a=1) %}{{ ns.a }}{{ raise_exception('x') }}") == set()


def test_a_model_without_a_switch_answers_at_once():
    """The embedded model's template has a switch; the budget alone does it too."""
    with LLM() as llm:
        controls = normalise_reasoning({"reasoning_effort": "none"}, llm.tokenizer)
        assert controls.template_kwargs == {"enable_thinking": False}
        params = SamplingParams(
            temperature=0, max_tokens=60, max_thinking_tokens=controls.max_thinking_tokens
        )
        conversation = [{"role": "user", "content": "Start with 17, add 25."}]
        for kwargs in ({}, controls.template_kwargs):
            [output] = llm.chat(conversation, params, **kwargs)
            assert not (output.outputs[0].reasoning or "").strip()
            assert output.outputs[0].content
