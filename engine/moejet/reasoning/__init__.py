"""Thinking, and answering by more of it: strategies that sample, vote, search and verify.

>>> from moejet import LLM
>>> from moejet.reasoning import Sample, solve
>>> with LLM() as llm:
...     result = solve(llm, [{"role": "user", "content": "Start with 17, add 25."}], Sample(16))
...     print(result.answer, result.confidence, result.usage)

Importing this package loads nothing else; first use does.
"""

from typing import TYPE_CHECKING, Any

_MODULES = {
    "answer_classes": "Answers",
    "answers": "AnswerKey",
    "budget": "Budget",
    "deepconf": "DeepConf",
    "early_exit": "AtTransitions Probed",
    "result": "Candidate Node Progress Result Usage",
    "rounds": "CheckedOnce VerifyRounds",
    "sample": "Sample",
    "scorers": "Check Confidence RewardModel Scorer StepHead StepScorer Verifier",
    "search.actions": "Finish NextStep ReAnswer Rephrase SubQuestion",
    "search.adaptive": "Adaptive",
    "search.code_steps": "CodeCheck CodeSteps",
    "search.debate": "Debate",
    "search.json_steps": "JsonSteps",
    "search.mcts": "MCTS Scored VoteShare marco rstar",
    "search.mutual_check": "MutualCheck",
    "search.particles": "ParticleFilter",
    "search.programs": "ChainOfThought PlanAndSolve SelfCritique",
    "search.step_beam": "StepBeam",
    "search.steps": "Steps",
    "search.templates": "Library Template Templates",
    "select": "Best Borda Majority MinimumBayesRisk Select Shortest Weighted token_f1",
    "single": "Single",
    "solver": "solve solve_many stream",
    "specs": "parse_strategy",
    "stopping": "BetaStop Decided StopRule Unanimous",
    "task": "Run Strategy Task",
}
_EXPORTS = {
    name: f"moejet.reasoning.{module}"
    for module, names in _MODULES.items()
    for name in names.split()
}

if TYPE_CHECKING:
    from moejet.reasoning.answer_classes import Answers as Answers
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
    from moejet.reasoning.search.actions import Finish as Finish
    from moejet.reasoning.search.actions import NextStep as NextStep
    from moejet.reasoning.search.actions import ReAnswer as ReAnswer
    from moejet.reasoning.search.actions import Rephrase as Rephrase
    from moejet.reasoning.search.actions import SubQuestion as SubQuestion
    from moejet.reasoning.search.adaptive import Adaptive as Adaptive
    from moejet.reasoning.search.code_steps import CodeCheck as CodeCheck
    from moejet.reasoning.search.code_steps import CodeSteps as CodeSteps
    from moejet.reasoning.search.debate import Debate as Debate
    from moejet.reasoning.search.json_steps import JsonSteps as JsonSteps
    from moejet.reasoning.search.mcts import MCTS as MCTS
    from moejet.reasoning.search.mcts import Scored as Scored
    from moejet.reasoning.search.mcts import VoteShare as VoteShare
    from moejet.reasoning.search.mcts import marco as marco
    from moejet.reasoning.search.mcts import rstar as rstar
    from moejet.reasoning.search.mutual_check import MutualCheck as MutualCheck
    from moejet.reasoning.search.particles import ParticleFilter as ParticleFilter
    from moejet.reasoning.search.programs import ChainOfThought as ChainOfThought
    from moejet.reasoning.search.programs import PlanAndSolve as PlanAndSolve
    from moejet.reasoning.search.programs import SelfCritique as SelfCritique
    from moejet.reasoning.search.step_beam import StepBeam as StepBeam
    from moejet.reasoning.search.steps import Steps as Steps
    from moejet.reasoning.search.templates import Library as Library
    from moejet.reasoning.search.templates import Template as Template
    from moejet.reasoning.search.templates import Templates as Templates
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
    from moejet.reasoning.task import Run as Run
    from moejet.reasoning.task import Strategy as Strategy
    from moejet.reasoning.task import Task as Task

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'moejet.reasoning' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
