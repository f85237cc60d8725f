"""Programs of prompts, followed by a scripted model: transcripts, and prefixes that are computed once."""

import json
from collections.abc import Callable
from dataclasses import replace

import pytest

from moejet import LLM, SamplingParams
from moejet.reasoning.budget import Budget
from moejet.reasoning.result import Result
from moejet.reasoning.sample import Sample
from moejet.reasoning.search.debate import Debate
from moejet.reasoning.search.json_steps import JsonSteps, parse_step
from moejet.reasoning.search.programs import ChainOfThought, PlanAndSolve, SelfCritique
from moejet.reasoning.search.templates import Library, Template, Templates
from moejet.reasoning.solver import solve
from moejet.reasoning.task import Strategy
from moejet.testing.number_answers import NumberAnswers
from moejet.testing.script import scripted

QUESTION = "Ann has 3 apples and buys 4. How many has she?"
PROMPT = [{"role": "user", "content": QUESTION}]


def run(
    llm: LLM, strategy: Strategy, say: Callable[[str], str], **options: object
) -> tuple[Result, list[str]]:
    """The result, and what the model was asked each time, all of the conversation."""
    seen: list[str] = []

    def reply(context: str) -> str:
        seen.append(context)
        return f"</think>\n\n{say(context)}"

    params = scripted(llm, reply, max_tokens=400)
    result = solve(llm, PROMPT, strategy, params=params, answers=NumberAnswers(), **options)  # type: ignore[arg-type]
    assert llm.engine.scheduler.held == []
    return result, seen


def test_chain_of_thought_puts_its_instruction_behind_the_question(llm: LLM) -> None:
    result, seen = run(llm, ChainOfThought("Think."), lambda context: "So 7.")
    assert len(seen) == 1
    assert f"{QUESTION}\n\nThink.<|assistant|>" in seen[0]
    assert (result.answer, result.content) == ("7", "So 7.")
    result, seen = run(llm, ChainOfThought(inner=Sample(3)), lambda context: "So 7.")
    assert len(result.candidates) == len(seen) == 3


def test_a_plan_comes_first(llm: LLM) -> None:
    strategy = PlanAndSolve(plan="Plan only.", solve="Carry it out.")
    result, seen = run(
        llm, strategy, lambda c: "The sum is 7." if "Carry" in c else "1. Add the apples."
    )
    assert len(seen) == 2
    assert f"{QUESTION}\n\nPlan only.<|assistant|><think>\n" in seen[0]
    assert seen[1].index("Plan only.") < seen[1].index("1. Add the apples.")
    assert seen[1].endswith("<|user|>Carry it out.<|assistant|><think>\n")
    assert result.details["plan"] == "1. Add the apples."
    asked = [len(llm.tokenizer.encode(context, add_special_tokens=False)) for context in seen]
    assert (result.usage.prompt_tokens, result.usage.appended_tokens) == tuple(asked)
    assert result.answer == "7"


def test_self_critique_ends_once_nothing_is_found(llm: LLM) -> None:
    strategy = SelfCritique(3, criticise="Check it.", improve="Improve it.")

    def say(context: str) -> str:
        if context.rstrip().endswith("Check it.<|assistant|><think>"):
            return "No mistakes." if "It is 7" in context else "The sum is wrong."
        return "It is 7." if "Improve it." in context else "It is 8."

    result, seen = run(llm, strategy, say)
    assert [c.answer for c in result.candidates] == ["8", "7"]
    assert result.details["critiques"] == ["The sum is wrong.", "No mistakes."]
    assert result.answer == "7"
    assert len(seen) == 4
    endless, seen = run(llm, SelfCritique(2), lambda context: "8, but I am not sure.")
    assert len(endless.candidates) == 3
    assert len(seen) == 5


def test_a_debate_reads_the_others_and_ends_in_agreement(llm: LLM) -> None:
    first = iter(["I say 5.", "I say 7.", "I say 7, too."])

    def say(context: str) -> str:
        return next(first) if "Others" not in context else "Agreed: 7."

    before = llm.counters()
    result, seen = run(llm, Debate(3, 2), say)
    after = llm.counters()
    assert result.details["rounds"] == [["5", "7", "7"], ["7", "7", "7"]]
    assert (result.answer, result.confidence) == ("7", 1.0)
    assert len(seen) == 6  # no second round of reading
    owns = set()
    for context in seen[3:]:
        said, others = context.split("Others have answered")
        [own] = [f"I say {o}." for o in ("5", "7", "7, too") if f"I say {o}." in said]
        owns.add(own)
        assert f":\n{own}" not in others
        assert others.count("I say") == 2
    assert len(owns) == 3
    # The question was computed once, for the three first answers and for all that follow.
    size = llm.engine.block_pool.block_size
    common = len(llm.tokenizer.encode(seen[0], add_special_tokens=False)) // size * size
    assert common >= size
    later = sum(len(llm.tokenizer.encode(c, add_special_tokens=False)) for c in seen[3:])
    prefilled = after["prefill_tokens"] - before["prefill_tokens"]
    question = len(llm.tokenizer.encode(seen[0], add_special_tokens=False))
    assert prefilled <= question + later - 3 * (common - size) + 3
    assert after["cached_tokens"] - before["cached_tokens"] >= 3 * (common - size)


def test_a_debate_without_agreement_is_voted_on(llm: LLM) -> None:
    numbers = iter("123" * 3)
    result, seen = run(llm, Debate(3, 2), lambda context: f"It is {next(numbers)}.")
    assert len(seen) == 9
    assert len(result.details["rounds"]) == 3
    assert result.confidence == pytest.approx(1 / 3)
    budget = Budget(total_tokens=60)
    cut, _ = run(llm, Debate(3, 2), lambda context: "It is 4.", budget=budget)
    assert cut.usage.generated_tokens <= 60


def _step(title: str, content: str, action: str) -> str:
    return json.dumps({"title": title, "content": content, "next_action": action})


def test_json_steps_go_on_until_the_model_wants_to_answer(llm: LLM) -> None:
    script = {
        0: _step("Read", "3 and 4 are given.", "continue"),
        1: "this is no JSON",
        2: _step("Add", "3 + 4 = 7", "final_answer"),
        3: "She has 7 apples.",
    }
    calls = iter(range(9))
    result, seen = run(llm, JsonSteps(is_constrained=False), lambda context: script[next(calls)])
    assert len(seen) == 4
    assert seen[1] == seen[2]  # asked again for a valid step
    assert result.content == "She has 7 apples."
    assert result.reasoning == "Read\n3 and 4 are given.\n\nAdd\n3 + 4 = 7"
    assert [step["title"] for step in result.details["steps"]] == ["Read", "Add"]
    # The transcript reads back: what the model said is in the conversation as it was said.
    said = [part.split("<|eos|>")[0] for part in seen[3].split("<|assistant|>")[1:-1]]
    assert [parse_step(text) for text in said] == result.details["steps"]
    assert seen[3].endswith("without JSON.<|assistant|><think>\n")
    assert [node.parent for node in result.nodes] == [-1, 0, 1]
    assert result.usage.generated_tokens == result.candidate.num_tokens


def test_json_steps_have_limits(llm: LLM) -> None:
    endless = JsonSteps(max_steps=3, is_constrained=False, instruction="", go_on="+", finish="End.")
    result, seen = run(
        llm, endless, lambda c: "7" if "End." in c else _step("More", "and more", "continue")
    )
    assert len(seen) == 4
    assert seen[-1].count("End.") == 1
    assert len(result.details["steps"]) == 3
    assert result.answer == "7"
    stubborn = replace(endless, tries=2)
    result, seen = run(llm, stubborn, lambda c: "7" if "End." in c else "no")
    assert len(seen) == 3
    assert result.details["steps"] == []
    assert result.answer == "7"


def test_a_grammar_keeps_json_steps_in_form_whatever_the_model(llm: LLM) -> None:
    """The tiny reasoner knows no JSON at all; steps end where its strings do, or are cut off."""
    strategy = JsonSteps(max_steps=2, max_tokens=120, answer_tokens=30, tries=2, instruction="")
    params = SamplingParams(temperature=1.0)
    result = solve(llm, PROMPT, strategy, params=params, answers=NumberAnswers(), seed=1)
    for step in result.details["steps"]:
        assert parse_step(json.dumps(step)) == step
    assert result.usage.generated_tokens <= 4 * 120 + 30
    assert llm.engine.scheduler.held == []


def test_the_grammar_agrees_with_what_steps_look_like(llm: LLM) -> None:
    steps = [_step("Read", "3 and 4", "continue"), _step("Add", "it is 7", "final_answer")]
    calls = iter([*steps, "Seven: 7."])
    strategy = JsonSteps(instruction="", go_on="+", finish="End.")
    result, seen = run(llm, strategy, lambda context: next(calls))
    assert result.details["steps"] == [json.loads(step) for step in steps]
    assert (result.answer, len(seen)) == ("7", 3)


def test_steps_are_read_strictly() -> None:
    good = _step("a", "b", "continue")
    assert parse_step(f"Here it is: {good} ") == {
        "title": "a",
        "content": "b",
        "next_action": "continue",
    }
    for bad in (
        "",
        "{}",
        "[1]",
        good[:-2],
        _step("", "b", "continue"),
        _step("a", "b", "stop"),
        '{"title": 1, "content": "b", "next_action": "continue"}',
        "[" * 100_000,
    ):
        assert parse_step(bad) is None


def test_retrieval_finds_the_template_that_fits() -> None:
    library = Library.load()
    assert len(library.templates) >= 20
    assert len({template.name for template in library.templates}) == len(library.templates)
    for query, name in (
        ("What is the remainder of 7 to the power 100 divided by 13?", "Calculate with remainders"),
        ("A train leaves at a speed of 60 km/h; when do they meet?", "Speed, time and distance"),
        ("Two pipes fill a tank together. How many hours?", "Rates of work"),
        ("probability of at least one six in four rolls", "Count the complement"),
        ("Start with 17, add 25, then multiply by 3.", "Chain of operations"),
        ("the price is increased by 10 percent, then a discount", "Percent and ratio step by step"),
        ("minimum of the quadratic, find the vertex", "Complete the square"),
        ("two simultaneous linear equations", "Eliminate in a linear system"),
        (
            "sum and product of the roots of a polynomial",
            "Relations between roots and coefficients",
        ),
        ("prove by contradiction that it is irrational", "Assume the opposite"),
    ):
        assert library.find(query)[0][0].name == name, query
    # Every template is found by its own description.
    for template in library.templates:
        assert library.find(f"{template.name} {template.when}")[0][0] is template


def test_bm25_by_hand() -> None:
    library = Library(
        (
            Template("cats", "x", (), "", ("",)),
            Template("cat dog", "x", ("dog",), "", ("",)),
        )
    )
    # "dog" is in one of two, twice; lengths 2 and 4, mean 3: idf ln(1 + 1.5/1.5) = ln 2
    [(best, score), (_, other)] = library.find("dogs", 2)
    assert best.name == "cat dog"
    assert score == pytest.approx(0.6931472 * 2 * 2.5 / (2 + 1.5 * (0.25 + 0.75 * 4 / 3)))
    assert other == 0.0
    assert library.find("nothing", 2)[0][1] == 0.0


def test_templates_plan_retrieve_work_and_review(llm: LLM) -> None:
    strategy = Templates(
        plan="PLAN {problem}",
        work="WORK {template} STEP {step}",
        review="REVIEW {found} REST {rest}",
        answer="ANSWER {problem} {found}",
    )
    verdicts = iter(["NEXT", "CHANGE: count the complement", "DONE"])

    def say(context: str) -> str:
        if "PLAN" in context:
            return "My plan:\n1. Add the numbers\n2. Draw a figure\n3) Look at remainders\n4. Rest"
        if "WORK" in context:
            return "done: " + context.split("STEP ")[1].split("<|")[0]
        return next(verdicts) if "REVIEW" in context else "She has 7."

    result, seen = run(llm, strategy, say)
    assert result.details["plan"] == [
        "Add the numbers",
        "Draw a figure",
        "Look at remainders",
        "Rest",
    ]
    worked = [context.split("STEP ")[1].split("<|")[0] for context in seen if "STEP" in context]
    assert worked == ["Add the numbers", "Draw a figure", "count the complement"]
    assert result.details["templates"][2] == "Count the complement"
    assert "Count the complement (Counting" in seen[5]
    assert "1. Add the numbers: done: Add the numbers" in seen[-1]
    assert (result.answer, len(seen)) == ("7", 8)
    assert len(result.nodes) == 4
    few, _ = run(
        llm,
        replace(strategy, iterations=1),
        lambda c: say(c) if "PLAN" in c or "WORK" in c else "NEXT 7",
    )
    assert len(few.details["templates"]) == 1


def test_a_library_of_ones_own(tmp_path) -> None:
    file = tmp_path / "own.json"
    entry = {"name": "n", "section": "s", "tags": ["t"], "when": "w", "steps": ["a", "b"]}
    file.write_text(json.dumps([entry]))
    [template] = Library.load(file).templates
    assert template.text == "n (s)\nFits when: w\n1. a\n2. b"
    for text in ("[{}]", "nothing", '{"a": 1}', "[]"):
        file.write_text(text)
        with pytest.raises(ValueError, match=r"own.json|templates is empty"):
            Library.load(file)


def test_token_ids_alone_cannot_be_asked_about(llm: LLM) -> None:
    with pytest.raises(ValueError, match="give messages or a text"):
        solve(llm, [1, 2, 3], PlanAndSolve(), answers=NumberAnswers())
    with pytest.raises(ValueError, match="k=1"):
        Debate(1)
    with pytest.raises(ValueError, match="rounds=0"):
        SelfCritique(0)
    with pytest.raises(ValueError, match="tries=0"):
        JsonSteps(tries=0)
