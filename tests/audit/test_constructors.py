"""Every public class with wrong values for every parameter, made from its annotations."""

import dataclasses
import inspect

import pytest

import moejet
from moejet import LLM, policy, reasoning
from moejet.reasoning import Confidence, Single, Template
from moejet.server.config import ServerConfig
from moejet.testing.bad_values import bad_values, faults_of

# What the engine makes, and what nobody makes an object of.
OUTPUTS = {
    *(
        "CompletionOutput",
        "RequestOutput",
        "StreamDelta",
        "TokenLogprobs",
        "Timings",
        "RequestStream",
    ),
    *("Candidate", "Node", "Progress", "Usage", "Result", "Task", "Answers"),
    *("Scorer", "Select", "StepScorer", "StopRule", "Strategy", "LLM", "AsyncLLM"),
}
POLICIES = ("ThinkingBudget", "ForceContinuation", "MinimumThinking", "LoopGuard", "EarlyExit")
CLASSES = [
    getattr(module, name)
    for module in (moejet, reasoning)
    for name in module.__all__
    if inspect.isclass(getattr(module, name)) and name not in OUTPUTS
]
CLASSES = [kind for kind in CLASSES if not issubclass(kind, Exception)]
CLASSES += [ServerConfig, *(getattr(policy, name) for name in POLICIES)]
# By design: no stop strings, no policy.
ACCEPTED = {("SamplingParams", "stop", "None"), ("SamplingParams", "policy", "None")}
ACCEPTED |= {("SamplingParams", "policy", "[]")}


@pytest.fixture(scope="module")
def right():
    """What makes the rest of a call right, by the class's name."""
    with LLM(num_threads=1) as llm:
        model = llm.model_config
        scored = {"scorer": Confidence()}
        template = {"name": "n", "section": "s", "tags": ("t",), "when": "w", "steps": ("a",)}
        yield {
            "EngineConfig": {"model": "tiny-reasoner"},
            "ModelConfig": {f.name: getattr(model, f.name) for f in dataclasses.fields(model)},
            "Grammar": {"kind": "regex", "text": "a+"},
            "MutualCheck": {"inner": Single()},
            "Adaptive": {"hard": Single()},
            **dict.fromkeys(("Best", "Borda", "Weighted", "CodeSteps", "Scored"), scored),
            "Check": {"function": lambda candidate: True},
            "Decided": {"total": 3},
            "ParticleFilter": {**scored, "n": 4, "scale": "log"},
            "StepBeam": {**scored, "n": 4, "width": 2},
            "RewardModel": {"model": llm},
            "Template": template,
            "Library": {"templates": (Template(**template),)},
            "ThinkingBudget": {"max_thinking_tokens": 3},
            "ForceContinuation": {"times": 1},
            "MinimumThinking": {"min_tokens": 1},
            "EarlyExit": {"condition": lambda state: True},
        }


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_wrong_parameters_are_refused_by_name(kind, right):
    problems = []
    for parameter in inspect.signature(kind).parameters.values():
        for bad in bad_values(str(parameter.annotation)):
            where = f"{parameter.name}={bad}"
            try:
                kind(**{**right.get(kind.__name__, {}), parameter.name: bad.value})
            except ValueError as error:
                faults = faults_of(str(error), parameter.name, bad.value)
                if faults or "\n" in str(error):
                    problems.append(f"{where}: lacks {', '.join(faults)}: {str(error)[:300]!r}")
            except Exception as error:
                problems.append(f"{where}: {type(error).__name__}: {error}")
            else:
                if (
                    bad.must_fail
                    and (kind.__name__, parameter.name, repr(bad.value)) not in ACCEPTED
                ):
                    problems.append(f"{where}: accepted")
    assert not problems, "\n".join(problems)
