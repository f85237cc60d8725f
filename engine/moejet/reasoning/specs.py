"""Strategies by name, for the command line and for requests; how they are written: `moejet.reasoning.spec_text`.

| specification | strategy | options |
|---|---|---|
| single | one pass | |
| vote:N, shortest:N | majority of N samples; the shortest sample that agrees with it | |
| mbr:N | the one of N samples that is most like all others | utility=f1/exact |
| weighted:N, borda:N, best:N | N samples: a vote weighted by a scorer, or by rank; the best | temperature; p; margin |
| adaptive:N | up to N samples, until one answer leads with probability 0.95 | confidence |
| deepconf:N | up to N samples, those of low confidence stopped | warmup, keep, window, mode, wave |
| rounds:N | rounds until two agree, N at most | least, agree |
| check:N | one pass that has to think on N times | text, greedy=true/false |
| probe:N, turns | ends the thinking when N probes agree; when it is sure at a turn | every; threshold |
| beam:NxM, dvts:NxM | step-wise beam of N with M children each; N / M subtrees | max_steps, final |
| particles:N | N particles | max_steps, temperature, resampling, final |
| mcts:NxM | N rollouts over steps, M at a place | value, simulation, samples, c, depth, final, parallel |
| rstar:N | N rollouts with rStar's five actions | width, samples, votes, depth, parallel |
| marco:NxM | N rollouts over mini-steps, by the model's confidence | tokens, parallel |
| code:NxM | steps with Python that has to run: N beams of M, or N rollouts | method=beam/tree, depth, top |
| mutual:N | what a second model confirms of rstar:N, or of `inner` | second=MODEL, need |
| debate:N | N answers that read each other | rounds |
| cot, plan | an instruction to think first; a plan, then its execution | instruction |
| critique:N | criticises and improves its answer, N times at most | |
| templates:N | a navigator and a worker with thought templates, N steps at most | library, navigator, worker |
| json:N | N steps as JSON objects at most, then the answer | tokens, tries, constrained |
| difficulty:N | what a few answers agree on; N votes where they do not | hard, easy, probe, threshold |

vote to adaptive, rounds, cot, plan, critique and mutual take `inner`, a strategy for each pass; vote to adaptive also
stop=beta/unanimous/decided and wave. Searches over steps take delimiter and step_tokens. library is a file; second,
navigator, worker and scorer_model are models by their names. A scorer is one of `spec_options.SCORERS`, with aggregate
(last, min, mean, product) of step_head, and scorer_model of reward and verifier. Without one it is the model's step
head if it has one, else self_certainty.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moejet.llm import LLM
from moejet.reasoning.deepconf import DeepConf
from moejet.reasoning.early_exit import AtTransitions, Probed
from moejet.reasoning.rounds import CheckedOnce, VerifyRounds
from moejet.reasoning.sample import Sample
from moejet.reasoning.scorers import Confidence
from moejet.reasoning.search.actions import NextStep, rstar_actions
from moejet.reasoning.search.adaptive import Adaptive
from moejet.reasoning.search.code_steps import CodeSteps
from moejet.reasoning.search.debate import Debate
from moejet.reasoning.search.json_steps import JsonSteps
from moejet.reasoning.search.mcts import MCTS, Scored, VoteShare, marco
from moejet.reasoning.search.mutual_check import MutualCheck
from moejet.reasoning.search.particles import ParticleFilter
from moejet.reasoning.search.programs import ChainOfThought, PlanAndSolve, SelfCritique
from moejet.reasoning.search.step_beam import StepBeam
from moejet.reasoning.search.steps import Steps
from moejet.reasoning.search.templates import Library, Templates
from moejet.reasoning.select import (
    Best,
    Borda,
    Majority,
    MinimumBayesRisk,
    Select,
    Shortest,
    Weighted,
    token_f1,
)
from moejet.reasoning.single import Single
from moejet.reasoning.spec_options import Load, Options
from moejet.reasoning.spec_text import Spec
from moejet.reasoning.stopping import BetaStop, Decided, StopRule, Unanimous
from moejet.reasoning.task import Strategy
from moejet.validation import require_choice, require_int, require_type, short


def strategy_names() -> tuple[str, ...]:
    return tuple(_BUILDERS)


def parse_strategy(
    spec: str | Mapping[str, Any],
    llm: LLM,
    *,
    max_samples: int | None = None,
    load: Load | None = None,
) -> Strategy:
    """A strategy for a model from a specification. Raises ValueError, naming what is wrong with it.

    max_samples: that it may ask for; those of nested strategies multiply · load: loads models by their names; None
    where neither second models nor files may be named
    """
    require_type("llm", llm, LLM)
    require_int("max_samples", max_samples, 1, or_none=True)
    if load is not None and not callable(load):
        raise ValueError(f"load={short(load)} must be a function of a model's name, or None")
    read = Spec.read(spec)
    strategy, samples = _build(read, llm, load)
    if max_samples is not None and samples > max_samples:
        raise ValueError(
            f"strategy {read.name!r} asks for {samples} samples, and {max_samples} are allowed: "
            f"ask for fewer, as in {read.name}:{max_samples}"
        )
    return strategy


def check_spec(text: str) -> None:
    """What can be known to be wrong with a specification before there is a model."""
    _check_name(Spec.read(text))


def _check_name(spec: Spec) -> None:
    require_choice("strategy", spec.name, _BUILDERS)


def _build(spec: Spec, llm: LLM, load: Load | None) -> tuple[Strategy, int]:
    _check_name(spec)
    options = Options(spec, llm, load, _build)
    strategy = _BUILDERS[spec.name](options)
    if unknown := [key for key in spec.options if key not in options.asked]:
        known = ", ".join(options.asked) or "nothing"
        raise ValueError(f"strategy.{unknown[0]} is unknown: {spec.name} takes {known}")
    return strategy, options.samples * max(1, options.inner_samples)


def _sample(
    options: Options,
    select: Select,
    *,
    n: int = 8,
    stop: StopRule | None = None,
    wave: int | None = None,
) -> Sample:
    n = options.count("n", n)
    rules: dict[str, StopRule] = {
        "beta": BetaStop(),
        "unanimous": Unanimous(),
        "decided": Decided(n),
    }
    stop = rules.get(options.choice("stop", None, *rules), stop)
    if options.has("wave"):
        wave = options.number("wave", n)
    return Sample(n, options.strategy("inner"), select, stop, wave)


def _adaptive(o: Options) -> Sample:
    return _sample(o, Majority(), n=40, stop=BetaStop(o.real("confidence", 0.95)), wave=4)


def _mbr(o: Options) -> Sample:
    is_exact = o.choice("utility", "f1", "exact") == "exact"
    return _sample(o, MinimumBayesRisk(None if is_exact else token_f1))


def _weighted(o: Options) -> Sample:
    temperature = o.real("temperature", 1.0) if o.has("temperature") else None
    return _sample(o, Weighted(o.scorer(), temperature))


def _beam(o: Options, *, independent: bool) -> StepBeam:
    width = o.count("width", 4)
    n = o.count("n", 4 * width)
    return StepBeam(
        n,
        min(n, width),
        o.scorer(),
        o.steps(),
        o.number("max_steps", 40),
        independent=independent,
        final=o.choice("final", None, "best", "vote"),
    )


def _particles(o: Options) -> ParticleFilter:
    scorer = o.scorer()
    return ParticleFilter(
        o.count("n", 8),
        scorer,
        o.steps(),
        o.number("max_steps", 40),
        resampling=o.choice("resampling", "systematic", "multinomial"),
        scale="log" if isinstance(scorer, Confidence) else "probability",
        temperature=o.real("temperature", 1.0),
        final=o.choice("final", "best", "vote"),
    )


def _deepconf(o: Options) -> DeepConf:
    total = o.count("n", 64)
    default = DeepConf()
    return DeepConf(
        warmup=o.number("warmup", min(default.warmup, max(1, total // 2))),
        total=total,
        keep=o.real("keep", default.keep),
        window=o.number("window", default.window),
        mode=o.choice("mode", "online", "offline"),
        wave=o.number("wave", default.wave),
    )


def _mcts(o: Options) -> MCTS:
    is_vote = o.choice("value", "scorer", "votes") == "votes"
    return MCTS(
        (NextStep(o.count("width", 4), o.steps()),),
        VoteShare() if is_vote else Scored(o.scorer()),
        o.count("n", 16),
        c=o.real("c", 2.0),
        depth=o.number("depth", 40),
        simulation=o.choice("simulation", "finish", "expand", "none"),
        samples=o.count("samples", 1),
        final=o.choice("final", "vote", "best"),
        parallel=o.number("parallel", 1),
    )


def _rstar(o: Options) -> MCTS:
    actions = rstar_actions(
        o.steps(),
        width=o.count("width", 3),
        samples=o.count("samples", 32),
        votes=o.count("votes", 10),
    )
    return MCTS(
        actions,
        VoteShare(),
        o.count("n", 16),
        depth=o.number("depth", 5),
        simulation="expand",
        parallel=o.number("parallel", 1),
    )


def _marco(o: Options) -> MCTS:
    return marco(
        Steps.mini(o.number("tokens", 32)),
        width=o.count("width", 3),
        rollouts=o.count("n", 16),
        parallel=o.number("parallel", 1),
    )


def _code(o: Options) -> CodeSteps:
    method, children = o.choice("method", "beam", "tree"), o.count("width", 8)
    n = o.count("n", 8 if method == "beam" else 12)
    o.samples = n * children if method == "beam" else max(n, children)
    return CodeSteps(
        o.scorer(),
        method,
        beams=n,
        children=children,
        rollouts=n,
        depth=o.number("depth", 16),
        top=o.number("top", 4),
    )


def _mutual(o: Options) -> MutualCheck:
    inner = "single" if o.has("inner") else f"rstar:{o.number('n', 16)}"
    return MutualCheck(o.strategy("inner", inner), o.model("second"), need=o.real("need", 0.5))


def _plan(o: Options) -> PlanAndSolve:
    default = PlanAndSolve()
    return PlanAndSolve(o.text("instruction", default.plan), default.solve, o.strategy("inner"))


def _cot(o: Options) -> ChainOfThought:
    instruction = o.text("instruction", ChainOfThought().instruction)
    return ChainOfThought(instruction, o.strategy("inner"))


def _templates(o: Options) -> Templates:
    return Templates(
        Library.load(o.file("library")),
        o.model("navigator"),
        o.model("worker"),
        o.number("n", 10),
    )


def _json(o: Options) -> JsonSteps:
    return JsonSteps(
        o.number("n", 25),
        o.number("tokens", 300),
        tries=o.number("tries", 3),
        is_constrained=o.choice("constrained", True, False),
    )


def _difficulty(o: Options) -> Adaptive:
    return Adaptive(
        hard=o.strategy("hard", f"vote:{o.number('n', 16)}"),
        easy=o.strategy("easy") if o.has("easy") else None,
        probe=o.strategy("probe", "vote:4"),
        threshold=o.real("threshold", 0.75),
    )


_BUILDERS: dict[str, Callable[[Options], Strategy]] = {
    "single": lambda o: Single(),
    "vote": lambda o: _sample(o, Majority()),
    "weighted": _weighted,
    "borda": lambda o: _sample(o, Borda(o.scorer(), o.real("p", 0.5))),
    "best": lambda o: _sample(o, Best(o.scorer(), o.real("margin", 0.0))),
    "shortest": lambda o: _sample(o, Shortest()),
    "mbr": _mbr,
    "adaptive": _adaptive,
    "deepconf": _deepconf,
    "rounds": lambda o: VerifyRounds(
        o.number("least", 2), o.count("n", 5), o.number("agree", 2), o.strategy("inner")
    ),
    "check": lambda o: CheckedOnce(
        o.number("n", 1), o.text("text", "Wait"), o.choice("greedy", False, True)
    ),
    "probe": lambda o: Probed(agree=o.number("n", 3), every=o.number("every", 64)),
    "turns": lambda o: AtTransitions(threshold=o.real("threshold", 0.95)),
    "beam": lambda o: _beam(o, independent=False),
    "dvts": lambda o: _beam(o, independent=True),
    "particles": _particles,
    "mcts": _mcts,
    "rstar": _rstar,
    "marco": _marco,
    "code": _code,
    "mutual": _mutual,
    "debate": lambda o: Debate(o.count("n", 3), o.number("rounds", 2)),
    "cot": _cot,
    "plan": _plan,
    "critique": lambda o: SelfCritique(o.number("n", 2), o.strategy("inner")),
    "templates": _templates,
    "json": _json,
    "difficulty": _difficulty,
}
