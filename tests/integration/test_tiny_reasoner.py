"""The embedded reasoner: the same tokens as transformers, right most of the time, and able to look again."""

import pytest
import torch

from moejet import LLM, SamplingParams
from moejet.resolve import resolve_model
from moejet.testing import arithmetic

GREEDY = SamplingParams(temperature=0.0, max_tokens=400)
PROBLEMS = arithmetic.held_out_problems(40, seed=7)


def _ask(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _num_right(texts: list[str]) -> int:
    answers = [problem.answer for problem, _ in PROBLEMS]
    return sum(arithmetic.extract_answer(t) == a for t, a in zip(texts, answers, strict=True))


@pytest.fixture(scope="module")
def llm():
    with LLM() as llm:
        yield llm


def test_greedy_tokens_equal_transformers(usable_isa):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = resolve_model("tiny-reasoner")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(path)
    conversation = _ask("Start with 17, add 25, then multiply by 3.")
    prompt = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.inference_mode():
        out = model.generate(ids, max_new_tokens=100, do_sample=False)
    expected = out[0, ids.shape[1] :].tolist()
    exact = {"expert_format": "bf16", "dense_format": "fp32", "cache_dtype": "fp32"}
    with LLM(isa=usable_isa("avx2"), **exact) as llm:
        result = llm.chat(conversation, SamplingParams(temperature=0.0, max_tokens=100))[0]
    assert result.prompt == prompt
    assert list(result.prompt_token_ids) == ids[0].tolist()
    assert list(result.outputs[0].token_ids) == expected


def test_answers_most_held_out_problems(llm):
    """Greedy, in the default formats. Its card says how well; far below that, something is broken."""
    outputs = [r.outputs[0] for r in llm.chat([_ask(q) for _, q in PROBLEMS], GREEDY)]
    assert _num_right([o.text for o in outputs]) >= 0.75 * len(PROBLEMS)
    assert all(o.finish_reason == "stop" for o in outputs)
    assert all(o.reasoning and o.content for o in outputs)


def test_fp8_cache_answers_as_well():
    with LLM(cache_dtype="fp8") as llm:
        outputs = [r.outputs[0] for r in llm.chat([_ask(q) for _, q in PROBLEMS], GREEDY)]
    assert _num_right([o.text for o in outputs]) >= 0.75 * len(PROBLEMS)


def test_forced_check_keeps_right_answers(llm):
    """Right working, then "Wait": it goes through its steps by the inverse operation and stays with the answer."""
    prompts = []
    for problem, question in PROBLEMS:
        rendered = llm.tokenizer.apply_chat_template(_ask(question), add_generation_prompt=True)
        text = rendered + arithmetic.reference_thinking(problem) + "Wait"
        prompts.append(llm.tokenizer.encode(text, add_special_tokens=False))
    texts = [r.text for r in llm.generate(prompts, GREEDY)]
    assert all(t.startswith(", let me check.\nA? ") for t in texts)
    assert _num_right(texts) >= 0.85 * len(PROBLEMS)


def test_a_second_turn_and_an_off_topic_question(llm):
    first = llm.chat(_ask("Start with 5, add 9."), GREEDY)[0].outputs[0]
    assert arithmetic.extract_answer(first.text) == 14
    history = [
        *_ask("Start with 5, add 9."),
        {"role": "assistant", "content": first.content},
        *_ask("Take 80 and subtract 23."),
    ]
    second = llm.chat(history, GREEDY)[0].outputs[0]
    assert arithmetic.extract_answer(second.text) == 57
    hello = llm.chat(_ask("hello"), GREEDY)[0].outputs[0]
    assert hello.finish_reason == "stop"
    assert arithmetic.extract_answer(hello.text) is None
