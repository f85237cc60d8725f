"""Thinking, and answering by more of it: strategies that sample, vote, search and verify.

>>> from moejet import LLM
>>> from moejet.reasoning import Sample, solve
>>> with LLM() as llm:
...     result = solve(llm, [{"role": "user", "content": "Start with 17, add 25."}], Sample(16))
...     print(result.answer, result.confidence, result.usage)

Importing this package loads nothing else; first use does.
"""

from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "AnswerKey": "moejet.reasoning.answers",
    "Answers": "moejet.reasoning.task",
    "AtTransitions": "moejet.reasoning.early_exit",
    "Best": "moejet.reasoning.select",
    "BetaStop": "moejet.reasoning.stopping",
    "Borda": "moejet.reasoning.select",
    "Budget": "moejet.reasoning.budget",
    "Candidate": "moejet.reasoning.result",
    "Check": "moejet.reasoning.scorers",
    "CheckedOnce": "moejet.reasoning.rounds",
    "Confidence": "moejet.reasoning.scorers",
    "Decided": "moejet.reasoning.stopping",
    "DeepConf": "moejet.reasoning.deepconf",
    "Majority": "moejet.reasoning.select",
    "MinimumBayesRisk": "moejet.reasoning.select",
    "Node": "moejet.reasoning.result",
    "Probed": "moejet.reasoning.early_exit",
    "Progress": "moejet.reasoning.result",
    "Result": "moejet.reasoning.result",
    "RewardModel": "moejet.reasoning.scorers",
    "Run": "moejet.reasoning.task",
    "Sample": "moejet.reasoning.sample",
    "Scorer": "moejet.reasoning.scorers",
    "Select": "moejet.reasoning.select",
    "Shortest": "moejet.reasoning.select",
    "Single": "moejet.reasoning.single",
    "StepHead": "moejet.reasoning.scorers",
    "StepScorer": "moejet.reasoning.scorers",
    "StopRule": "moejet.reasoning.stopping",
    "Strategy": "moejet.reasoning.task",
    "Task": "moejet.reasoning.task",
    "Unanimous": "moejet.reasoning.stopping",
    "Usage": "moejet.reasoning.result",
    "Verifier": "moejet.reasoning.scorers",
    "VerifyRounds": "moejet.reasoning.rounds",
    "Weighted": "moejet.reasoning.select",
    "parse_strategy": "moejet.reasoning.specs",
    "solve": "moejet.reasoning.solver",
    "solve_many": "moejet.reasoning.solver",
    "stream": "moejet.reasoning.solver",
    "token_f1": "moejet.reasoning.select",
}

if TYPE_CHECKING:
    from moejet.reasoning.answers import AnswerKey as AnswerKey
    from moejet.reasoning.budget import Budget as Budget
    from moejet.reasoning.deepconf import DeepConf as DeepConf
    from moejet.reasoning.early_exit import AtTransitions as AtTransitions
    from moejet.reasoning.early_exit import Probed as Probed
    from moejet.reasoning.result import Candidate as Candidate
    from moejet.reasoning.result import Node as Node
    from moejet.reasoning.result import Progress as Progress
    from moejet.reasoning.result import Result as Result
    from moejet.reasoning.result import Usage as Usage
    from moejet.reasoning.rounds import CheckedOnce as CheckedOnce
    from moejet.reasoning.rounds import VerifyRounds as VerifyRounds
    from moejet.reasoning.sample import Sample as Sample
    from moejet.reasoning.scorers import Check as Check
    from moejet.reasoning.scorers import Confidence as Confidence
    from moejet.reasoning.scorers import RewardModel as RewardModel
    from moejet.reasoning.scorers import Scorer as Scorer
    from moejet.reasoning.scorers import StepHead as StepHead
    from moejet.reasoning.scorers import StepScorer as StepScorer
    from moejet.reasoning.scorers import Verifier as Verifier
    from moejet.reasoning.select import Best as Best
    from moejet.reasoning.select import Borda as Borda
    from moejet.reasoning.select import Majority as Majority
    from moejet.reasoning.select import MinimumBayesRisk as MinimumBayesRisk
    from moejet.reasoning.select import Select as Select
    from moejet.reasoning.select import Shortest as Shortest
    from moejet.reasoning.select import Weighted as Weighted
    from moejet.reasoning.select import token_f1 as token_f1
    from moejet.reasoning.single import Single as Single
    from moejet.reasoning.solver import solve as solve
    from moejet.reasoning.solver import solve_many as solve_many
    from moejet.reasoning.solver import stream as stream
    from moejet.reasoning.specs import parse_strategy as parse_strategy
    from moejet.reasoning.stopping import BetaStop as BetaStop
    from moejet.reasoning.stopping import Decided as Decided
    from moejet.reasoning.stopping import StopRule as StopRule
    from moejet.reasoning.stopping import Unanimous as Unanimous
    from moejet.reasoning.task import Answers as Answers
    from moejet.reasoning.task import Run as Run
    from moejet.reasoning.task import Strategy as Strategy
    from moejet.reasoning.task import Task as Task

__all__ = [
    "AnswerKey",
    "Answers",
    "AtTransitions",
    "Best",
    "BetaStop",
    "Borda",
    "Budget",
    "Candidate",
    "Check",
    "CheckedOnce",
    "Confidence",
    "Decided",
    "DeepConf",
    "Majority",
    "MinimumBayesRisk",
    "Node",
    "Probed",
    "Progress",
    "Result",
    "RewardModel",
    "Run",
    "Sample",
    "Scorer",
    "Select",
    "Shortest",
    "Single",
    "StepHead",
    "StepScorer",
    "StopRule",
    "Strategy",
    "Task",
    "Unanimous",
    "Usage",
    "Verifier",
    "VerifyRounds",
    "Weighted",
    "parse_strategy",
    "solve",
    "solve_many",
    "stream",
    "token_f1",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'moejet.reasoning' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
