"""Strategies by name, for the command line and for requests.

| specification | strategy |
|---|---|
| single | one pass |
| vote:N | majority of N samples |
| weighted:N, borda:N, best:N | N samples, weighted by a scorer, by rank, or the best of them |
| shortest:N, mbr:N | the shortest that agrees with the majority; the one most like all others |
| adaptive:N | up to N samples, until one answer leads with probability 0.95 |
| deepconf:N | up to N samples, those of low confidence stopped |
| rounds:N | rounds until two agree, N at most |
| check:N | one pass that has to think on N times |
| probe:N, turns | ends the thinking when N probes agree, or when the model is sure at a turn |
| beam:NxM, dvts:NxM | step-wise beam of N with M children each; N / M independent subtrees |
| particles:N, mcts:N | N particles; N rollouts |

As an object: {"name": "beam", "n": 16, "width": 4, "scorer": "logprob"}. A scorer can be named after the
number, or as "scorer": `best:16:logprob`. Without one it is the model's step head if it has one, else self-certainty.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from moejet.llm import LLM
from moejet.reasoning.deepconf import DeepConf
from moejet.reasoning.early_exit import AtTransitions, Probed
from moejet.reasoning.rounds import CheckedOnce, VerifyRounds
from moejet.reasoning.sample import Sample
from moejet.reasoning.scorers import Confidence, StepHead
from moejet.reasoning.search.actions import NextStep
from moejet.reasoning.search.mcts import MCTS, Scored
from moejet.reasoning.search.particles import ParticleFilter
from moejet.reasoning.search.step_beam import StepBeam
from moejet.reasoning.select import Best, Borda, MinimumBayesRisk, Shortest, Weighted, token_f1
from moejet.reasoning.single import Single
from moejet.reasoning.stopping import BetaStop
from moejet.reasoning.task import Strategy
from moejet.validation import near_miss, require_int, short

SCORERS = ("head", "logprob", "self_certainty", "confidence", "gap", "entropy")
MAX_SAMPLES = 1024
AnyScorer = Confidence | StepHead


@dataclass(frozen=True, slots=True)
class _Spec:
    name: str
    numbers: tuple[int, ...]
    scorer: AnyScorer
    used: list[int] = field(default_factory=list)  # numbers that its builder has asked for

    def number(self, default: int, place: int = 0) -> int:
        self.used.append(self.numbers[place] if len(self.numbers) > place else default)
        return self.used[-1]


_BUILDERS: dict[str, Callable[[_Spec], Strategy]] = {
    "single": lambda spec: Single(),
    "vote": lambda spec: Sample(spec.number(8)),
    "weighted": lambda spec: Sample(spec.number(8), select=Weighted(spec.scorer)),
    "borda": lambda spec: Sample(spec.number(8), select=Borda(spec.scorer)),
    "best": lambda spec: Sample(spec.number(8), select=Best(spec.scorer)),
    "shortest": lambda spec: Sample(spec.number(8), select=Shortest()),
    "mbr": lambda spec: Sample(spec.number(8), select=MinimumBayesRisk(token_f1)),
    "adaptive": lambda spec: Sample(spec.number(40), stop=BetaStop(), wave=4),
    "deepconf": lambda spec: _deepconf(spec.number(64)),
    "rounds": lambda spec: VerifyRounds(most=spec.number(5)),
    "check": lambda spec: CheckedOnce(spec.number(1)),
    "probe": lambda spec: Probed(agree=spec.number(3)),
    "turns": lambda spec: AtTransitions(),
    "beam": lambda spec: _beam(spec, independent=False),
    "dvts": lambda spec: _beam(spec, independent=True),
    "particles": lambda spec: _particles(spec),
    "mcts": lambda spec: MCTS((NextStep(4),), Scored(spec.scorer), spec.number(16)),
}
_NUMBERS = {"single": 0, "turns": 0, "beam": 2, "dvts": 2}
_TEXT = re.compile(r"([a-z_]+)(?::(\d+(?:x\d+)?))?(?::([a-z_]+))?")


def strategy_names() -> tuple[str, ...]:
    return tuple(_BUILDERS)


def parse_strategy(
    spec: str | Mapping[str, Any], llm: LLM | None, *, max_samples: int | None = None
) -> Strategy:
    """A strategy for a model from a specification. Raises ValueError, naming what is wrong with it.

    llm: None, before there is one, checks all but whether it has a step head
    max_samples: the largest number that it may hold
    """
    if isinstance(spec, Mapping):
        return _build(_from_object(spec, llm), max_samples)
    if not isinstance(spec, str) or not (match := _TEXT.fullmatch(spec.strip())):
        raise ValueError(
            f"strategy={short(spec)} is not understood: write NAME, NAME:NUMBER or NAME:NUMBER:SCORER, "
            "for example vote:16 or best:16:logprob"
        )
    name, numbers, scorer = match.groups()
    given = tuple(int(n) for n in numbers.split("x")) if numbers else ()
    return _build(_Spec(_known(name), given, _scorer(scorer, llm)), max_samples)


def _from_object(spec: Mapping[str, Any], llm: LLM | None) -> _Spec:
    names = {"name", "n", "width", "scorer"}
    for name in spec:
        if name not in names:
            hint = f"known fields: {', '.join(sorted(names))}"
            raise ValueError(
                f"strategy.{str(name)[:80]} is unknown{near_miss(name, names)}; {hint}"
            )
    if not isinstance(spec.get("name"), str):
        raise ValueError(
            f"strategy.name={short(spec.get('name'))} must be one of {', '.join(_BUILDERS)}"
        )
    numbers: list[int] = []
    for key in ("n", "width"):
        if (value := spec.get(key)) is None:
            continue
        require_int(f"strategy.{key}", value, 1)
        if key == "width" and not numbers:
            raise ValueError("strategy.width needs strategy.n")
        numbers.append(value)
    return _Spec(_known(spec["name"]), tuple(numbers), _scorer(spec.get("scorer"), llm))


def _known(name: str) -> str:
    if name not in _BUILDERS:
        raise ValueError(
            f"strategy={short(name)} is not one of {', '.join(_BUILDERS)}{near_miss(name, _BUILDERS)}"
        )
    return name


def _build(spec: _Spec, max_samples: int | None) -> Strategy:
    most = _NUMBERS.get(spec.name, 1)
    if len(spec.numbers) > most:
        raise ValueError(f"strategy={spec.name!r} takes {most or 'no'} number{'s' * (most > 1)}")
    for number in spec.numbers:
        if not 1 <= number <= MAX_SAMPLES:
            raise ValueError(f"strategy={spec.name}:{number} must be between 1 and {MAX_SAMPLES}")
    strategy = _BUILDERS[spec.name](spec)
    samples = max(spec.used, default=1)
    if max_samples is not None and samples > max_samples:
        raise ValueError(
            f"strategy={spec.name!r} asks for {samples} samples, and {max_samples} are allowed: "
            f"write {spec.name}:{max_samples}"
        )
    return strategy


def _scorer(name: Any, llm: LLM | None) -> AnyScorer:
    has_head = llm is None or llm.engine.step_head is not None
    if name is None:
        name = "head" if has_head else "self_certainty"
    if name not in SCORERS:
        hint = near_miss(name, SCORERS)
        raise ValueError(f"strategy.scorer={short(name)} must be one of {', '.join(SCORERS)}{hint}")
    if name != "head":
        return Confidence(name)
    if llm is not None and not has_head:
        raise ValueError(
            f"strategy.scorer='head' needs a model with a step head, and {llm.config.model} has none: "
            f"choose one of {', '.join(SCORERS[1:])}"
        )
    return StepHead()


def _beam(spec: _Spec, *, independent: bool) -> StepBeam:
    width = spec.number(4, 1)
    n = spec.number(4 * width)
    return StepBeam(n, min(n, width), spec.scorer, independent=independent)


def _particles(spec: _Spec) -> ParticleFilter:
    is_probability = isinstance(spec.scorer, StepHead)
    return ParticleFilter(
        spec.number(8), spec.scorer, scale="probability" if is_probability else "log"
    )


def _deepconf(total: int) -> DeepConf:
    return DeepConf(warmup=min(16, max(1, total // 2)), total=total)
