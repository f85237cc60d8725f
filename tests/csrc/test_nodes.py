"""Weights divided among memory nodes: the same bits as on one, placed where the system allows it."""

import logging
from pathlib import Path

import pytest
import torch

from moejet import _C, extension, topology
from moejet.testing.moe_layers import FORMATS, activations, routing

# Two virtual nodes with a worker each, and three of which one has none.
DIVISIONS = [([0, 1], [-1, -1]), ([0, 2], [-1, -1, -1])]


def layer_answers(
    format: str, isa: str, pool: _C.ThreadPool, memory_nodes: list[int]
) -> list[torch.Tensor]:
    """Outputs of random experts and projections of odd sizes for 1 to 70 tokens."""
    experts = _C.ExpertWeights(4, 200, 257, format, memory_nodes)
    dense = _C.LinearWeights(3, 100, 200, format, memory_nodes)
    experts.fill_random(1, pool)
    dense.fill_random(2, pool)
    generator = torch.Generator().manual_seed(3)
    experts.set_projection(1, "up", torch.randn(257, 200, generator=generator), pool, isa)
    experts.set_projection(2, "down", torch.randn(200, 257, generator=generator), pool, isa)
    dense.set(1, torch.randn(100, 200, generator=generator), pool, isa)
    answers = [torch.from_numpy(w) for w in experts.dequantize(2)]
    for tokens in (1, 2, 17, 70):
        x, (ids, mix) = activations(tokens, 200), routing(tokens, 4, 2)
        out, wide = torch.empty(tokens, 200), torch.empty(tokens, 3, 100)
        _C.moe_forward(experts, x, ids, mix, out, pool, isa)
        _C.linear_forward(dense, x, wide, pool, isa)
        answers += [out, wide]
    return answers


@pytest.mark.parametrize("format", FORMATS)
def test_division_does_not_change_bits(isa: str, format: str, pool: _C.ThreadPool) -> None:
    expected = layer_answers(format, isa, pool, [-1])
    for worker_nodes, memory_nodes in DIVISIONS:
        divided = _C.ThreadPool([0, 1], False, worker_nodes, memory_nodes)
        assert divided.worker_nodes == worker_nodes
        got = layer_answers(format, isa, divided, divided.memory_nodes)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_sizes_hardly_change() -> None:
    whole = _C.ExpertWeights(3, 7168, 2048, "int4_g32")
    divided = _C.ExpertWeights(3, 7168, 2048, "int4_g32", [-1] * 4)
    assert whole.nbytes <= divided.nbytes <= whole.nbytes + 3 * 4 * 4096


def policies() -> list[str]:
    """Memory policies of this process's mappings, such as "default" and "prefer:0"."""
    path = Path("/proc/self/numa_maps")
    if not path.exists():
        pytest.skip("this kernel has no memory policies")
    return [line.split()[1] for line in path.read_text().splitlines()]


def test_weights_are_placed_on_their_nodes(pool: _C.ThreadPool) -> None:
    node = (topology.usable_memory_nodes() or (0,))[0]
    weights = _C.ExpertWeights(2, 512, 512, "int8", [node, node])
    if weights.bind_error:
        pytest.skip(weights.bind_error)
    weights.fill_random(1, pool)
    assert policies().count(f"prefer:{node}") == 2
    del weights
    assert policies().count(f"prefer:{node}") == 0


def test_refused_placement_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    extension._warn_not_placed.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            weights = _C.LinearWeights(1, 64, 64, "int8", [0, 1000])
            assert "mbind to memory node" in weights.bind_error
            extension.report_placement(weights)
        extension.report_placement(_C.LinearWeights(1, 64, 64, "int8"))
    assert len(caplog.records) == 1
    assert "mbind to memory node" in caplog.text
    assert "--cap-add SYS_NICE" in caplog.text


@pytest.mark.parametrize("bad", [[], [-2], [5000]])
def test_bad_nodes(bad: list[int]) -> None:
    with pytest.raises(ValueError, match="memory_nodes"):
        _C.ExpertWeights(2, 64, 64, "int8", bad)
    with pytest.raises(ValueError, match="memory_nodes"):
        _C.ThreadPool([0], True, [], bad)
