"""Strategies and efforts by name."""

from typing import Any

import pytest

import moejet.reasoning
from moejet import LLM, SamplingParams
from moejet.reasoning import (
    Best,
    BetaStop,
    Confidence,
    Majority,
    Sample,
    Single,
    StepHead,
    VerifyRounds,
    Weighted,
    parse_strategy,
    solve,
)
from moejet.reasoning.effort import EFFORTS, strategy_of, with_effort
from moejet.reasoning.specs import strategy_names
from moejet.testing.number_answers import NumberAnswers

PROMPT = [{"role": "user", "content": "Start with 17, add 25, then multiply by 3."}]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("single", Single()),
        ("vote:16", Sample(16, select=Majority())),
        (" vote ", Sample(8)),
        ("weighted:4", Sample(4, select=Weighted(StepHead()))),
        ("best:16:logprob", Sample(16, select=Best(Confidence("logprob")))),
        ("adaptive", Sample(40, stop=BetaStop(), wave=4)),
        ("rounds:3", VerifyRounds(most=3)),
        ({"name": "vote", "n": 5}, Sample(5)),
        ({"name": "best", "n": 5, "scorer": "gap"}, Sample(5, select=Best(Confidence("gap")))),
    ],
)
def test_names_of_strategies(llm: LLM, spec: Any, expected: Any) -> None:
    assert parse_strategy(spec, llm) == expected


@pytest.mark.parametrize("name", strategy_names())
def test_every_name_answers(llm: LLM, name: str) -> None:
    params = SamplingParams(temperature=0.7)
    number = {"single": "", "turns": "", "beam": ":4x2", "dvts": ":4x2"}.get(name, ":2")
    strategy = parse_strategy(f"{name}{number}", llm)
    result = solve(llm, PROMPT, strategy, params=params, answers=NumberAnswers(), seed=1)
    assert result.answer is not None
    assert result.usage.generated_tokens > 0


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "not understood"),
        ("vote:", "not understood"),
        ("vote:4x", "not understood"),
        ("vot:4", "did you mean 'vote'"),
        ("nothing", "is not one of single"),
        ("vote:0", "between 1 and 1024"),
        ("vote:99999", "between 1 and 1024"),
        ("vote:4x4", "takes 1 number"),
        ("single:3", "takes no number"),
        ("best:4:beauty", "strategy.scorer='beauty'"),
        ({"n": 4}, "strategy.name"),
        ({"name": "vote", "samples": 4}, "strategy.samples"),
        ({"name": "vote", "n": "4"}, "strategy.n='4'"),
        ({"name": "vote", "n": True}, "strategy.n=True"),
        ({"name": "vote", "width": 2}, "needs strategy.n"),
        (7, "strategy=7"),
    ],
)
def test_wrong_specifications(llm: LLM, spec: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_strategy(spec, llm)


def test_a_head_is_asked_for_only_where_there_is_one(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm.engine, "step_head", None)
    assert parse_strategy("best", llm) == Sample(8, select=Best(Confidence("self_certainty")))
    with pytest.raises(ValueError, match="step head"):
        parse_strategy("best:4:head", llm)
    with pytest.raises(ValueError, match="no step head"):
        solve(llm, PROMPT, Sample(2, select=Best(StepHead())), answers=NumberAnswers())


def test_more_effort_thinks_longer(llm: LLM) -> None:
    """Mean tokens of thinking grow strictly from level to level where the levels bind."""
    prompts = [
        [
            {
                "role": "user",
                "content": f"Start with {n}, times 2, add {n}, minus 7, plus 4, minus 2.",
            }
        ]
        for n in (11, 23, 35, 47)
    ]
    means = []
    for level in ("none", "minimal", "low", "medium"):
        params = with_effort(SamplingParams(temperature=0.0), level, "tiny-reasoner")
        outputs = llm.chat(prompts, params)
        means.append(sum(o.outputs[0].num_reasoning_tokens for o in outputs) / len(outputs))
    assert means == sorted(set(means))
    assert with_effort(SamplingParams(), "max", "any").max_thinking_tokens is None
    assert with_effort(SamplingParams(max_thinking_tokens=9), "low", "any").max_thinking_tokens == 9
    assert with_effort(SamplingParams(), "high", "any").max_thinking_tokens == 16384
    with pytest.raises(ValueError, match="effort='huge'"):
        with_effort(SamplingParams(), "huge", "any")
    for level in EFFORTS:
        parse_strategy(strategy_of(level), llm)


def test_public_names_are_there() -> None:
    for name in moejet.reasoning.__all__:
        assert getattr(moejet.reasoning, name) is not None
    with pytest.raises(AttributeError, match="nothing"):
        _ = moejet.reasoning.nothing
