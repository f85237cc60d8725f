"""Strategies and efforts by name."""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest

import moejet.reasoning
from moejet import LLM, SamplingParams
from moejet.reasoning import (
    Best,
    BetaStop,
    Confidence,
    Majority,
    MutualCheck,
    Progress,
    Sample,
    Single,
    StepHead,
    Templates,
    VerifyRounds,
    Weighted,
    parse_strategy,
    rstar,
    solve,
)
from moejet.reasoning.effort import EFFORTS, strategy_of, with_effort
from moejet.reasoning.spec_text import Spec
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
        ("best:16,scorer=step_head", Sample(16, select=Best(StepHead()))),
        ("best:16:head", Sample(16, select=Best(StepHead()))),
        ("best:16:logprob", Sample(16, select=Best(Confidence("logprob")))),
        ("best:4:gap,margin=0.1", Sample(4, select=Best(Confidence("gap"), 0.1))),
        ("adaptive", Sample(40, stop=BetaStop(), wave=4)),
        ("rounds:3", VerifyRounds(most=3)),
        ({"name": "vote", "n": 5}, Sample(5)),
        ({"name": "best", "n": 5, "scorer": "gap"}, Sample(5, select=Best(Confidence("gap")))),
    ],
)
def test_names_of_strategies(llm: LLM, spec: Any, expected: Any) -> None:
    assert parse_strategy(spec, llm) == expected


# One of each name, as small as it can be, with what it is in code where a name alone does not say.
EXAMPLES = {
    "single": "single",
    "vote": "vote:2,wave=1,stop=decided",
    "weighted": "weighted:2:gap,temperature=0.5",
    "borda": "borda:2,p=1",
    "best": "best:2:step_head,aggregate=last",
    "shortest": "shortest:2,stop=unanimous",
    "mbr": "mbr:2",
    "adaptive": "adaptive:2,inner=(check:1)",
    "deepconf": "deepconf:2,window=64",
    "rounds": "rounds:2,inner=(vote:2)",
    "check": 'check:1,text="Wait, once more",greedy=true',
    "probe": "probe:2,every=32",
    "turns": "turns,threshold=0.9",
    "beam": "beam:4x2,max_steps=20,final=vote",
    "dvts": "dvts:4x2:logprob",
    "particles": "particles:2,resampling=multinomial",
    "mcts": "mcts:2x2,value=votes,parallel=2",
    "rstar": "rstar:1x1,samples=2,votes=2,depth=2,parallel=2",
    "marco": "marco:2x2,tokens=64",
    "code": "code:2x2:verifier,depth=2",
    "mutual": "mutual,inner=(vote:2),need=0.25",
    "debate": "debate:2,rounds=1",
    "cot": "cot,instruction=Think",
    "plan": "plan,inner=(single)",
    "critique": "critique:1",
    "templates": "templates:1",
    "json": "json:1,tokens=60,tries=1",
    "difficulty": "difficulty,probe=(vote:2),easy=(single),hard=(vote:2)",
}


def test_every_name_has_an_example() -> None:
    assert list(EXAMPLES) == list(strategy_names())


@pytest.mark.parametrize("spec", EXAMPLES.values())
def test_every_name_answers(llm: LLM, spec: str) -> None:
    """At a low temperature the tiny reasoner solves this; it can neither plan nor write JSON, and ends all the same."""
    params = SamplingParams(temperature=0.3, max_tokens=150)
    told: list[Progress] = []
    strategy = parse_strategy(spec, llm)
    result = solve(
        llm, PROMPT, strategy, params=params, answers=NumberAnswers(), seed=1, watch=told.append
    )
    assert result.usage.generated_tokens > 0
    assert llm.engine.scheduler.held == []
    name = Spec.read(spec).name
    if name not in ("check", "critique", "plan", "templates", "json", "code"):
        assert result.answer == "126"
    # Whatever searches tells of its tree as it grows, and all of it is in the result.
    nodes = {event.node.number for event in told if event.node is not None}
    searches = ("beam", "dvts", "particles", "mcts", "rstar", "marco", "code", "templates")
    assert bool(nodes) == (name in searches)
    assert nodes <= {node.number for node in result.nodes}


@pytest.mark.parametrize("text", EXAMPLES.values())
def test_texts_and_objects_say_the_same(llm: LLM, text: str) -> None:
    def as_object(spec: Spec) -> dict[str, Any]:
        return {
            "name": spec.name,
            **{k: as_object(v) if isinstance(v, Spec) else v for k, v in spec.options.items()},
        }

    spec = Spec.read(text)
    assert spec.text == text
    given = json.loads(json.dumps(as_object(spec)))
    assert Spec.read(given) == spec
    assert parse_strategy(given, llm) == parse_strategy(text, llm)


def test_odd_texts_survive() -> None:
    options = {"a": "7", "b": "true", "c": "(x)", "d": 'say "hi", now', "e": " x ", "f": 0.5}
    spec = Spec(
        "cot", {**options, "g": Spec("vote", {"n": 3}), "h": False, "i": "/models/a-b.gguf"}
    )
    assert Spec.read(spec.text) == spec
    assert Spec.read("best,scorer=gap") == Spec.read("best:gap")
    assert Spec.read("beam , n = 4 , width = 2").text == "beam:4x2"


def test_every_public_part_can_be_named(llm: LLM) -> None:
    """Strategies, and what they are made of, but for functions of one's own."""
    more = ["mbr:2,utility=exact", "vote:2,stop=beta", "best:2:reward,scorer_model=x", "mcts:1"]
    more += ["code:1,method=tree", "beam:2x1:verifier"]
    found: set[str] = set()

    def visit(part: Any) -> None:
        if isinstance(part, tuple):
            for item in part:
                visit(item)
        elif is_dataclass(part) and not isinstance(part, type):
            found.add(type(part).__name__)
            for field in fields(part):
                visit(getattr(part, field.name))

    for text in (*EXAMPLES.values(), *more):
        visit(parse_strategy(text, llm, load=lambda name: llm))
    methods = ("run", "choose", "is_enough", "score", "score_steps", "expand", "rewards")
    parts = {
        name
        for name in moejet.reasoning.__all__
        if isinstance(part := getattr(moejet.reasoning, name), type)
        and is_dataclass(part)
        and any(callable(getattr(part, method, None)) for method in methods)
    }
    assert len(parts) == 40
    assert parts - found == {"Check"}


def test_second_models_and_files(llm: LLM, tmp_path: Path) -> None:
    loaded: list[str] = []

    def load(name: str) -> LLM:
        loaded.append(name)
        return llm

    checked = parse_strategy("mutual:2,second=/models/x", llm, load=load)
    assert checked == MutualCheck(rstar(rollouts=2), llm)
    library = tmp_path / "templates.json"
    library.write_text(
        '[{"name": "N", "section": "S", "tags": [], "when": "always", "steps": ["go"]}]'
    )
    spec = f"templates,library={library},navigator=y,worker=z"
    templates = parse_strategy(spec, llm, load=load)
    assert isinstance(templates, Templates)
    assert templates.library.templates[0].name == "N"
    assert loaded == ["/models/x", "y", "z"]
    for text, option in (("mutual,second=x", "second"), (spec, "library")):
        with pytest.raises(ValueError, match=f"strategy.{option} names a model or a file, which"):
            parse_strategy(text, llm)


def test_samples_of_nested_strategies_multiply(llm: LLM) -> None:
    parse_strategy("vote:8,inner=(rounds:8)", llm, max_samples=64)
    for spec, samples in (
        ("vote:8,inner=(rounds:9)", 72),
        ("difficulty,probe=(vote:40),hard=(vote:25)", 65),
        ("code:9x8", 72),
        ("mutual:66", 66),
        ("adaptive,inner=(debate:2)", 80),
    ):
        with pytest.raises(ValueError, match=f"asks for {samples} samples, and 64 are allowed"):
            parse_strategy(spec, llm, max_samples=64)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "not understood"),
        ("vote:", "not understood"),
        ("vote:4x", "not understood"),
        ("vot:4", "did you mean 'vote'"),
        ("nothing", "is not one of single"),
        ("vote:0", "strategy.n=0 must be an integer of at least 1"),
        ("vote:99999", "between 1 and 1024"),
        ("vote:4x4", "strategy.width is unknown: vote takes n, stop"),
        ("vote:4:gap", "strategy.scorer is unknown"),
        ("single:3", "strategy.n is unknown: single takes nothing"),
        ("vote:4,wave=2,wave=3", "strategy.wave is given twice"),
        ("vote:4,inner=(vote:4", "not understood"),
        ("vote:4,inner=vot", "did you mean 'vote'"),
        ("rounds:2,inner=7", "not understood"),
        ('check,text="', "not understood from"),
        ("best:4:reward", "add scorer_model=MODEL"),
        ("adaptive,confidence=high", "strategy.confidence='high' must be a number"),
        ("adaptive,confidence=2", "confidence=2.0 must be"),
        ("mcts:4,simulation=all", "must be one of finish, expand, none"),
        ("cot,inner=(" * 9 + "single" + ")" * 9, "too deep"),
        ({"name": "cot", "inner": {"n": 2}}, "strategy.inner.name"),
        ({"name": "vote", "stop": ["beta"]}, "strategy.stop must be"),
        ({"name": "vote", "N": 2}, "has an option 'N'"),
        ("best:4:beauty", "scorer 'beauty'"),
        ({"n": 4}, "strategy.name"),
        ({"name": "vote", "samples": 4}, "strategy.samples"),
        ({"name": "vote", "n": "4"}, "strategy.n='4'"),
        ({"name": "vote", "n": True}, "strategy.n=True"),
        ({"name": "vote", "width": 2}, "strategy.width is unknown"),
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
    with pytest.raises(ValueError, match="'step_head' needs"):
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
