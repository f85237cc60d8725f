"""The numbers u are away from the boundaries between tokens: there the reference's float64 may round elsewhere."""

import math

import pytest
import torch

from moejet.kernels import sample as kernels
from moejet.kernels import top_logits as top
from moejet.ops.device_sampling import SamplingTensors, count_tokens, sample_on_device_ref
from moejet.ops.sample_ref import BAD_LOGITS
from moejet.ops.top_logits import top_logits_on_device, top_logits_ref
from moejet.request import SamplingParams
from moejet.sampler import adjust_logits

CUT_OFFS = [
    {},
    {"top_k": 1},
    {"top_k": 5},
    {"top_p": 0.9},
    {"top_p": 1e-6},
    {"min_p": 0.05},
    {"top_k": 7, "top_p": 0.6},
    {"top_k": 40, "min_p": 0.2},
    {"top_p": 0.95, "min_p": 0.01},
    {"top_k": 30, "top_p": 0.8, "min_p": 0.1},
    {"top_k": 10**6},
]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Several chunks per row and more tokens than can be listed, of sizes that the interpreter can bear."""
    monkeypatch.setattr(kernels, "_CHUNK", 256)
    monkeypatch.setattr(kernels, "_CAPACITY", 64)


def _launch(logits, rows, **changes):
    p = rows.penalties
    return kernels.sample_tokens(
        logits, rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.uniforms,
        penalties=p and (p.repetition, p.presence, p.frequency, p.counts),
        biases=None if rows.bias_ids is None else (rows.bias_ids, rows.bias_values),
        is_random=rows.is_random, has_cut_offs=rows.has_cut_offs, **changes,
    )  # fmt: skip


def _check(logits, params, uniforms, counts=None):
    rows = SamplingTensors.of(params, uniforms, device="cpu", counts=counts)
    got, _ = _launch(logits, rows)
    expected, _, _ = sample_on_device_ref(logits, rows)
    assert got.tolist() == expected.tolist()
    return got


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(1, torch.float32), (50, torch.float16), (600, torch.float32)]
)
def test_cut_offs(vocab_size, dtype):
    chosen = CUT_OFFS if vocab_size == 600 else CUT_OFFS[::4]
    params = [SamplingParams(temperature=0.6 + 0.1 * i, **c) for i, c in enumerate(chosen)]
    logits = (torch.randn(len(params), vocab_size + 3) * 3).to(dtype)[:, :vocab_size]
    _check(logits, params, torch.rand(len(params), dtype=torch.float64).tolist())


@pytest.mark.parametrize("cut_off", [{}, {"top_p": 0.71}])
def test_every_u_of_a_small_row(cut_off):
    row = torch.log(torch.tensor([0.05, 0.4, 0.05, 0.3, 0.2, 0.0]))
    _check(row.expand(8, -1), [SamplingParams(**cut_off)] * 8, [(i + 0.5) / 8 for i in range(8)])


@pytest.mark.parametrize(
    "cut_off",
    [{"top_p": 0.9}, {"top_k": 100, "top_p": 0.7}, {"top_k": 150, "top_p": 0.99, "min_p": 0.3}],
)
def test_more_tokens_than_can_be_listed(cut_off, monkeypatch):
    """Nearly equal logits, then equal ones (where the cut falls among ties)."""
    logits = torch.cat((torch.randn(1, 200), torch.randint(3, (1, 200)) * 0.5)) * 0.5
    undecided = []

    class Recording:
        def __getitem__(self, grid):
            def run(*args, **kwargs):
                undecided.extend((args[7] == kernels._UNDECIDED).tolist())
                return search[grid](*args, **kwargs)

            return run

    search = kernels.search_kernel
    monkeypatch.setattr(kernels, "search_kernel", Recording())
    _check(logits, [SamplingParams(**cut_off)] * 2, [0.31, 0.97])
    assert undecided == [True, True]


def test_ties_and_greedy():
    logits = torch.tensor([[1.0, 3.0, 3.0, -0.0, 0.0, 3.0]] * 6)
    params = [SamplingParams(temperature=0.0)] + [SamplingParams(top_k=2)] * 5
    got = _check(logits, params, [0.5, 0.0, 0.3, 0.51, 0.7, 0.99])
    assert got.tolist() == [1, 1, 1, 2, 2, 2]
    tiny = [SamplingParams(temperature=1e-6), SamplingParams(temperature=1e-44, top_p=0.5)]
    assert _check(logits[:2], tiny, [0.2, 0.2]).tolist() == [1, 1]


def test_bad_rows_and_masked_tokens():
    logits = torch.randn(6, 40)
    logits[0, 3], logits[1, 39], logits[2, :], logits[3, 1:] = (
        math.nan, math.inf, -math.inf, -math.inf,
    )  # fmt: skip
    params = [SamplingParams(), SamplingParams(top_p=0.5), SamplingParams(temperature=0.0)] * 2
    got = _check(logits, params, [0.999999] * 6)
    assert got.tolist()[:4] == [BAD_LOGITS, BAD_LOGITS, BAD_LOGITS, 0]
    greedy = SamplingTensors.of([SamplingParams(temperature=0.0)] * 6, [0.0] * 6, device="cpu")
    assert _launch(logits, greedy)[0].tolist()[:4] == [BAD_LOGITS, BAD_LOGITS, BAD_LOGITS, 0]
    assert _launch(logits[:0], SamplingTensors.of([], [], device="cpu"))[0].tolist() == []


class _Request:
    def __init__(self, params, prompt, output):
        self.params, self.token_ids, self.output_token_ids = params, prompt + output, output


def test_penalties_and_bias():
    prompt, output = [0, 1, 2, 3, 50], [3, 3, 4, 60, 60, 60]
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(repetition_penalty=1.7, temperature=0.8),
        SamplingParams(presence_penalty=1.5, frequency_penalty=0.25, top_k=5),
        SamplingParams(logit_bias={7: 4.0, 69: -100.0, 0: 1.5}, top_p=0.9),
    ]
    logits = torch.randn(4, 70) * 2
    counts = count_tokens(prompt + output, len(prompt), 70).expand(4, -1)
    rows = SamplingTensors.of(params, [0.1, 0.3, 0.5, 0.7], device="cpu", counts=counts)
    adjusted = torch.stack(
        [
            adjust_logits(row, _Request(p, prompt, output))
            for row, p in zip(logits, params, strict=True)
        ]
    )
    plain = SamplingTensors.of(
        [SamplingParams(temperature=p.temperature, top_k=p.top_k, top_p=p.top_p) for p in params],
        [0.1, 0.3, 0.5, 0.7], device="cpu",
    )  # fmt: skip
    got = _launch(logits, rows)[0].tolist()
    assert got == sample_on_device_ref(adjusted, plain)[0].tolist()
    assert got == sample_on_device_ref(logits, rows)[0].tolist()


def test_log_sums_are_those_of_the_raw_logits():
    logits = torch.randn(3, 600) * 5
    logits[1, :300] = -math.inf  # a whole chunk
    params = [SamplingParams(temperature=0.0, logit_bias={5: 50.0})] * 3
    rows = SamplingTensors.of(params, [0.0] * 3, device="cpu")
    tokens, log_sums = _launch(logits, rows, log_sums=True)
    assert tokens.tolist() == [5, int(logits[1].argmax()), 5]
    torch.testing.assert_close(log_sums, torch.logsumexp(logits, dim=-1))


@pytest.mark.parametrize(
    ("shape", "k"), [((1, 1), 1), ((3, 700), 5), ((2, 600), 32), ((2, 9), 0), ((0, 9), 3)]
)
def test_top_logits(shape, k, monkeypatch):
    monkeypatch.setattr(top, "_CHUNK", 256)
    logits = torch.randn(shape[0], shape[1] + 2)[:, : shape[1]]
    logits[:, ::3] = logits[:, ::3].round()  # ties, and zeros of both signs
    logits[:1, 1:300] = -math.inf
    values, ids, sums = top.top_logits(logits, k)
    expected_values, expected_ids, expected_sums = top_logits_ref(logits, k)
    assert torch.equal(values, expected_values)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(sums, torch.tensor(expected_sums))
    values, ids, sums = top_logits_on_device(logits, k)  # on the CPU: torch's own
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(sums, torch.tensor(expected_sums))


def test_top_logits_in_half_precision():
    logits = torch.randn(2, 50).half()
    values, ids, _ = top.top_logits(logits, 4)
    expected_values, expected_ids, _ = top_logits_ref(logits.float(), 4)
    assert torch.equal(values, expected_values)
    assert torch.equal(ids, expected_ids)


def test_results_are_fp32_whatever_the_default_is():
    logits = torch.randn(2, 600) * 4
    rows = SamplingTensors.of([SamplingParams(logit_bias={3: 0.123})] * 2, [0.3, 0.7], device="cpu")
    expected = _launch(logits, rows, log_sums=True), top.top_logits(logits, 4)
    torch.set_default_dtype(torch.bfloat16)
    try:
        got = _launch(logits, rows, log_sums=True), top.top_logits(logits, 4)
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip((*got[0], *got[1]), (*expected[0], *expected[1]), strict=True):
        assert torch.equal(ours, theirs)
        assert ours.dtype == theirs.dtype
