"""Router logits against float64, and the choice of experts against the torch reference, ties included."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moejet import _C
from moejet.config import ModelConfig
from moejet.ops.router_topk import router_topk_ref
from moejet.presets import PRESETS

RANKS = {"greedy": "none", "group_limited_greedy": "best", "noaux_tc": "best_two"}


def _randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def _logits(x: Tensor, weight: Tensor, isa: str, pool: _C.ThreadPool | None = None) -> Tensor:
    out = torch.full((x.shape[0], weight.shape[0] + 2), 9.0)
    _C.router_logits(x, weight, out[:, :-2], pool, isa)
    assert bool((out[:, -2:] == 9.0).all())
    return out[:, :-2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("experts", "hidden"), [(1, 1), (3, 7), (8, 16), (9, 1024), (21, 1025), (64, 2051), (13, 5000)]
)
def test_logits(isa: str, experts: int, hidden: int, dtype: torch.dtype) -> None:
    weight = _randn(experts, hidden + 3)[:, 1 : hidden + 1].to(dtype)
    everything = _randn(53, hidden + 5, seed=1)[:, :hidden]
    alone = torch.cat([_logits(everything[t : t + 1], weight, isa) for t in range(53)])
    for tokens in (0, 1, 2, 3, 4, 5, 6, 7, 11, 13, 53):
        got = _logits(everything[:tokens], weight, isa)
        assert torch.equal(got, alone[:tokens]), f"{tokens=}"
    expected = everything.double() @ weight.double().T
    magnitude = everything.double().abs() @ weight.double().abs().T
    assert float(((alone.double() - expected).abs() / (magnitude + 1e-30)).max()) < 1e-6
    if dtype == torch.bfloat16:
        assert torch.equal(_logits(everything, weight.float(), isa), alone)


def test_logits_by_many_threads(isa: str, pool: _C.ThreadPool) -> None:
    weight = _randn(100, 2051)
    for tokens in (1, 2, 130):
        x = _randn(tokens, 2051, seed=2)
        assert torch.equal(_logits(x, weight, isa, pool), _logits(x, weight, isa))


def test_nan_stays_in_its_row(isa: str) -> None:
    x = torch.ones(9, 70)
    x[4, 69] = float("nan")
    bad = _logits(x, torch.ones(12, 70), isa).isnan()
    assert bad.all(dim=1).tolist() == bad.any(dim=1).tolist() == [t == 4 for t in range(9)]


def _config(experts: int, top_k: int, method: str, **changes: object) -> ModelConfig:
    scoring = "sigmoid" if method == "noaux_tc" else "softmax"
    return replace(
        PRESETS["deepseek-v3"],
        num_experts=experts,
        num_experts_per_tok=top_k,
        topk_method=method,
        scoring_func=scoring,
        **{"n_group": 1, "topk_group": 1, **changes},  # type: ignore[arg-type]
    )


CONFIGS = [
    _config(64, 6, "greedy", norm_topk_prob=False, routed_scaling_factor=1.0),
    _config(1, 1, "greedy"),
    _config(7, 7, "greedy"),
    _config(160, 6, "group_limited_greedy", n_group=8, topk_group=3, norm_topk_prob=False),
    _config(9, 2, "group_limited_greedy", n_group=3, topk_group=1),
    _config(256, 8, "noaux_tc", n_group=8, topk_group=4),
    _config(384, 8, "noaux_tc"),
    _config(6, 3, "noaux_tc", n_group=6, topk_group=4),
    _config(1024, 32, "noaux_tc", n_group=2, topk_group=1),
]


def _choose(
    logits: Tensor,
    bias: Tensor | None,
    config: ModelConfig,
    isa: str,
    pool: _C.ThreadPool | None = None,
) -> tuple[Tensor, Tensor]:
    ids = torch.full((logits.shape[0], config.num_experts_per_tok), -7, dtype=torch.int32)
    weights = torch.full(ids.shape, -7.0)
    _C.router_topk(
        logits,
        ids,
        weights,
        config.scoring_func,
        RANKS[config.topk_method],
        config.n_group,
        config.topk_group,
        config.norm_topk_prob,
        config.routed_scaling_factor,
        bias,
        pool,
        isa,
    )
    return ids, weights


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.topk_method}-{c.num_experts}")
@pytest.mark.parametrize("kind", ["random", "ties", "all equal", "wide", "-inf"])
def test_choice(isa: str, config: ModelConfig, kind: str) -> None:
    generator = torch.Generator().manual_seed(config.num_experts)
    experts = config.num_experts
    logits = torch.randn(200, experts + 1, generator=generator)[:, 1:] * 2
    bias = torch.randn(experts, generator=generator) * 0.1
    if kind == "ties":
        # Scores of equal logits are equal in both; a bias of -2, 0 or 2 never makes others equal.
        logits = (logits * 0.7).round()
        bias = torch.randint(-1, 2, (experts,), generator=generator) * 2.0
    elif kind == "all equal":
        logits, bias = torch.full((3, experts), 0.3), torch.zeros(experts)
    elif kind == "wide":
        logits = logits * 60
    elif kind == "-inf":
        logits = logits.contiguous()
        logits[:, ::3] = float("-inf")
        logits[:, 0] = 1.0
    used = bias if config.scoring_func == "sigmoid" else None
    ids, weights = _choose(logits, used, config, isa)
    expected_ids, expected_weights = router_topk_ref(logits, used, config)
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    if kind in ("ties", "all equal"):
        assert torch.equal(ids, expected_ids)
    # Elsewhere rounding may exchange neighbours; their weights are then the same.
    torch.testing.assert_close(weights, expected_weights, atol=1e-6, rtol=2e-5)
    assert float((ids == expected_ids).float().mean()) > (0.5 if kind == "wide" else 0.99)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.topk_method}-{c.num_experts}")
@pytest.mark.parametrize("bad", [float("nan"), -float("nan"), float("inf")])
def test_broken_logits_give_valid_ids(isa: str, config: ModelConfig, bad: float) -> None:
    for count in (1, config.num_experts):
        logits = _randn(4, config.num_experts)
        logits[1, -count:] = bad
        ids, weights = _choose(logits, None, config, isa)
        assert int(ids.min()) >= 0
        assert int(ids.max()) < config.num_experts
        assert all(len(set(row)) == len(row) for row in ids.tolist())
        assert not bool(weights[[0, 2, 3]].isnan().any())
        if bad != float("inf") or config.scoring_func == "softmax":
            assert bool(weights[1].isnan().any())


def test_no_tokens_and_many_threads(isa: str, pool: _C.ThreadPool) -> None:
    config = CONFIGS[5]
    ids, weights = _choose(torch.empty(0, 256), None, config, isa)
    assert ids.shape == weights.shape == (0, 8)
    logits, bias = _randn(500, 256), _randn(256)
    alone, together = _choose(logits, bias, config, isa), _choose(logits, bias, config, isa, pool)
    reference = _choose(logits, bias, config, "scalar")
    for i in range(2):
        assert torch.equal(alone[i], together[i])
        assert torch.equal(alone[i], reference[i])


_X = torch.ones(2, 8)
_IDS = torch.zeros(2, 3, dtype=torch.int32)
_WEIGHTS = torch.zeros(2, 3)


def _call(**changes: object) -> Callable[[], None]:
    arguments: dict[str, object] = {
        "logits": _X,
        "ids": _IDS,
        "weights": _WEIGHTS,
        "scoring": "softmax",
        "group_rank": "best",
        "num_groups": 2,
        "top_groups": 1,
        "norm_topk_prob": True,
        "scaling_factor": 1.0,
    }
    return lambda: _C.router_topk(**{**arguments, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (_call(scoring="tanh"), ValueError, "scoring='tanh' is unknown"),
        (_call(group_rank="worst"), ValueError, "group_rank='worst' is unknown"),
        (_call(num_groups=3), ValueError, "num_groups=3 must divide 8"),
        (_call(num_groups=0), ValueError, "num_groups=0 must divide 8"),
        (_call(top_groups=3), ValueError, "top_groups=3 must be from 1 to num_groups=2"),
        (_call(ids=torch.zeros(2, 9, dtype=torch.int32)), ValueError, "weights has shape"),
        (
            _call(ids=torch.zeros(2, 9, dtype=torch.int32), weights=torch.zeros(2, 9)),
            ValueError,
            r"ids.shape\[1\]=9 must be from 1 to 8",
        ),
        (_call(ids=_IDS.long()), TypeError, "ids has dtype int64"),
        (_call(bias=torch.zeros(7)), ValueError, "bias has shape"),
        (_call(logits=torch.ones(2, 1025)), ValueError, r"logits.shape\[1\]=1025"),
        (lambda: _C.router_logits(_X, torch.ones(3, 7), _WEIGHTS), ValueError, "weight has shape"),
        (lambda: _C.router_logits(_X, _X.half(), _X[:, :2]), TypeError, "weight has dtype"),
        (lambda: _C.router_logits(_X.bfloat16(), _X, _X[:, :2]), TypeError, "x has dtype"),
    ],
)
def test_bad_arguments(call: Callable[[], None], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
