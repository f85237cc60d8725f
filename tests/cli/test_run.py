"""`moejet run`: prompt forms, layout of the stream, options, JSON."""

import json
import os
import re
import signal

import pytest

from moejet import SamplingParams
from moejet.cli.terminal import AnswerWriter

DIM, RESET = "\x1b[2m", "\x1b[0m"


def test_streams_thinking_then_answer_then_figures(moejet, llm):
    result = moejet("run", "Start with 17.")
    assert result.code == 0
    assert result.out == "17 + 25 = 42\n\nThe answer is 126.\n"
    assert (
        result.err
        == "int8 experts · 1 thread\nprompt 23 tokens, 46 tok/s · answer 11 tokens, 40 tok/s\n"
    )
    assert llm.opened == [("tiny-reasoner", {})]
    name, messages, params = llm.calls[0]
    assert name == "stream_chat"
    assert messages == [{"role": "user", "content": "Start with 17."}]
    assert params == llm.default_sampling()
    assert llm.is_closed
    assert llm.num_aborts == 0


def test_thinking_is_dimmed_on_a_terminal_only(moejet, llm, monkeypatch):
    result = moejet("run", "x", terminal=True)
    thinking, answer = result.out.split("\n\n")
    assert thinking.startswith(DIM)
    assert thinking.endswith(RESET)
    assert thinking.replace(DIM, "").replace(RESET, "") == "17 + 25 = 42"
    assert answer == "The answer is 126.\n"
    assert "\x1b" not in moejet("run", "x").out


def test_no_color_is_respected(monkeypatch):
    from moejet.cli import terminal

    class Screen:
        def isatty(self):
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1")
    assert not terminal.supports_style(Screen())
    monkeypatch.delenv("NO_COLOR")
    assert terminal.supports_style(Screen())
    monkeypatch.setenv("TERM", "dumb")
    assert not terminal.supports_style(Screen())


def test_escape_sequences_of_the_model_do_not_reach_a_terminal(moejet, llm):
    llm.reasoning = ""
    llm.content = "\x1b]0;title\x07\x9b2J done\r"
    shown = moejet("run", "x", terminal=True).out
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", shown)
    assert "title" in shown
    # A file gets what the model wrote.
    assert "\x1b]0;title\x07" in moejet("run", "x").out


def test_hide_thinking(moejet, llm):
    assert moejet("run", "x", "--hide-thinking").out == "The answer is 126.\n"
    shown = moejet("run", "x", "--hide-thinking", terminal=True).out
    assert "17 + 25" not in shown
    assert shown.endswith("\r\x1b[KThe answer is 126.\n")


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        ([("a", ""), ("", "b")], "a\n\nb\n"),
        ([("a\n", ""), ("\n\n", ""), ("", "\n"), ("", "\n\nb\n\n")], "a\n\nb\n"),
        ([("a\n", ""), ("\nb", ""), ("", "c\n"), ("", "\nd")], "a\n\nb\n\nc\n\nd\n"),
        ([("a", "b")], "a\n\nb\n"),
        ([("", "\n"), ("", "b")], "b\n"),
        ([("only thought", "")], "only thought\n"),
        ([], ""),
    ],
)
def test_blank_line_is_one_line_however_the_pieces_fall(pieces, expected):
    import io

    out = io.StringIO()
    writer = AnswerWriter(out)
    for piece in pieces:
        writer.push(*piece)
    writer.finish()
    writer.finish()
    assert out.getvalue() == expected


def test_model_and_prompt(moejet, llm):
    moejet("run", "org/model", "hello", "--revision", "abc")
    moejet("run", "--temperature", "0", "org/model", "--seed", "3", "hello")
    assert llm.opened == [("org/model", {"revision": "abc"}), ("org/model", {})]
    assert [call[1][0]["content"] for call in llm.calls] == ["hello", "hello"]
    assert llm.calls[1][2].temperature == 0
    assert llm.calls[1][2].seed == 3


@pytest.mark.parametrize("arguments", [[], ["-"], ["org/model", "-"]])
def test_prompt_from_standard_input(moejet, llm, arguments):
    assert moejet("run", *arguments, stdin="two\nlines\n").code == 0
    assert llm.calls[0][1][0]["content"] == "two\nlines"


def test_prompts_that_look_like_options_or_arithmetic(moejet, llm):
    for arguments in (["-5 plus 3"], ["-q", "--", "-x"], ["1/2"], ["-5"]):
        assert moejet("run", *arguments).code == 0, arguments
    assert [call[1][0]["content"] for call in llm.calls] == ["-5 plus 3", "-x", "1/2", "-5"]


def test_missing_prompt(moejet, llm, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for arguments, message in [
        ([], "the prompt is missing"),
        (["  "], "the prompt is empty"),
        (["org/model"], "'org/model' looks like a model and the prompt is missing"),
        (["./some/dir"], "looks like a model"),
        ([str(tmp_path)], "looks like a model"),
        (["a", "b", "c"], "put the prompt into quotes"),
    ]:
        result = moejet("run", *arguments)
        assert result.code == 2
        assert message in result.err
    assert llm.opened == []


def test_every_option_reaches_the_engine(moejet, llm):
    sampling = {
        "temperature": 0.5,
        "top_k": 40,
        "top_p": 0.9,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "seed": 7,
        "max_tokens": 9,
    }
    words = [w for k, v in sampling.items() for w in (f"--{k.replace('_', '-')}", str(v))]
    words += ["--stop", "A", "--stop", "B", "--ignore-eos", "--stop-in-reasoning"]
    words += ["-n", "2", "--json", "--logprobs", "3", "--expert-format", "int8"]
    words += ["--dense-format", "fp32", "--max-context", "512", "--threads", "2", "--isa", "avx2"]
    words += ["--arithmetic", "int8", "--cache-dtype", "fp8"]
    assert moejet("run", "x", *words).code == 0
    assert llm.calls[0][2] == SamplingParams(
        **sampling,
        stop=("A", "B"),
        ignore_eos=True,
        stop_in_reasoning=True,
        n=2,
        logprobs=3,
    )
    engine = {"expert_format": "int8", "dense_format": "fp32", "max_context": 512}
    assert llm.opened[0][1] == {
        **engine,
        "num_threads": 2,
        "isa": "avx2",
        "arithmetic": "int8",
        "cache_dtype": "fp8",
    }


def test_bad_sampling_value_names_the_field(moejet, llm):
    result = moejet("run", "x", "--top-p", "2")
    assert result.code == 2
    assert "--top-p=2.0" in result.err


def test_system_and_raw(moejet, llm):
    moejet("run", "x", "--system", "Be brief.")
    assert llm.calls[0][1][0] == {"role": "system", "content": "Be brief."}
    result = moejet("run", "  x", "--raw")
    assert llm.calls[1][:2] == ("stream", "  x")
    assert result.out == "17 + 25 = 42\n\n\nThe answer is 126.\n"
    assert moejet("run", "x", "--raw", "--system", "y").code == 2


def test_json_is_one_object(moejet, llm):
    result = moejet("run", "x", "--json", "--logprobs", "1")
    assert result.err == ""
    assert result.out.count("\n") == 1
    shown = json.loads(result.out)
    assert shown["model"] == "tiny-reasoner"
    assert shown["reasoning"] == "17 + 25 = 42"
    assert shown["content"] == "The answer is 126."
    assert shown["text"].endswith("</think>\n\nThe answer is 126.")
    assert shown["token_ids"] == [5, 6, 7]
    assert shown["finish_reason"] == "stop"
    assert shown["timings"]["completion_tokens"] == 11
    assert shown["timings"]["decode_tokens_per_s"] == 40
    # JSON knows no infinity: an impossible token has no log-probability.
    assert shown["logprobs"] == [{"token_id": 5, "logprob": -0.5, "top": [[5, -0.5], [6, None]]}]
    assert "outputs" not in shown


def test_several_answers(moejet, llm):
    shown = json.loads(moejet("run", "x", "--json", "-n", "3").out)
    assert len(shown["outputs"]) == 3
    assert "logprobs" not in shown["outputs"][0]
    text = moejet("run", "x", "-n", "2").out
    assert text.startswith("--- 1 of 2 ---\n17 + 25 = 42\n\nThe answer is 126.\n--- 2 of 2 ---\n")


def test_logprobs_need_json(moejet, llm):
    result = moejet("run", "x", "--logprobs", "2")
    assert result.code == 2
    assert "--logprobs needs --json" in result.err


def test_cut_off_answers_say_so(moejet, llm):
    llm.finish_reason = "length"
    assert "cut off: token limit reached" in moejet("run", "x").err
    assert moejet("run", "x", "-q").err == ""


def test_interrupt_aborts_the_request(moejet, llm):
    llm.on_piece = lambda index: index == 2 and os.kill(os.getpid(), signal.SIGINT)
    result = moejet("run", "x")
    assert result.code == 130
    assert result.out.endswith("\n")
    assert llm.num_aborts == 1
    assert llm.is_closed


@pytest.mark.parametrize(("text", "value"), [("auto", "auto"), ("0", 0), ("512", 512)])
def test_when_prompts_stream(moejet, llm, text, value):
    assert moejet("run", "--stream-prefill-tokens", text, "x").code == 0
    assert llm.opened[-1][1] == {"stream_prefill_tokens": value}


@pytest.mark.parametrize("text", ["-1", "many", "1.5", ""])
def test_when_prompts_stream_is_checked(moejet, text):
    result = moejet("run", f"--stream-prefill-tokens={text}", "x")
    assert result.code == 2
    assert f"{text!r} must be auto or a whole number" in result.err
