"""Branches: forks equal what each context gives alone, blocks are shared, and none is lost."""

import random
from dataclasses import replace

import pytest
import torch

from moejet import LLM, SamplingParams
from moejet.policy import ForceContinuation, TokenPolicy
from moejet.testing.checkpoints import tiny_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {
    "expert_format": "bf16",
    "dense_format": "fp32",
    "cache_dtype": "fp32",
    "max_context": 256,
    "block_size": 16,
}
GREEDY = SamplingParams(temperature=0.0, ignore_eos=True)
PROMPT = [(7 * i) % 250 + 5 for i in range(50)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("model"), "deepseek_v3", dtype=torch.bfloat16)


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no_prefix"])
def llm(request, path):
    with LLM(path, prefix_caching=request.param, **OPTIONS) as llm:
        yield llm


@pytest.fixture(autouse=True)
def no_leaks(request):
    yield
    if "llm" in request.fixturenames:
        engine = request.getfixturevalue("llm").engine
        assert not engine.has_work
        assert engine.scheduler.held == []
        assert engine.block_pool.num_free == engine.block_pool.num_blocks
        engine.scheduler.check_integrity()


def _alone(llm, ids, count, **options) -> list[int]:
    params = replace(GREEDY, max_tokens=count, **options)
    return list(llm.generate(list(ids), params)[0].outputs[0].token_ids)


def test_thinking_is_counted_however_a_branch_advances(llm: LLM) -> None:
    prompt = [{"role": "user", "content": "Start with 17, add 25."}]
    with llm.branch(prompt) as whole, llm.branch(prompt) as pieces:
        whole.advance(max_tokens=30, params=GREEDY)
        for _ in range(10):
            pieces.advance(max_tokens=3, params=GREEDY)
        assert pieces.token_ids == whole.token_ids
        assert pieces.num_thinking_tokens == whole.num_thinking_tokens > 0


def test_a_branch_goes_on_as_generate_does(llm):
    expected = llm.generate(PROMPT, replace(GREEDY, max_tokens=30))[0].outputs[0]
    with llm.branch(PROMPT) as branch:
        pieces = [branch.advance(max_tokens=n, params=GREEDY) for n in (1, 4, 11, 14)]
        assert [len(p.token_ids) for p in pieces] == [1, 4, 11, 14]
        assert {p.finish_reason for p in pieces} == {"length"}
        assert branch.token_ids == expected.token_ids
        assert "".join(p.text for p in pieces) == branch.text
        assert expected.text.startswith(branch.text.rstrip("�"))
        assert branch.statistics.num_tokens == 30


def test_seeded_branches_equal_seeded_samples(llm):
    params = SamplingParams(seed=5, ignore_eos=True)
    samples = llm.generate(PROMPT, replace(params, n=4, max_tokens=20))[0].outputs
    with llm.branch(PROMPT) as root:
        branches = root.fork(4)
        for count in (7, 13):
            llm.advance(branches, max_tokens=count, params=params)
        assert [b.token_ids for b in branches] == [s.token_ids for s in samples]
        assert len({b.score for b in branches}) == 4
        assert all(b.score < 0 for b in branches)


@pytest.mark.parametrize("more", [1, 2, 13, 14, 15, 40])
def test_forks_part_with_what_is_appended(llm, more):
    with llm.branch(PROMPT) as root:
        root.advance(max_tokens=3, params=GREEDY)
        forks = root.fork(3)
        for token, fork in enumerate(forks, 20):
            fork.append([token] * more)
        llm.advance([*forks, root], max_tokens=10, params=GREEDY)
        first = list(root.token_ids)
        assert first == _alone(llm, PROMPT, 13)
        for token, fork in enumerate(forks, 20):
            before = first[:3] + [token] * more
            assert list(fork.token_ids) == before + _alone(llm, PROMPT + before, 10)
        assert root.statistics.num_tokens == 13
        llm.engine.scheduler.check_integrity()


def test_forks_of_forks_share_and_outlive_their_parents(llm):
    root = llm.branch(PROMPT)
    child = root.fork()[0]
    child.advance(max_tokens=20, params=GREEDY)
    grandchild = child.fork()[0]
    root.release()
    child.release()
    child.release()
    grandchild.advance(max_tokens=5, params=GREEDY)
    assert list(grandchild.token_ids) == _alone(llm, PROMPT, 25)
    with pytest.raises(ValueError, match="released"):
        child.advance(max_tokens=1)
    with pytest.raises(ValueError, match="released"):
        child.fork()
    grandchild.release()


def test_conditions(llm):
    plain = _alone(llm, PROMPT, 40)
    with llm.branch(PROMPT) as root:
        a, b, c, d, e = root.fork(5)
        segment = a.advance(until={plain[6]}, max_tokens=40, params=GREEDY)
        assert list(segment.token_ids) == plain[: plain.index(plain[6]) + 1]
        assert (segment.finish_reason, segment.stop_reason) == ("stop", plain[6])
        full = b.advance(max_tokens=40, params=GREEDY).text
        string = full[len(full) // 2 :][:3]
        segment = c.advance(until=["never there", string], max_tokens=40, params=GREEDY)
        assert string in segment.text
        assert string not in segment.text[:-4]
        assert segment.stop_reason == string
        seen = []
        segment = d.advance(
            until=lambda text, ids: seen.append((text, tuple(ids))) or len(ids) == 9,
            params=GREEDY,
        )
        assert [len(ids) for _, ids in seen] == list(range(1, 10))
        assert seen[-1] == (segment.text, segment.token_ids)
        assert segment.stop_reason == "until"
        # The last token that is allowed may be the one.
        segment = e.advance(until=plain[2], max_tokens=plain.index(plain[2]) + 1, params=GREEDY)
        assert segment.finish_reason == "stop"


def test_each_branch_until_its_own_condition(llm):
    with llm.branch(PROMPT) as root:
        branches = root.fork(4)
        for i, branch in enumerate(branches):
            branch.append([30 + i])
        segments = llm.advance(
            branches, until=lambda text, ids: ids[-1] % 3 == 0, max_tokens=60, params=GREEDY
        )
        for i, segment in enumerate(segments):
            alone = _alone(llm, [*PROMPT, 30 + i], 60)
            end = next((k for k, t in enumerate(alone) if t % 3 == 0), 59)
            assert list(segment.token_ids) == alone[: end + 1]


def test_eos_ends_a_branch_until_something_is_appended(llm):
    eos = next(iter(llm.engine.eos_token_ids))
    certain = SamplingParams(temperature=0.0, logit_bias={eos: 100.0})
    with llm.branch(PROMPT) as branch:
        segment = branch.advance(params=certain)
        assert (segment.token_ids, segment.finish_reason) == ((eos,), "stop")
        assert branch.is_finished
        with pytest.raises(ValueError, match="ended with an eos"):
            branch.advance(max_tokens=4)
        branch.append("next question")
        assert not branch.is_finished
        assert len(branch.advance(max_tokens=4, params=GREEDY).token_ids) == 4


def test_text_thinking_and_characters_go_on_across_segments(llm):
    with llm.branch([{"role": "user", "content": "hi"}]) as branch:
        assert branch.is_thinking
        euro = llm.tokenizer.encode("€", add_special_tokens=False)
        branch.append("hm\n")
        fork = branch.fork()[0]
        if len(euro) > 1:
            branch.append(euro[:1])
            assert branch.text == "hm\n"
            branch.append(euro[1:])
        assert branch.text.startswith("hm\n€"[: 3 + (len(euro) > 1)])
        fork.append("</think>\n\nyes")
        assert (fork.reasoning, fork.content, fork.is_thinking) == ("hm", "yes", False)
        assert branch.is_thinking
        fork.advance(max_tokens=3, params=GREEDY)
        assert fork.text.startswith("hm\n</think>\n\nyes")


def test_policies_and_penalties_apply(llm):
    class Odd(TokenPolicy):
        needs_logits = True

        def on_logits(self, state, row):
            return torch.arange(row.numel()) % 2 == 1

    with llm.branch(PROMPT) as root:
        forks = root.fork(3)
        llm.advance(forks, max_tokens=8, params=SamplingParams(seed=1, policy=Odd, ignore_eos=True))
        assert all(t % 2 for fork in forks for t in fork.token_ids)

        def fail():
            raise RuntimeError("no")

        with pytest.raises(RuntimeError, match="no"):
            llm.advance(forks, until=lambda text, ids: fail(), max_tokens=3, params=GREEDY)
        # The branches are still there.
        assert len(llm.advance(forks, max_tokens=2, params=GREEDY)) == 3


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": -1}, "max_tokens=-1"),
        ({"max_tokens": 1.5}, "max_tokens=1.5"),
        ({"until": ""}, "until holds ''"),
        ({"until": [None]}, "until holds None"),
        ({"params": SamplingParams(n=2)}, "n=2.*fork"),
        ({"params": SamplingParams(cache_salt="x")}, "cache_salt='x' does not apply"),
        ({"params": SamplingParams(stop="a")}, "stop=.*until"),
        ({"params": SamplingParams(logprobs=1)}, "logprobs=1"),
        ({"params": SamplingParams(stop_token_ids=(10**6,))}, "1000000"),
    ],
)
def test_bad_calls(llm, options, words):
    with llm.branch(PROMPT) as branch:
        with pytest.raises(ValueError, match=words):
            branch.advance(**options)
        with pytest.raises(ValueError, match="listed twice"):
            llm.advance([branch, branch])
        with pytest.raises(ValueError, match="n=0"):
            branch.fork(0)
        with pytest.raises(ValueError, match="nothing to append"):
            branch.append("")
        with pytest.raises(ValueError, match="outside the vocabulary"):
            branch.append([10**6])
        with pytest.raises(ValueError, match="max_context=256"):
            branch.append([5] * 300)
        assert branch.token_ids == ()


def test_the_context_ends_a_branch(llm):
    with llm.branch(PROMPT) as branch:
        assert branch.advance(params=GREEDY).finish_reason == "length"
        assert len(branch.token_ids) == 256 - len(PROMPT)
        assert branch.advance(params=GREEDY).token_ids == ()


def test_branches_that_lose_their_blocks_are_computed_again(path):
    """A cache for two contexts, and five branches of it that take turns with other requests."""
    with LLM(path, **{**OPTIONS, "max_context": 128}, cache_tokens=256) as llm:
        expected = {i: _alone(llm, [*PROMPT, 60 + i], 60) for i in range(5)}
        with llm.branch(PROMPT) as root:
            branches = root.fork(5)
            for i, branch in enumerate(branches):
                branch.append([60 + i])
            for _ in range(6):
                llm.advance(branches, max_tokens=10, params=GREEDY)
                llm.generate([9] * 100, replace(GREEDY, max_tokens=20))
                llm.engine.scheduler.check_integrity()
            for i, branch in enumerate(branches):
                assert list(branch.token_ids) == [60 + i, *expected[i]]
        assert llm.engine.block_pool.num_free == llm.engine.block_pool.num_blocks


@pytest.mark.parametrize("seed", range(4))
def test_random_trees_equal_each_context_alone(path, seed):
    rng = random.Random(seed)
    options = {**OPTIONS, "max_context": 128, "prefix_caching": bool(seed % 2)}
    with LLM(path, **options, cache_tokens=rng.choice([128, 512]), max_num_requests=4) as llm:
        branches = [llm.branch([rng.randrange(5, 250) for _ in range(rng.randint(1, 40))])]
        contents: list[list[int]] = [[]]
        for _ in range(25):
            choice = rng.choice(["fork", "append", "advance", "advance", "release"])
            i = rng.randrange(len(branches))
            if choice == "fork" and len(branches) < 10:
                branches += branches[i].fork(2)
                contents += [list(contents[i]), list(contents[i])]
            elif choice == "append" and len(contents[i]) < 60:
                ids = [rng.randrange(5, 250) for _ in range(rng.randint(1, 18))]
                branches[i].append(ids)
                contents[i] += ids
            elif choice == "release" and len(branches) > 1:
                branches.pop(i).release()
                contents.pop(i)
            elif choice == "advance":
                picked = rng.sample(range(len(branches)), rng.randint(1, len(branches)))
                segments = llm.advance(
                    [branches[k] for k in picked], max_tokens=rng.randint(0, 3), params=GREEDY
                )
                for k, segment in zip(picked, segments, strict=True):
                    expected = _alone(
                        llm,
                        [*branches[k].prompt_token_ids, *contents[k]],
                        max(1, len(segment.token_ids)),
                    )
                    assert list(segment.token_ids) == expected[: len(segment.token_ids)]
                    contents[k] += segment.token_ids
            llm.engine.scheduler.check_integrity()
            for branch, content in zip(branches, contents, strict=True):
                assert list(branch.token_ids) == content
        for branch in branches:
            branch.release()
        assert llm.engine.block_pool.num_free == llm.engine.block_pool.num_blocks


def test_many_forks_of_a_long_prompt_hold_it_once(path):
    options = {**OPTIONS, "max_context": 512, "cache_tokens": 4096, "max_num_requests": 64}
    with LLM(path, **options) as llm:
        prompt = [(11 * i) % 250 + 5 for i in range(400)]
        with llm.branch(prompt) as root:
            forks = root.fork(64)
            used = llm.engine.block_pool.num_blocks - llm.engine.block_pool.num_free
            assert used == 400 // 16
            assert sum(f.num_blocks for f in forks) == 64 * 25
            llm.advance(forks, max_tokens=4, params=SamplingParams(seed=1, ignore_eos=True))
            used = llm.engine.block_pool.num_blocks - llm.engine.block_pool.num_free
            # 24 full blocks and the root's last one; every fork has a copy of that and goes on there.
            assert used <= 25 + 64 * 2
            assert len({f.token_ids for f in forks}) > 32
        assert llm.engine.block_pool.num_free == llm.engine.block_pool.num_blocks


def test_closing_the_llm_frees_branches(path):
    llm = LLM(path, **OPTIONS)
    branch = llm.branch(PROMPT)
    branch.advance(max_tokens=2, params=GREEDY)
    llm.close()
    assert llm.engine.block_pool.num_free == llm.engine.block_pool.num_blocks
    branch.release()
    with pytest.raises(ValueError, match="closed"):
        llm.branch(PROMPT)


def test_step_by_step_strategy_on_the_reasoner():
    """A beam over lines, scored by log-probability: what branches are for."""
    question = [{"role": "user", "content": "Start with 17, add 25, then multiply by 3."}]
    with LLM(num_threads=1) as llm, llm.branch(question) as root:
        beams = [root]
        for _ in range(3):
            grown = [fork for beam in beams for fork in beam.fork(3)]
            llm.advance(grown, until="\n", max_tokens=40, params=SamplingParams(seed=2))
            assert all(f.text.endswith("\n") for f in grown)
            beams = sorted(grown, key=lambda b: b.score, reverse=True)[:2]
        params = SamplingParams(temperature=0.0, policy=lambda: ForceContinuation(1))
        beams[0].advance(params=params)
        assert beams[0].is_finished
        assert beams[0].content.startswith("The answer is")
        assert "Wait" in (beams[0].reasoning or "")
