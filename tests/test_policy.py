"""Policies: what they may change, what stays as it was, and who hears of their mistakes."""

import itertools

import pytest
import torch

from moejet import LLM, SamplingParams
from moejet.output import OutputAssembler
from moejet.policy import (
    EarlyExit,
    ForceContinuation,
    Inject,
    Keep,
    Replace,
    Stop,
    ThinkingBudget,
    TokenPolicy,
)
from moejet.request import Request
from moejet.sample_state import SampleState
from moejet.testing.checkpoints import tiny_checkpoint

OPTIONS = {
    "expert_format": "bf16",
    "dense_format": "fp32",
    "cache_dtype": "fp32",
    "max_context": 128,
}
QUESTION = [{"role": "user", "content": "Start with 17, add 25, then multiply by 3."}]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), "deepseek_v3", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def llm(path):
    with LLM(path, **OPTIONS) as llm:
        yield llm


@pytest.fixture(scope="module")
def reasoner():
    with LLM(num_threads=1) as llm:
        yield llm


class At(TokenPolicy):
    """Does `action` at the output position `at`, once."""

    def __init__(self, at, action):
        self.at, self.action = at, action

    def on_token(self, state, token_id):
        if state.num_output_tokens != self.at:
            return Keep()
        self.at = -1
        return self.action


def _params(policy=None, **options):
    options = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **options}
    return SamplingParams(policy=policy, **options)


def _one(llm, prompt, params):
    return llm.generate(prompt, params)[0].outputs[0]


def test_a_policy_that_keeps_everything_changes_nothing(llm):
    plain = _one(llm, "hello", _params())
    watched = _one(llm, "hello", _params(TokenPolicy))
    assert plain == watched


@pytest.mark.parametrize("action", [Inject([7, 9, 11]), Replace((7, 9, 11)), Inject([5])])
@pytest.mark.parametrize("at", [0, 4])
def test_what_follows_is_what_a_prompt_with_these_tokens_gives(llm, action, at):
    prompt = llm.tokenizer.encode("hello world")
    plain = list(_one(llm, prompt, _params()).token_ids)
    got = list(_one(llm, prompt, _params(lambda: At(at, action))).token_ids)
    forced = plain[:at] + ([plain[at]] if isinstance(action, Inject) else []) + list(action.ids)
    assert got[: len(forced)] == forced
    assert len(got) == 12
    again = _one(llm, prompt + forced, _params(max_tokens=12 - len(forced)))
    assert got[len(forced) :] == list(again.token_ids)
    llm.engine.scheduler.check_integrity()


def test_streams_show_injected_tokens_and_logprobs_mark_them(llm):
    params = _params(lambda: At(3, Inject([7, 9])), logprobs=1)
    deltas = list(llm.stream("abc", params))
    output = deltas[-1].output.outputs[0]
    assert tuple(itertools.chain(*(d.token_ids for d in deltas))) == output.token_ids
    assert "".join(d.text for d in deltas) == output.text
    assert max(len(d.token_ids) for d in deltas) == 3
    marks = [e.is_injected for e in output.logprobs]
    assert [i for i, mark in enumerate(marks) if mark] == [4, 5]
    assert [e.token_id for e in output.logprobs] == list(output.token_ids)
    chosen = sum(e.logprob for e in output.logprobs if not e.is_injected)
    assert output.cumulative_logprob == pytest.approx(chosen)


def test_injected_tokens_obey_the_limits(llm):
    cut = _one(llm, "abc", _params(lambda: At(2, Inject([7] * 50)), max_tokens=6))
    assert (len(cut.token_ids), cut.finish_reason) == (6, "length")
    stop = _one(llm, "abc", _params(lambda: At(2, Inject([7, 8, 9])), stop_token_ids=(8,)))
    assert (stop.token_ids[-2:], stop.finish_reason, stop.stop_reason) == ((7, 8), "stop", 8)
    word = llm.tokenizer.encode("xyzzy", add_special_tokens=False)
    text = _one(llm, "abc", _params(lambda: At(2, Inject([*word, 7])), stop=("xyzzy",)))
    assert (text.finish_reason, text.stop_reason) == ("stop", "xyzzy")
    assert "xyzzy" not in text.text
    eos = next(iter(llm.engine.eos_token_ids))
    ended = _one(llm, "abc", _params(lambda: At(2, Replace([7, eos, 9])), ignore_eos=False))
    assert (ended.token_ids[2:], ended.finish_reason, ended.stop_reason) == ((7, eos), "stop", None)


def test_stop_keeps_the_token(llm):
    plain = _one(llm, "abc", _params())
    stopped = _one(llm, "abc", _params(lambda: At(5, Stop("enough"))))
    assert stopped.token_ids == plain.token_ids[:6]
    assert (stopped.finish_reason, stopped.stop_reason) == ("stop", "enough")


def test_masks_and_edited_rows(llm):
    class OnlyEven(TokenPolicy):
        needs_logits = True

        def on_logits(self, state, row):
            return torch.arange(row.numel()) % 2 == 0

    class Prefer(TokenPolicy):
        needs_logits = True

        def on_logits(self, state, row):
            row[state.num_output_tokens + 40] += 1000.0
            return row

    even = llm.generate("abc", _params(OnlyEven, temperature=1.0, n=4, seed=1, max_tokens=30))[0]
    assert all(t % 2 == 0 for o in even.outputs for t in o.token_ids)
    assert len({o.token_ids for o in even.outputs}) == 4
    preferred = _one(llm, "abc", _params(Prefer, max_tokens=5, logprobs=0))
    assert preferred.token_ids == (40, 41, 42, 43, 44)
    assert preferred.logprobs[0].logprob < -1e-3  # of the raw logits


def test_every_sample_has_its_own_policy_and_sees_its_own_tokens(llm):
    made = []

    class Watch(TokenPolicy):
        def __init__(self):
            made.append(self)
            self.seen, self.tokens = [], []

        def on_token(self, state, token_id):
            assert state.output_token_ids == self.tokens
            self.seen.append(token_id)
            return Inject([9]) if len(self.seen) == 2 + state.index else Keep()

        def on_append(self, state, token_id):
            self.tokens.append(token_id)
            assert state.token_ids[-1] == token_id
            assert state.num_pending == (len(self.seen) == 2 + state.index and token_id != 9)

    params = _params(Watch, n=3, temperature=1.0, seed=3, logit_bias={9: -100.0})
    outputs = llm.generate("abc", params)[0].outputs
    # The token that ends a sample is not announced.
    assert [tuple(w.tokens) for w in made] == [o.token_ids[:-1] for o in outputs]
    assert [o.token_ids.index(9) for o in outputs] == [2, 3, 4]


def test_all_policies_hear_of_injected_tokens_from_on_append(llm):
    class Doubles(TokenPolicy):
        def on_append(self, state, token_id):
            if state.num_output_tokens == 2:
                return Inject([7, 8])
            return Stop("seen") if token_id == 8 else None

    output = _one(llm, "abc", _params(Doubles))
    assert output.token_ids[2:] == (7, 8)
    assert output.stop_reason == "seen"


class Broken(TokenPolicy):
    def __init__(self, where="on_token"):
        self.where = where
        self.needs_logits = where == "on_logits"

    def _fail(self, where, state):
        if where == self.where and state.num_output_tokens >= 3:
            raise RuntimeError(f"mistake in {where}")

    def on_logits(self, state, row):
        self._fail("on_logits", state)

    def on_token(self, state, token_id):
        self._fail("on_token", state)
        return Keep()

    def on_append(self, state, token_id):
        self._fail("on_append", state)


@pytest.mark.parametrize("where", ["on_logits", "on_token", "on_append"])
def test_an_exception_ends_its_request_only(llm, where):
    expected = _one(llm, "abc", _params()).token_ids
    other = llm.stream("abc", _params())
    got = list(next(other).token_ids)
    with pytest.raises(RuntimeError, match=f"mistake in {where}"):
        llm.generate(["xyz", "q"], [_params(), _params(lambda: Broken(where), n=3)])
    stream = llm.stream("xyz", _params(lambda: Broken(where)))
    with pytest.raises(RuntimeError, match=f"mistake in {where}"):
        list(stream)
    got += [t for d in other for t in d.token_ids]
    assert tuple(got) == expected
    assert not llm.engine.has_work
    assert llm.engine.block_pool.num_free == llm.engine.block_pool.num_blocks


def test_the_engine_reports_the_error_with_the_last_delta(llm):
    engine = llm.engine
    engine.add_request([5, 6, 7], _params(Broken), request_id="broken")
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    assert [d.finish_reason for d in deltas] == [None, None, None, "abort"]
    assert str(deltas[-1].error) == "mistake in on_token"
    assert len(deltas[-1].output.outputs[0].token_ids) == 3


class Logits(TokenPolicy):
    needs_logits = True

    def __init__(self, answer):
        self.answer = answer

    def on_logits(self, state, row):
        return self.answer(row)


@pytest.mark.parametrize(
    ("policy", "error", "words"),
    [
        (lambda: At(1, Replace([])), ValueError, "at least 1"),
        (lambda: At(1, Inject([10**6])), ValueError, "1000000"),
        (lambda: At(1, Inject([-1])), ValueError, "-1"),
        (lambda: At(1, Inject(["a"])), ValueError, "'a'"),
        (lambda: At(1, 7), TypeError, "must return Keep"),
        (lambda: At(1, None), TypeError, "must return Keep"),
        (lambda: Logits(lambda row: row[:5]), ValueError, r"\(5,\)"),
        (lambda: Logits(lambda row: [1.0]), ValueError, "list"),
        (lambda: Logits(lambda row: row != row), ValueError, "leaves no token"),
        (lambda: Logits(lambda row: row * torch.nan), ValueError, "NaN"),
    ],
)
def test_impossible_requests_are_named(llm, policy, error, words):
    with pytest.raises(error, match=words):
        llm.generate("abc", _params(policy))
    assert not llm.engine.has_work


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"policy": TokenPolicy()}, "policy=.*must be a function"),
        ({"max_thinking_tokens": -1}, "max_thinking_tokens=-1"),
        ({"max_thinking_tokens": True}, "max_thinking_tokens=True"),
        ({"statistics": 1}, "statistics=1"),
        ({"cache_salt": ""}, "cache_salt=.* must be a text"),
        ({"cache_salt": 5}, "cache_salt=.* must be a text"),
        ({"cache_salt": "x" * 257}, "cache_salt=.* must be a text"),
    ],
)
def test_bad_parameters(params, words):
    with pytest.raises(ValueError, match=words):
        SamplingParams(**params)


def test_bad_policies(llm):
    with pytest.raises(ValueError, match="not a moejet"):
        llm.generate("abc", _params(lambda: 5))
    with pytest.raises(ValueError, match="times=-1"):
        ForceContinuation(-1)
    with pytest.raises(ValueError, match="text=''"):
        ForceContinuation(1, "")
    with pytest.raises(ValueError, match="end='now'"):
        EarlyExit(lambda state: True, end="now")
    with pytest.raises(ValueError, match="condition=5"):
        EarlyExit(5)
    assert not llm.engine.has_work


def test_preempted_requests_keep_injected_tokens(path):
    """A cache too small for all: whoever is computed again finds the injected tokens among its own."""

    class Often(TokenPolicy):
        def on_token(self, state, token_id):
            return Inject([7, 9]) if state.num_output_tokens % 5 == 0 else Keep()

    prompts = [[i + 5] * 20 for i in range(6)]
    params = _params(Often, max_tokens=60)
    with LLM(path, **OPTIONS, cache_tokens=192, block_size=16) as small:
        tight = [r.outputs[0].token_ids for r in small.generate(prompts, params)]
        assert small.engine.counters.preemptions > 0
        small.engine.scheduler.check_integrity()
        alone = [_one(small, p, params).token_ids for p in prompts]
    assert tight == alone


def _answer(reasoner, **options):
    options = {"temperature": 0.0, "max_tokens": 300, **options}
    return reasoner.chat(QUESTION, SamplingParams(**options))[0].outputs[0]


def _thinking_tokens(reasoner, output) -> int:
    return output.token_ids.index(reasoner.tokenizer.token_to_id("</think>"))


def test_thinking_budget(reasoner):
    free = _answer(reasoner)
    natural = _thinking_tokens(reasoner, free)
    assert _answer(reasoner, max_thinking_tokens=natural) == free
    for budget in (0, 1, 10, natural - 1):
        capped = _answer(reasoner, max_thinking_tokens=budget)
        # The closing text is one newline.
        assert _thinking_tokens(reasoner, capped) == budget + 1
        assert capped.token_ids[:budget] == free.token_ids[:budget]
        assert capped.content.startswith("The answer is")
        assert capped.finish_reason == "stop"
    text = "\nTime is up.\n"
    spoken = _answer(reasoner, policy=lambda: ThinkingBudget(10, text))
    assert spoken.reasoning.endswith("Time is up.")


def test_thinking_budget_needs_a_model_that_thinks(llm):
    with LLM.synthetic(llm.model_config, max_context=64) as synthetic:
        with pytest.raises(ValueError, match="max_thinking_tokens=3 needs a model"):
            synthetic.generate([1, 2, 3], SamplingParams(max_thinking_tokens=3))
        output = _one(synthetic, [1, 2, 3], _params(lambda: At(2, Inject([7, 8]))))
        assert output.token_ids[3:5] == (7, 8)


def test_forced_continuation(reasoner):
    free = _answer(reasoner)
    natural = _thinking_tokens(reasoner, free)
    forced = _answer(reasoner, policy=lambda: ForceContinuation(2), logprobs=0)
    wait = tuple(reasoner.tokenizer.encode("Wait", add_special_tokens=False))
    assert forced.token_ids[: natural + len(wait)] == free.token_ids[:natural] + wait
    assert forced.text.count("</think>") == 1
    assert forced.reasoning.count("Wait") >= 2
    assert sum(e.is_injected for e in forced.logprobs) == 2 * len(wait)
    # The same in flight as with a new prompt for every continuation.
    prompt = reasoner.chat(QUESTION, SamplingParams(temperature=0.0, max_tokens=1))[0]
    ids = list(prompt.prompt_token_ids)
    for _ in range(2):
        piece = _one(reasoner, ids, SamplingParams(temperature=0.0, max_tokens=300)).token_ids
        end = piece.index(reasoner.tokenizer.token_to_id("</think>"))
        ids += [*piece[:end], *wait]
    ids += _one(reasoner, ids, SamplingParams(temperature=0.0, max_tokens=300)).token_ids
    assert tuple(ids[len(prompt.prompt_token_ids) :]) == forced.token_ids


def test_a_greedy_check_looks_again_without_chance(reasoner):
    """The first pass is the same as without; what follows is what temperature 0 would write there."""
    hot = {"temperature": 1.0, "seed": 5}
    free = _answer(reasoner, **hot)
    natural = _thinking_tokens(reasoner, free)
    checked = _answer(reasoner, policy=lambda: ForceContinuation(1, greedy=True), **hot)
    wait = tuple(reasoner.tokenizer.encode("Wait", add_special_tokens=False))
    begin = natural + len(wait)
    assert checked.token_ids[:begin] == free.token_ids[:natural] + wait
    ids = list(reasoner.chat(QUESTION, SamplingParams(max_tokens=1))[0].prompt_token_ids)
    rest = _one(
        reasoner,
        [*ids, *checked.token_ids[:begin]],
        SamplingParams(temperature=0.0, max_tokens=300),
    )
    assert checked.token_ids[begin:] == rest.token_ids


def test_budget_wins_over_continuation(reasoner):
    output = _answer(
        reasoner, policy=lambda: ForceContinuation(50), max_thinking_tokens=80, max_tokens=400
    )
    wait = len(reasoner.tokenizer.encode("Wait", add_special_tokens=False))
    assert 80 <= _thinking_tokens(reasoner, output) <= 80 + wait + 1
    assert output.content.startswith("The answer is")


def test_eos_inside_the_thinking_is_continued_too(reasoner):
    eos = next(iter(reasoner.engine.eos_token_ids))

    class Eager(TokenPolicy):
        """Makes the model end inside its thinking."""

        needs_logits = True

        def on_logits(self, state, row):
            if state.num_output_tokens == 5:
                row[eos] += 1000.0
            return row

    class Both(Eager):
        def __init__(self):
            self.inner = ForceContinuation(1)

        def on_token(self, state, token_id):
            return self.inner.on_token(state, token_id)

    assert _answer(reasoner, policy=Eager).token_ids[5:] == (eos,)
    saved = _answer(reasoner, policy=Both)
    assert eos not in saved.token_ids[:-1]
    assert len(saved.token_ids) > 10


def test_early_exit_reads_statistics(reasoner):
    seen = []

    def sure(state):
        seen.append(state.statistics.num_tokens)
        return state.statistics.mean.logprob > -0.5

    free = _answer(reasoner)
    early = _answer(reasoner, policy=lambda: EarlyExit(sure, min_tokens=6, every=3))
    assert seen[0] == 6
    assert early.token_ids[:6] == free.token_ids[:6]
    assert _thinking_tokens(reasoner, early) == 7
    assert early.content.startswith("The answer is")
    ended = _answer(reasoner, policy=lambda: EarlyExit(sure, min_tokens=6, end="sample"))
    assert (len(ended.token_ids), ended.stop_reason) == (7, "early exit")
    never = _answer(reasoner, policy=lambda: EarlyExit(lambda state: False))
    assert never == free


def test_injected_tokens_do_not_count_in_statistics(reasoner):
    output = _answer(reasoner, max_thinking_tokens=10, statistics=True, logprobs=0)
    injected = sum(e.is_injected for e in output.logprobs)
    assert injected > 0
    assert output.statistics.num_tokens == len(output.token_ids) - injected
    assert output.statistics.sum.logprob == pytest.approx(output.cumulative_logprob, abs=1e-4)


def test_state_knows_where_the_answer_begins(reasoner):
    states = []

    class Watch(TokenPolicy):
        def on_append(self, state, token_id):
            states.append((state.is_thinking, state.num_thinking_tokens, state.content_start))

    output = _answer(reasoner, policy=Watch)
    end = _thinking_tokens(reasoner, output)
    assert states[:end] == [(True, i + 1, None) for i in range(end)]
    assert set(states[end:]) == {(False, end, end + 1)}


def test_tags_of_several_tokens(llm):
    class InPieces:
        think_tags = ("<think>", "</think>")

        def token_to_id(self, token):
            return None

        def decode(self, ids, skip_special_tokens):
            return llm.tokenizer.decode(ids, skip_special_tokens)

    pieces = [llm.tokenizer.encode(c, add_special_tokens=False)[0] for c in "a</b</think>"]
    request = Request("r", 0, (5, 6), SamplingParams(), 0, 100, frozenset())
    assembler = OutputAssembler(
        llm.tokenizer, request.params, think_tags=InPieces.think_tags, thinking=True
    )
    state = SampleState(request, assembler, tokenizer=InPieces(), vocab_size=320)
    closing = []
    for token in pieces:
        closing.append(state.closes_thinking(token))
        request.token_ids.append(token)
        assembler.push(token)
    assert closing == [False] * (len(pieces) - 1) + [True]
    assert not state.closes_thinking(pieces[-1])
