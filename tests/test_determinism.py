"""The deterministic mode: the same bits whatever runs beside a request and however its tokens are cut into steps."""

import random

import pytest
import torch

from moejet import LLM, SamplingParams
from moejet.batch import Batch
from moejet.config import EngineConfig
from moejet.testing.checkpoints import tiny_checkpoint

OPTIONS = {"deterministic": True, "max_context": 512, "cache_tokens": 4096, "block_size": 8}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("deterministic"), "deepseek_v3")


def _logits(llm: LLM, ids: list[int], cuts: list[int], company: list[list[int]]) -> torch.Tensor:
    """Logits of every position, computed in pieces that end at `cuts`, beside the last tokens of others."""
    engine = llm.engine
    rows = []
    with engine.scratch_request(ids) as request:
        for end in [*cuts, len(ids)]:
            query_len = end - request.num_computed_tokens
            others = []
            for tokens in company:
                manager = engine.scratch_request(tokens)
                others.append((manager, manager.__enter__()))
            requests = [request, *(other for _, other in others)]
            lens = [query_len, *(len(other.token_ids) for _, other in others)]
            batch = Batch.build(requests, lens, block_size=8)
            batch.logits_indices = torch.arange(batch.num_tokens)
            rows.append(engine.runner.execute(batch)[:query_len])
            request.num_computed_tokens = end
            for manager, _ in others:
                manager.__exit__(None, None, None)
    return torch.cat(rows)


@pytest.mark.parametrize(
    "formats",
    [
        {"expert_format": "int4_g32", "dense_format": "int8"},
        {"expert_format": "fp8", "dense_format": "bf16"},
        {"expert_format": "bf16", "dense_format": "fp32", "cache_dtype": "fp32"},
        {"expert_format": "int8", "dense_format": "int8", "cache_dtype": "fp8"},
    ],
    ids=["int", "fp8-bf16", "exact", "fp8-cache"],
)
@pytest.mark.parametrize("isa", ["auto", "avx2"])
def test_logits_do_not_depend_on_the_batch(path, formats, isa, usable_isa):
    if isa != "auto":
        usable_isa(isa)
    rng = random.Random(3)
    ids = [rng.randrange(10, 250) for _ in range(300)]
    with LLM(path, isa=isa, **formats, **OPTIONS) as llm:
        whole = _logits(llm, ids, [], [])
        for _ in range(6):
            cuts = sorted(rng.sample(range(1, 300), rng.choice([1, 5, 40])))
            lengths = [rng.choice([1, 3, 70]) for _ in range(rng.randint(0, 5))]
            company = [[rng.randrange(10, 250) for _ in range(n)] for n in lengths]
            assert torch.equal(_logits(llm, ids, cuts, company), whole)


@pytest.mark.parametrize("cache_dtype", ["bf16", "fp8"])
def test_attention_over_several_splits(cache_dtype):
    """More keys than one split takes: cut anywhere, each query's result has the same bits."""
    from dataclasses import replace

    from moejet.presets import PRESETS

    shape = replace(
        PRESETS["deepseek-v2-lite"],
        num_hidden_layers=2,
        num_experts=8,
        hidden_size=256,
        intermediate_size=256,
        moe_intermediate_size=64,
        vocab_size=512,
        num_attention_heads=4,
    )
    rng = random.Random(5)
    ids = [rng.randrange(512) for _ in range(4200)]
    options = {"deterministic": True, "max_context": 8192, "cache_tokens": 16384, "block_size": 8}
    with LLM.synthetic(shape, cache_dtype=cache_dtype, **options) as llm:
        whole = _logits(llm, ids, [2000, 4000], [])
        assert torch.equal(_logits(llm, ids, [1999, 2047, 2048, 2049, 4090, 4097], [[1]]), whole)


@pytest.mark.parametrize("seed", range(4))
def test_sampled_tokens_are_those_of_each_request_alone(path, seed):
    """Prefix hits, chunks, preemption, forks and neighbours change nothing; half of the seeds with an fp8 cache."""
    rng = random.Random(seed)
    options = {**OPTIONS, "cache_dtype": ("bf16", "fp8")[seed % 2]}
    trunk = [rng.randrange(10, 250) for _ in range(120)]
    prompts = [
        trunk[: rng.randint(1, 120)] + [rng.randrange(10, 250) for _ in range(rng.randint(0, 20))]
        for _ in range(16)
    ]
    params = [
        SamplingParams(
            temperature=rng.choice([0.0, 1.0]),
            seed=i,
            max_tokens=rng.randint(1, 40),
            n=rng.choice([1, 1, 3]),
            ignore_eos=True,
        )
        for i in range(16)
    ]
    tight = {**options, "max_context": 192, "cache_tokens": 320, "max_batch_tokens": 37}
    with LLM(path, **options, prefix_caching=False) as llm:
        alone = [llm.generate([p], q)[0] for p, q in zip(prompts, params, strict=True)]
    with LLM(path, **tight) as llm:
        together = llm.generate(prompts, params)
        assert llm.engine.scheduler.num_preemptions > 0
        assert llm.engine.block_pool.num_evictions > 0
        llm.engine.scheduler.check_integrity()
        again = llm.generate(prompts, params)
    for expected, *others in zip(alone, together, again, strict=True):
        for result in others:
            assert [o.token_ids for o in result.outputs] == [o.token_ids for o in expected.outputs]
    assert any(r.timings.cached_tokens > 0 for r in together)


def test_instruction_sets_that_choose_by_rows_are_refused():
    with pytest.raises(ValueError, match=r"isa='amx' cannot be deterministic.*avx512"):
        EngineConfig(model="x", deterministic=True, isa="amx")
    with pytest.raises(ValueError, match="deterministic='yes' must be True or False"):
        EngineConfig(model="x", deterministic="yes")


def test_a_step_that_fails_changes_nothing(path, monkeypatch):
    """Forks lose none of their copies, whatever point of a step an interruption hits."""
    params = SamplingParams(temperature=1.0, seed=4, n=4, max_tokens=12, ignore_eos=True)
    prompt = list(range(20, 41))
    with LLM(path, **OPTIONS) as llm:
        expected = [o.token_ids for o in llm.generate([prompt], params)[0].outputs]
        engine = llm.engine
        execute, advance = engine.runner.execute, engine.scheduler.advance
        for place in ("execute", "advance"):
            failures = iter([False, True, False, True, True, False])

            def fail(batch, original=execute if place == "execute" else advance, plan=failures):
                if next(plan, False):
                    raise KeyboardInterrupt
                return original(batch)

            owner = engine.runner if place == "execute" else engine.scheduler
            monkeypatch.setattr(owner, place, fail)
            name = engine.add_request(prompt, params)
            output = None
            while output is None:
                try:
                    deltas = engine.step()
                except KeyboardInterrupt:
                    continue
                output = next((d.output for d in deltas if d.output is not None), None)
            monkeypatch.undo()
            assert output.request_id == name
            assert [o.token_ids for o in output.outputs] == expected


def test_a_request_that_breaks_spares_its_neighbours(path, monkeypatch):
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    with LLM(path, **OPTIONS) as llm:
        expected = llm.generate([[30, 31, 32]], params)[0].outputs[0].token_ids
        engine = llm.engine
        engine.add_request([40, 41, 42], params, request_id="broken")
        engine.add_request([30, 31, 32], params, request_id="sound")
        assembler = engine._groups["broken"].assemblers[0]
        monkeypatch.setattr(assembler, "push", lambda token_id: 1 // 0)
        seen = []
        while engine.has_work:
            seen += engine.step()
        [broken] = [d for d in seen if d.request_id == "broken"]
        assert isinstance(broken.error, ZeroDivisionError)
        assert broken.output.outputs[0].finish_reason == "abort"
        [sound] = [d.output for d in seen if d.output is not None and d.error is None]
        assert sound.outputs[0].token_ids == expected
        engine.scheduler.check_integrity()
        assert engine.block_pool.num_free == engine.block_pool.num_blocks


def test_aborting_inside_a_step_keeps_what_the_others_computed(path, monkeypatch):
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    with LLM(path, **OPTIONS) as llm:
        expected = llm.generate([[30, 31, 32]], params)[0].outputs[0].token_ids
        engine = llm.engine
        engine.add_request([40, 41, 42], params, request_id="gone")
        engine.add_request([30, 31, 32], params, request_id="stays")
        execute = engine.runner.execute

        def execute_and_abort(batch):
            engine.abort("gone")
            return execute(batch)

        monkeypatch.setattr(engine.runner, "execute", execute_and_abort)
        steps = 0
        output = None
        while output is None:
            output = next((d.output for d in engine.step() if d.output is not None), None)
            steps += 1
        assert output.outputs[0].token_ids == expected
        assert steps == 6
