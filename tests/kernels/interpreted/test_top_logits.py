import math

import pytest
import torch

from moejet.kernels import top_logits as kernels
from moejet.ops.top_logits import top_logits_on_device, top_logits_ref


@pytest.mark.parametrize(
    ("shape", "k"), [((1, 1), 1), ((3, 700), 5), ((2, 600), 32), ((2, 9), 0), ((0, 9), 3)]
)
def test_matches_the_reference(shape, k, monkeypatch):
    monkeypatch.setattr(kernels, "_CHUNK", 256)
    logits = torch.randn(shape[0], shape[1] + 2)[:, : shape[1]]
    logits[:, ::3] = logits[:, ::3].round()  # ties, and zeros of both signs
    logits[:1, 1:300] = -math.inf
    values, ids, sums = kernels.top_logits(logits, k)
    expected_values, expected_ids, expected_sums = top_logits_ref(logits, k)
    assert torch.equal(values, expected_values)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(sums, torch.tensor(expected_sums))
    values, ids, sums = top_logits_on_device(logits, k)  # on the CPU: torch's own
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(sums, torch.tensor(expected_sums))


def test_half_precision():
    logits = torch.randn(2, 50).half()
    values, ids, _ = kernels.top_logits(logits, 4)
    expected_values, expected_ids, _ = top_logits_ref(logits.float(), 4)
    assert torch.equal(values, expected_values)
    assert torch.equal(ids, expected_ids)
