"""The public API as its users call it: results, streams, seeds, stops, and one-line errors for bad input."""

import gc
import json
import weakref
from dataclasses import replace

import pytest
import torch

from moejet import LLM, SamplingParams
from moejet.presets import PRESETS
from moejet.testing.checkpoints import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {
    "expert_format": "bf16",
    "dense_format": "fp32",
    "cache_dtype": "fp32",
    "max_context": 128,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), "deepseek_v3", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def llm(path):
    with LLM(path, **OPTIONS) as llm:
        yield llm


def _ids(output) -> list[int]:
    return list(output.outputs[0].token_ids)


def test_text_and_token_prompts_agree(llm):
    params = SamplingParams(temperature=0.0, max_tokens=8)
    text = llm.generate("hello world", params)[0]
    ids = llm.generate(llm.tokenizer.encode("hello world"), params)[0]
    assert _ids(text) == _ids(ids)
    assert text.prompt == "hello world"
    assert ids.prompt is None
    assert text.outputs[0].finish_reason in ("stop", "length")
    assert text.timings.prompt_tokens == len(text.prompt_token_ids)
    assert text.timings.completion_tokens == len(_ids(text))
    assert text.timings.prefill_s > 0


def test_stream_adds_up_to_generate(llm):
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=40, ignore_eos=True)
    expected = llm.generate("abc", params)[0].outputs[0]
    deltas = list(llm.stream("abc", params))
    assert "".join(d.text for d in deltas) == expected.text
    assert "".join(d.content for d in deltas) == expected.content
    assert tuple(t for d in deltas for t in d.token_ids) == expected.token_ids
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].output.outputs[0].token_ids == expected.token_ids


def test_closing_a_stream_aborts_its_request(llm):
    stream = llm.stream("abc", SamplingParams(max_tokens=100, ignore_eos=True))
    next(stream)
    stream.close()
    assert not llm.engine.has_work
    assert llm.engine.block_pool.num_free == llm.engine.block_pool.num_blocks
    llm.engine.scheduler.check_integrity()


def test_generate_while_a_stream_is_open(llm):
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
    expected = list(llm.generate("abc", params)[0].outputs[0].token_ids)
    stream = llm.stream("abc", params)
    got = list(next(stream).token_ids)
    assert _ids(llm.generate("abc", params)[0]) == expected
    got += [t for d in stream for t in d.token_ids]
    assert got == expected


def test_seeded_samples_do_not_depend_on_the_batch(llm):
    params = SamplingParams(temperature=1.0, seed=11, max_tokens=20, ignore_eos=True)
    alone = _ids(llm.generate("abc", params)[0])
    others = SamplingParams(temperature=1.0, seed=12, max_tokens=33, ignore_eos=True)
    batch = llm.generate(["xyz and more", "abc", "q"], [others, params, others])
    assert _ids(batch[1]) == alone
    assert _ids(batch[0]) != alone


def test_twenty_seeded_requests_equal_each_alone(path):
    """More rows than the micro-kernels take at once, so every width of them is used."""
    formats = {"expert_format": "int4_g32", "dense_format": "int8", "isa": "avx2"}
    options = {**OPTIONS, **formats, "deterministic": True}
    with LLM(path, **options) as llm:
        prompts = [f"prompt number {i}" * (1 + i % 3) for i in range(20)]
        params = [
            SamplingParams(temperature=1.0, seed=i, max_tokens=10, ignore_eos=True)
            for i in range(20)
        ]
        together = [_ids(r) for r in llm.generate(prompts, params)]
        alone = [_ids(llm.generate(p, q)[0]) for p, q in zip(prompts, params, strict=True)]
    assert together == alone


def test_n_samples_differ_and_keep_their_order(llm):
    params = SamplingParams(temperature=1.0, seed=5, max_tokens=12, n=4, ignore_eos=True)
    result = llm.generate("abc", params)[0]
    assert [o.index for o in result.outputs] == [0, 1, 2, 3]
    assert len({o.token_ids for o in result.outputs}) == 4
    single = SamplingParams(temperature=1.0, seed=5, max_tokens=12, ignore_eos=True)
    assert llm.generate("abc", single)[0].outputs[0].token_ids == result.outputs[0].token_ids


def test_stop_token_and_max_tokens(llm):
    free = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    tokens = _ids(llm.generate("abc", free)[0])
    first = tokens.index(tokens[3])
    params = SamplingParams(
        temperature=0.0, max_tokens=10, stop_token_ids=(tokens[3],), ignore_eos=True
    )
    stopped = llm.generate("abc", params)[0].outputs[0]
    assert list(stopped.token_ids) == tokens[: first + 1]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", tokens[3])
    one = SamplingParams(temperature=0.0, max_tokens=1)
    assert llm.generate("abc", one)[0].outputs[0].finish_reason in ("length", "stop")


def test_every_sample_of_a_stream_tells_why_it_ended(llm):
    free = SamplingParams(temperature=1.0, seed=3, max_tokens=12, n=4, ignore_eos=True)
    tokens = [o.token_ids for o in llm.generate("abc", free)[0].outputs]
    params = replace(free, stop_token_ids=(tokens[0][3], tokens[1][5]))
    deltas = list(llm.stream("abc", params))
    ends = {d.index: (d.finish_reason, d.stop_reason) for d in deltas if d.finish_reason}
    outputs = deltas[-1].output.outputs
    assert ends == {o.index: (o.finish_reason, o.stop_reason) for o in outputs}
    assert ends[0][0] == ends[1][0] == "stop"
    assert {ends[0][1], ends[1][1]} <= set(params.stop_token_ids)


def test_logprobs_agree_with_score(llm):
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=10, logprobs=3, ignore_eos=True)
    result = llm.generate("some words", params)[0]
    output = result.outputs[0]
    scores = llm.score([*result.prompt_token_ids, *output.token_ids])
    tail = scores[-len(output.token_ids) :]
    # Many tokens at once may be computed in bf16, single ones in fp32.
    assert [e.logprob for e in output.logprobs] == pytest.approx(tail, abs=5e-2)
    assert output.cumulative_logprob == pytest.approx(sum(tail), abs=0.2)
    assert all(len(e.top) == 3 for e in output.logprobs)


def test_chat_uses_the_template(llm):
    messages = [{"role": "user", "content": "hi"}]
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    one = llm.chat(messages, params)[0]
    rendered = llm.tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    assert one.prompt == rendered
    several = llm.chat([messages, messages], params)
    assert [_ids(r) for r in several] == [_ids(one)] * 2
    streamed = [t for d in llm.stream_chat(messages, params) for t in d.token_ids]
    assert streamed == _ids(one)


def test_context_ends_the_answer(llm):
    prompt = [5] * 120
    output = llm.generate(prompt, SamplingParams(temperature=0.0, ignore_eos=True))[0].outputs[0]
    assert output.finish_reason == "length"
    assert len(output.token_ids) == 8


@pytest.mark.parametrize(
    ("prompt", "params", "words"),
    [
        ("", {}, "empty"),
        ([], {}, "no prompts|empty"),
        ([[]], {}, "empty"),
        ([[1, "a"]], {}, "'a'"),
        ([99999], {}, "99999"),
        ([[5] * 500], {}, "max_context=128"),
        ("a", {"logit_bias": {100000: 1.0}}, "100000"),
        ("a", {"stop_token_ids": (100000,)}, "100000"),
    ],
)
def test_bad_prompts(llm, prompt, params, words):
    with pytest.raises(ValueError, match=words) as error:
        llm.generate(prompt, SamplingParams(**params))
    assert "\n" not in str(error.value)
    assert not llm.engine.has_work


def test_one_bad_prompt_leaves_nothing_behind(llm):
    with pytest.raises(ValueError, match="empty"):
        llm.generate(["fine", ""], SamplingParams(max_tokens=3))
    assert not llm.engine.has_work
    with pytest.raises(ValueError, match="2 entries for 1 prompts"):
        llm.generate("a", [SamplingParams(), SamplingParams()])
    with pytest.raises(ValueError, match="at least 2 tokens"):
        llm.score([1])


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda m: m.generate(5), "prompts must be text"),
        (lambda m: m.generate([None]), "a prompt must be text"),
        (lambda m: m.generate("ab", {"temperature": 0}), "sampling_params must be SamplingParams"),
        (lambda m: m.generate("ab", 5), "sampling_params must be SamplingParams"),
        (lambda m: m.chat("hi"), "messages must be a list"),
        (lambda m: m.chat([1]), r"messages\[0\] must be a dict"),
        (
            lambda m: m.chat([{"role": "user", "content": "a"}], add_generation_prompt=False),
            "reply",
        ),
    ],
)
def test_wrong_types_are_named(llm, call, words):
    with pytest.raises(ValueError, match=words):
        call(llm)


def test_broken_logits_end_their_request_only(llm, monkeypatch):
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    expected = _ids(llm.generate("abc", params)[0])
    execute = llm.engine.runner.execute

    def spoil(batch):
        logits = execute(batch).clone()
        for row, request in zip(logits, batch.sampled, strict=True):
            if len(request.token_ids) > 10:
                row[0] = float("nan")
        return logits

    good = llm.stream("abc", params)
    got = list(next(good).token_ids)
    bad = llm.stream("a much longer prompt than the other one", params)
    monkeypatch.setattr(llm.engine.runner, "execute", spoil)
    with pytest.raises(FloatingPointError, match="NaN or infinite logits"):
        list(bad)
    monkeypatch.undo()
    got += [t for d in good for t in d.token_ids]
    assert got == expected
    assert not llm.engine.has_work
    llm.engine.scheduler.check_integrity()


def test_closing_one_stream_inside_a_step_spares_the_others(llm, monkeypatch):
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    expected = _ids(llm.generate("abc", params)[0])
    victim = llm.stream("xyz", params)
    next(victim)
    execute = llm.engine.runner.execute

    def close_inside(batch):
        victim.close()
        return execute(batch)

    monkeypatch.setattr(llm.engine.runner, "execute", close_inside)
    assert _ids(llm.generate("abc", params)[0]) == expected
    llm.engine.scheduler.check_integrity()


def test_bad_options_and_closed_engine(path):
    with pytest.raises(ValueError, match="did you mean 'max_context'"):
        LLM(path, max_contxt=5)
    with pytest.raises(ValueError, match="max_position_embeddings"):
        LLM(path, max_context=10**7)
    with pytest.raises(ValueError, match="cache_tokens=64"):
        LLM(path, max_context=128, cache_tokens=64)
    with pytest.raises(ValueError, match="isa='sse'"):
        LLM(path, isa="sse")
    llm = LLM(path, **OPTIONS)
    llm.close()
    llm.close()
    with pytest.raises(ValueError, match="closed"):
        llm.generate("a")


def test_threads_end_even_if_something_else_cannot_be_closed(path):
    llm = LLM(path, **OPTIONS)

    def fail():
        raise OSError("the disk is gone")

    llm.engine.at_close.callback(fail)
    with pytest.raises(OSError, match="the disk is gone"):
        llm.close()
    with pytest.raises(RuntimeError, match="closed"):
        llm.engine.probe()


def test_two_models_at_once(path, llm):
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    with LLM(path, **OPTIONS) as second:
        assert _ids(second.generate("abc", params)[0]) == _ids(llm.generate("abc", params)[0])


def test_default_sampling_comes_from_the_checkpoint(tmp_path):
    path = tiny_checkpoint(tmp_path, "moonlight")
    file = path / "generation_config.json"
    file.write_text(json.dumps({"temperature": 0.25, "top_p": 0.5, "max_length": 9}))
    with LLM(path, max_context=64) as llm:
        assert llm.default_sampling() == SamplingParams(temperature=0.25, top_p=0.5)
    file.write_text(json.dumps({"temperature": -1.0}))
    with pytest.raises(ValueError, match=r"temperature=-1\.0"):
        LLM(path, max_context=64)


def test_synthetic_model_measures_without_a_tokenizer():
    shape = replace(
        PRESETS["deepseek-v2-lite"], num_hidden_layers=2, vocab_size=500, hidden_size=256
    )
    with LLM.synthetic(shape, max_context=64, max_batch_tokens=16) as llm:
        assert llm.bench_prefill(20, depth=5) > 0
        assert llm.bench_decode(3, depth=0) > 0
        assert llm.bench_decode(2, depth=40, batch=3) > 0
        assert 0 < llm.bench_overhead(batch=2) < 10
        assert llm.engine.block_pool.num_free == llm.engine.block_pool.num_blocks
        sizes = llm.weight_bytes()
        assert 0 < sizes["active_per_token"] < sizes["total"]
        assert sizes["latent_per_token"] == 2 * 576 * 2
        result = llm.generate([[1, 2, 3]], SamplingParams(max_tokens=3, ignore_eos=True))
        assert len(result[0].outputs[0].token_ids) == 3
        with pytest.raises(ValueError, match="no tokenizer"):
            llm.generate("text")
    with pytest.raises(ValueError, match="deepseek-v9"):
        LLM.synthetic("deepseek-v9")
    with pytest.raises(ValueError, match="layers=N"):
        LLM.synthetic("deepseek-v3:layers=0")


def test_a_model_that_cannot_fit_is_refused_before_loading():
    with pytest.raises(ValueError, match="GiB are available"):
        LLM.synthetic("kimi-k2", expert_format="bf16")


def test_a_closed_model_takes_its_memory_with_it():
    """Not only when garbage is collected, which knows nothing of what weights weigh."""
    gc.collect()
    gc.disable()
    try:
        with LLM(num_threads=1, max_context=64) as llm:
            llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2))
            left = weakref.ref(llm.engine.runner)
        del llm
        assert left() is None
    finally:
        gc.enable()
