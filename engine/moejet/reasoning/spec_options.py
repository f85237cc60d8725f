"""The options of a strategy's specification, as whoever builds the strategy reads them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from moejet.llm import LLM
from moejet.reasoning.scorers import Confidence, RewardModel, StepHead, Verifier
from moejet.reasoning.search.steps import Steps
from moejet.reasoning.spec_text import Spec
from moejet.reasoning.task import Strategy

SCORERS = (
    "step_head",
    "logprob",
    "self_certainty",
    "confidence",
    "gap",
    "entropy",
    "top5_share",
    "reward",
    "verifier",
)
MAX_SAMPLES = 1024
AnyScorer = Confidence | StepHead | RewardModel | Verifier
Load = Callable[[str], LLM]


@dataclass(slots=True)
class Options:
    """A specification as its builder reads it, and what has been asked for.

    build: makes a strategy and tells how many samples it asks for
    samples: the largest number of them that was asked for · inner_samples: of all inner strategies together
    """

    spec: Spec
    llm: LLM
    load: Load | None
    build: Callable[[Spec, LLM, Load | None], tuple[Strategy, int]]
    asked: dict[str, None] = field(default_factory=dict)
    samples: int = 1
    inner_samples: int = 0

    def has(self, name: str) -> bool:
        self.asked[name] = None
        return name in self.spec.options

    def count(self, name: str, default: int) -> int:
        """A number of samples."""
        found = self.number(name, default)
        if found > MAX_SAMPLES:
            raise ValueError(
                f"strategy {self.spec.name}:{found} must be between 1 and {MAX_SAMPLES}"
            )
        self.samples = max(self.samples, found)
        return found

    def number(self, name: str, default: int) -> int:
        value = self._value(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            raise ValueError(f"strategy.{name}={value!r} must be an integer of at least 1")
        return value

    def real(self, name: str, default: float) -> float:
        value = self._value(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ValueError(f"strategy.{name}={value!r} must be a number")
        return float(value)

    def choice(self, name: str, *values: Any) -> Any:
        """The first is the default."""
        value = self._value(name, values[0])
        if value not in values:
            known = ", ".join(str(v).lower() for v in values if v is not None)
            raise ValueError(f"strategy.{name}={value!r} must be one of {known}")
        return value

    def text(self, name: str, default: str) -> str:
        value = self._value(name, default)
        if not isinstance(value, str) or not value:
            raise ValueError(f"strategy.{name}={value!r} must be a non-empty text")
        return value

    def strategy(self, name: str, default: str = "single") -> Strategy:
        value = self._value(name, default)
        if not isinstance(value, Spec):
            value = Spec.read(value)
        strategy, samples = self.build(value, self.llm, self.load)
        self.inner_samples += samples
        return strategy

    def model(self, name: str) -> LLM | None:
        """A second model, None if there is none."""
        if not self.has(name):
            return None
        return self._loader(name)(self.text(name, ""))

    def file(self, name: str) -> str | None:
        if not self.has(name):
            return None
        self._loader(name)
        return self.text(name, "")

    def steps(self) -> Steps:
        default = Steps()
        most = self.number("step_tokens", default.max_tokens or 1)
        return Steps(self.text("delimiter", default.delimiter or "\n"), most)

    def scorer(self) -> AnyScorer:
        has_head = self.llm.engine.step_head is not None
        name = self._value("scorer", "step_head" if has_head else "self_certainty")
        name = "step_head" if name == "head" else name
        match name:
            case "reward" | "verifier":
                model = self.model("scorer_model")
                if name == "verifier":
                    return Verifier(model)
                if model is None:
                    raise ValueError("scorer 'reward' is a second model: add scorer_model=MODEL")
                return RewardModel(model)
            case "step_head":
                if not has_head:
                    raise ValueError(
                        f"scorer 'step_head' needs a model with a step head, and {self.llm.config.model} has none: "
                        f"choose one of {', '.join(SCORERS[1:])}"
                    )
                return StepHead(self.choice("aggregate", "product", "last", "min", "mean"))
        if name not in SCORERS:
            raise ValueError(f"scorer {name!r} must be one of {', '.join(SCORERS)}")
        return Confidence(cast("Any", name))

    def _loader(self, name: str) -> Load:
        if self.load is None:
            raise ValueError(
                f"strategy.{name} names a model or a file, which cannot be given here: leave it out, or use "
                "moejet run, moejet eval or moejet.reasoning"
            )
        return self.load

    def _value(self, name: str, default: Any) -> Any:
        return self.spec.options[name] if self.has(name) else default
