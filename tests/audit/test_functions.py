"""Every public function and method with wrong values for every parameter, made from its signature."""

import asyncio
import inspect
from types import GeneratorType

import pytest

from moejet import LLM, AsyncLLM, SamplingParams, reasoning
from moejet.branch import Branch
from moejet.reasoning import Single
from moejet.request_stream import RequestStream
from moejet.server import asgi_app, serve_in_thread
from moejet.testing.bad_values import STRANGER, bad_values, faults_of, sampled

# A branch that has met an eos does not go on.
ONE = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
TURNS = [{"role": "user", "content": "Start with 17."}]
# For who steps an LLM's engine in its place, or waits for requests of its own: no input of users.
INTERNAL = {
    "LLM": {*("over", "run", "begin", "wait", "abandon", "ended", "post", "exclusive")},
    "AsyncLLM": {"checked_strategy"},
    "Branch": set(),
}
# What makes the rest of a call right, by the function's name and then by the parameter's.
RIGHT = {
    "generate": {"prompts": "Start", "prompt": "Start", "sampling_params": ONE, "params": ONE},
    "chat": {"messages": TURNS, "sampling_params": ONE, "params": ONE},
    "stream": {"prompt": "Start", "sampling_params": ONE},
    "stream_chat": {"messages": TURNS, "sampling_params": ONE},
    "branch": {"prompt": "Start"},
    "read_prompt": {"prompt": "Start"},
    "score": {"token_ids": [5, 6]},
    "score_top": {"token_ids": [5, 6], "num_top": 2},
    "bench_prefill": {"num_tokens": 4},
    "bench_decode": {"num_tokens": 2},
    "save_session": {"conversation": [5, 6]},
    "complete": {"prompt": "Start", "params": ONE},
    "solve": {"prompt": "Start", "strategy": Single(), "params": ONE},
    "solve_many": {"prompts": ["Start"], "strategy": Single(), "params": ONE},
    "synthetic": {"shape": STRANGER},
    "from_llm": {"llm": STRANGER},
    "progress": {"request_id": "x"},
    "abort": {"request_id": "x"},
    "end_thinking": {"request_id": "x"},
    "append": {"more": "x"},
    "advance": {"max_tokens": 1, "params": ONE},
    "parse_strategy": {"spec": "single"},
    "token_f1": {"a": "x", "b": "x"},
}
# Who wrongly gets no model, so that nothing is built where the parameter was accepted.
STOPS = {"from_llm": "llm", "synthetic": "shape"}
# How else a message may call what a parameter holds.
NAMES = {
    "prompt": ("messages", "text"),
    "prompts": ("messages", "text"),
    "conversation": ("messages", "prompt", "text"),
    "more": ("prompt", "text"),
    "spec": ("strategy",),
}
ALIASES = {
    "Until": "str | int | Sequence | Callable | None",
    "Prompt": "str | Sequence",
    "Sequence[Prompt]": "Sequence",
    "Strategy | str | Mapping[str, Any]": "Strategy | str | Mapping",
}


@pytest.fixture(scope="module")
def llm():
    with LLM(num_threads=1) as llm:
        yield llm


@pytest.fixture(scope="module")
def async_llm():
    llm = AsyncLLM(num_threads=1)
    yield llm
    asyncio.run(llm.close(drain=False))


def _public(kind):
    return [
        name
        for name, member in inspect.getmembers(kind, callable)
        if not name.startswith("_") and name not in INTERNAL[kind.__name__]
    ]


def _problems(function, right, finish=lambda result: result, most=20):
    """Each parameter with each wrong value, one at a time."""
    cases = []
    for parameter in inspect.signature(function).parameters.values():
        annotation = ALIASES.get(str(parameter.annotation), str(parameter.annotation))
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            # A default is not wrong.
            cases += [
                (parameter.name, bad)
                for bad in bad_values(annotation)
                if bad.value is not parameter.default
            ]
    problems, known = [], inspect.signature(function).parameters
    right = {name: value for name, value in right.items() if name in known}
    for name, bad in sampled(cases, most):
        fault = _fault(function, {**right, name: bad.value}, finish, name, bad)
        problems += [f"{function.__qualname__}({name}={bad}): {fault}"] if fault else []
    return problems


def _fault(function, arguments, finish, name, bad):
    try:
        finish(function(**arguments))
    except (ValueError, TypeError) as error:
        text = str(error)
        if STOPS.get(function.__name__) == text.partition("=")[0] != name:
            return "accepted" if bad.must_fail else ""
        names = (name, name.removesuffix("s"), *NAMES.get(name, ()))
        faults = faults_of(text, names, bad.value)
        # What is missing inside has no value, and of what is long only the length counts.
        if "=None" in text or "empty" in text or "leaves no room" in text:
            faults = [fault for fault in faults if fault != "value"]
        is_well = not faults and "\n" not in text
        return "" if is_well else f"lacks {', '.join(faults)}: {error!r:.300}"
    except OSError as error:  # of a path
        return "" if error.filename else f"no path: {error!r:.300}"
    except Exception as error:
        return f"{error!r:.300}"
    return "accepted" if bad.must_fail else ""


def _all_of(result):
    if isinstance(result, GeneratorType):
        list(result)
    if isinstance(result, Branch):
        result.release()
    return result


def _awaited(result):
    async def end():
        if isinstance(result, RequestStream) or hasattr(result, "result"):
            return await result.result()
        return await result if inspect.isawaitable(result) else result

    return asyncio.run(end())


def _entered(server):
    with server:
        pass


@pytest.mark.parametrize("name", _public(LLM))
def test_methods_of_a_model(llm, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # a path may be accepted
    right = dict(RIGHT.get(name, {}))
    if name in ("save_session", "load_session"):
        right["path"] = tmp_path / "session"
    if name == "advance":
        right["branches"] = [llm.branch("Start")]
    if name in ("close", "hand_over"):
        return
    problems = _problems(getattr(llm, name), right, _all_of)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", _public(AsyncLLM))
def test_methods_of_a_served_model(async_llm, name):
    if name == "close":
        return
    right = dict(RIGHT.get(name, {}))
    problems = _problems(getattr(async_llm, name), right, _awaited)
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize("name", _public(Branch))
def test_methods_of_a_branch(llm, name):
    problems = []
    if name != "release":
        with llm.branch("Start") as branch:
            problems = _problems(getattr(branch, name), RIGHT.get(name, {}), _all_of)
    assert not problems, "\n".join(problems)


FUNCTIONS = [
    getattr(reasoning, name)
    for name in reasoning.__all__
    if inspect.isfunction(getattr(reasoning, name))
]


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__name__)
def test_functions_of_reasoning(llm, function):
    name = function.__name__ if function is not reasoning.stream else "solve"
    right = dict(RIGHT.get(name, {}))
    if "llm" in inspect.signature(function).parameters:
        right["llm"] = llm
    problems = _problems(function, right, _all_of)
    assert not problems, "\n".join(problems)


def test_functions_of_the_server(async_llm):
    app = asgi_app(async_llm)
    problems = _problems(asgi_app, {"llm": async_llm})
    problems += _problems(serve_in_thread, {"app": app}, _entered)
    assert not problems, "\n".join(problems)
