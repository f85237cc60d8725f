"""The arithmetic task, and the tokenizer and chat template of the embedded tiny reasoner."""

import json
import random
from pathlib import Path

import pytest
from tokenizers import Tokenizer

import moejet.testing.arithmetic as ar

ASSETS = Path(ar.__file__).parents[1] / "assets" / "tiny_reasoner"
EXAMPLE = ar.Problem(17, (ar.Step("+", 25), ar.Step("*", 3)))


@pytest.mark.parametrize("steps", [1, 2, 5, 8, 10])
def test_generated_problems_stay_exact_and_in_range(steps: int) -> None:
    rng = random.Random(steps)
    for _ in range(200):
        problem = ar.generate_problem(rng, steps)
        assert len(problem.values) == len(problem.steps) == steps
        numbers = (problem.start, *problem.values, *(s.operand for s in problem.steps))
        assert all(ar.MIN_VALUE <= n <= ar.MAX_VALUE for n in numbers)


def test_bad_step_count_is_refused() -> None:
    with pytest.raises(ValueError, match="steps must be 1"):
        ar.generate_problem(random.Random(0), 11)


@pytest.mark.parametrize(
    ("op", "a", "b", "result"),
    [
        ("+", 17, 25, 42),
        ("+", 999, 1, None),
        ("-", 5, 6, None),
        ("*", 40, 25, None),
        ("*", 37, 27, 999),
        ("/", 126, 3, 42),
        ("/", 127, 3, None),
        ("/", 5, 0, None),
    ],
)
def test_apply(op: ar.Op, a: int, b: int, result: int | None) -> None:
    assert ar.apply(op, a, b) == result


def test_plain_wording() -> None:
    assert ar.word_problem(EXAMPLE) == "Start with 17, add 25, then multiply by 3."
    assert EXAMPLE.canonical == "017 + 025 * 003"
    assert EXAMPLE.answer == 126


def test_every_wording_names_the_numbers_in_order() -> None:
    rng = random.Random(0)
    for _ in range(300):
        problem = ar.generate_problem(rng, rng.randint(1, 8))
        numbers = [str(problem.start), *(str(s.operand) for s in problem.steps)]
        words = "".join(c if c.isdigit() else " " for c in ar.word_problem(problem, rng)).split()
        assert words == numbers
        words = "".join(c if c.isdigit() else " " for c in ar.follow_up(problem, rng)).split()
        assert words == numbers[1:]


def test_held_out_share_and_stability() -> None:
    rng = random.Random(0)
    held_out = [ar.is_held_out(ar.generate_problem(rng, 4)) for _ in range(4000)]
    assert 0.08 < sum(held_out) / len(held_out) < 0.12
    assert not ar.is_held_out(EXAMPLE)  # the split never moves


def test_held_out_problems() -> None:
    posed = ar.held_out_problems(50, seed=3)
    assert posed == ar.held_out_problems(50, seed=3)
    assert posed != ar.held_out_problems(50, seed=4)
    assert all(ar.is_held_out(p) for p, _ in posed)
    assert {len(p.steps) for p, _ in posed} == set(range(2, 9))


def test_reference_thinking() -> None:
    assert ar.reference_thinking(EXAMPLE, checks=1).split("\n") == [
        "Plan: 017, A + 025, B * 003",
        "A: 017 + 025 = 042",
        "B: 042 * 003 = 126",
        "Wait, let me check.",
        "A? 042 - 025 = 017, 017 ok",
        "B? 126 / 003 = 042, 042 ok",
        "",
    ]


@pytest.mark.parametrize("checks", [0, 1, 3])
def test_reference_thinking_is_right(checks: int) -> None:
    rng = random.Random(checks)
    for steps in range(1, 11):
        problem = ar.generate_problem(rng, steps)
        thinking = ar.reference_thinking(problem, checks=checks)
        labels = ar.check_steps(thinking, problem)
        assert len(labels) == steps * (1 + checks)
        assert all(label.correct for label in labels)
        assert ar.check_steps(thinking) == labels
        assert ar.parse_plan(thinking.split("\n")[0]) == problem


def test_check_steps_finds_slips_and_repairs() -> None:
    reasoning = "\n".join(
        [
            "Plan: 017, A + 025, B * 003",
            "A: 017 + 025 = 043",  # wrong result
            "B: 043 * 003 = 129",  # right for what came before
            "Wait, let me check.",
            "A? 043 - 025 = 018, 017 no",
            "A: 017 + 025 = 042",
            "B: 024 * 003 = 072",  # miscopied value
            "Wait, let me check.",
            "A? 042 - 025 = 017, 017 ok",
            "B? 072 / 003 = 024, 042 ok",  # 024 is not 042
            "C: 072 + 001 = 073",  # no such step
            "B: 042 *",  # cut off
        ]
    )
    labels = ar.check_steps(reasoning, EXAMPLE)
    assert [label.line for label in labels] == [1, 2, 4, 5, 6, 8, 9, 10, 11]
    right = [True, True, True, True, False, True, False, False, False]
    assert [label.correct for label in labels] == [False, *right[1:]]
    assert [label.kind for label in labels][:4] == ["step", "step", "check", "step"]


def test_check_steps_sees_operands_of_the_problem() -> None:
    misread = ar.reference_thinking(ar.Problem(17, (ar.Step("+", 52), ar.Step("*", 3))))
    assert [label.correct for label in ar.check_steps(misread, EXAMPLE)] == [False, True]
    assert all(label.correct for label in ar.check_steps(misread))


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<think>\nB: 042 * 003 = 126\n</think>\n\nThe answer is 126.", 126),
        ("The answer is 7.", 7),
        ("<think>\nThe answer is 3", 3),
        ("<think>\nThe answer is 3.\n</think>\n\nI do not know.", None),
        ("", None),
    ],
)
def test_extract_answer(text: str, answer: int | None) -> None:
    assert ar.extract_answer(text) == answer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(ASSETS / "tokenizer.json"))


@pytest.mark.parametrize(
    "text",
    [
        "Start with 17, add 25, then multiply by 3. What do you get?",
        "héllo  wörld\t中文 🦆 \x00 €\r\n\n  12.5%",
        "PLAN: A? B: C",
        " ",
        "",
        "<think>\n</think>",
    ],
)
def test_tokenizer_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_round_trip_of_anything(tokenizer: Tokenizer) -> None:
    rng = random.Random(0)
    for _ in range(200):
        text = "".join(
            chr(rng.choice((rng.randint(0, 127), rng.randint(0, 0xD7FF)))) for _ in range(20)
        )
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokens_of_the_task(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("A: 017 + 025 = 042\n").ids) == 13
    assert len(tokenizer.encode("Start with 17").ids) == 5
    assert tokenizer.encode("Wait").tokens == ["Wait"]
    tags = tokenizer.encode("<think>\n</think>").ids
    assert len(tags) == 3
    assert tokenizer.decode(tags, skip_special_tokens=True) == "<think>\n</think>"
    assert (
        tokenizer.decode(tokenizer.encode("<|bos|>hi<|eos|>").ids, skip_special_tokens=True) == "hi"
    )


def test_chat_template() -> None:
    sandbox = pytest.importorskip("jinja2.sandbox")
    config = json.loads((ASSETS / "tokenizer_config.json").read_text())
    template = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    compiled = template.from_string(config["chat_template"])

    def render(*turns: tuple[str, str], **options: bool) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        tags = {"bos_token": config["bos_token"], "eos_token": config["eos_token"]}
        text: str = compiled.render(messages=messages, **tags, **options)
        return text

    question = ("user", "Start with 2, add 3.")
    assert render(question, add_generation_prompt=True) == (
        "<|bos|><|user|>Start with 2, add 3.<|assistant|><think>\n"
    )
    assert render(question, add_generation_prompt=True, enable_thinking=False) == (
        "<|bos|><|user|>Start with 2, add 3.<|assistant|><think>\n</think>\n\n"
    )
    earlier = ("assistant", "<think>\nPlan: 002\n</think>\n\nThe answer is 5.")
    assert render(("system", "Be brief."), question, earlier, ("user", "Now add 4.")) == (
        "<|bos|>Be brief.<|user|>Start with 2, add 3.<|assistant|>The answer is 5.<|eos|>"
        "<|user|>Now add 4."
    )


def test_shipped_files() -> None:
    config = json.loads((ASSETS / "config.json").read_text())
    assert config["architectures"] == ["DeepseekV3ForCausalLM"]
    tokenizer = Tokenizer.from_file(str(ASSETS / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == config["vocab_size"]
    assert tokenizer.token_to_id("<|bos|>") == config["bos_token_id"]
    assert tokenizer.token_to_id("<|eos|>") == config["eos_token_id"]
    assert sum(f.stat().st_size for f in ASSETS.iterdir()) < 8_000_000
