"""What parallel samples cost in experts: how many distinct ones a layer reads per step, expected beside measured.

A layer reads an expert once per step, however many tokens want it. N tokens that choose k of E experts at random and
independently touch D(N) = E (1 - (1 - k/E)^N) of them: with 256 experts and k = 8, eight samples touch 57.4 and not 8,
so reading experts costs 0.90 of eight runs one after another. Real routing is correlated, in one of two simple ways:

- reuse: each later token takes the first one's experts with this probability, else its own:
  D = E (1 - (1 - k/E) (1 - (1 - reuse) k/E)^(N-1))
- working_set: all tokens of a prompt choose within W of the experts: E becomes W

Where reading experts is all that costs, N samples together cost R(N) = D(N) / (N k) of N runs; if a share f of one
run's step does not grow with N (attention on a GPU, shared experts, launches), R(N) = (f + (1 - f) D(N) / k) / N. Both
are lower bounds once a step is bound by arithmetic.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from moejet.config import ModelConfig
from moejet.reasoning.result import Usage


def expected_distinct_experts(
    num_experts: int,
    experts_per_token: int,
    num_tokens: float,
    *,
    reuse: float = 0.0,
    working_set: int | None = None,
) -> float:
    """D(N): experts of one layer that N = num_tokens tokens of a step touch together, expected."""
    experts = num_experts if working_set is None else working_set
    if not 1 <= experts_per_token <= num_experts:
        raise ValueError(f"{experts_per_token=} must lie in 1..{num_experts}, num_experts")
    if not experts_per_token <= experts <= num_experts:
        raise ValueError(
            f"working_set={experts} must lie between experts_per_token={experts_per_token} and "
            f"num_experts={num_experts}"
        )
    if not 0 <= reuse <= 1:
        raise ValueError(f"{reuse=} is a probability, between 0 and 1")
    if not 0 <= num_tokens < math.inf:
        raise ValueError(f"{num_tokens=} must be at least 0")
    share = experts_per_token / experts
    if num_tokens < 1:  # a part of a token, as means have it
        return num_tokens * experts_per_token
    untouched: float = (1 - share) * (1 - (1 - reuse) * share) ** (num_tokens - 1)
    return experts * (1 - untouched)


def relative_cost(
    distinct: float, experts_per_token: int, num_samples: int, *, fixed_share: float = 0.0
) -> float:
    """R(N): cost of N samples in common steps over that of N runs, each step of which reads `distinct` experts a layer.

    fixed_share: of one run's step, what does not grow with the number of samples
    """
    if num_samples < 1:
        raise ValueError(f"{num_samples=} must be at least 1")
    if not 0 <= fixed_share <= 1:
        raise ValueError(f"{fixed_share=} must lie between 0 and 1")
    return (fixed_share + (1 - fixed_share) * distinct / experts_per_token) / num_samples


@dataclass(frozen=True, slots=True)
class ExpertReads:
    """Experts that a MoE layer read per step while a run went on, beside D(N) of the tokens in those steps."""

    measured: float
    expected: float

    def __str__(self) -> str:
        return (
            f"{self.measured:.1f} distinct experts per layer and step (formula {self.expected:.1f})"
        )


def expert_reads(usage: Usage, model: ModelConfig) -> ExpertReads | None:
    """From what a run, or the sum of several, has used; None where nothing was counted."""
    layer_steps = usage.step_share * model.num_moe_layers
    if layer_steps <= 0 or usage.expert_loads <= 0:
        return None
    return ExpertReads(usage.expert_loads / layer_steps, usage.expected_loads / layer_steps)
