"""`moejet chat`: history, commands, interruption, limits."""

import os
import signal

import pytest


@pytest.fixture
def typed(monkeypatch):
    """Replaces the keyboard: a list of lines or exceptions that input() gives in turn."""

    def type_lines(*lines):
        left = list(lines)

        def read(prompt=""):
            if not left:
                raise EOFError
            line = left.pop(0)
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", read)

    return type_lines


def test_history_keeps_answers_without_their_reasoning(moejet, llm):
    result = moejet("chat", "--system", "Be brief.", stdin="first\n\n  second \n")
    assert result.code == 0
    assert result.out == "17 + 25 = 42\n\nThe answer is 126.\n" * 2
    assert llm.calls[1][1] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "The answer is 126."},
        {"role": "user", "content": "second"},
    ]


def test_keyboard_conversation_ends_with_end_of_file(moejet, llm, typed):
    typed("hello")
    result = moejet("chat", "org/model", "--temperature", "0")
    assert result.code == 0
    assert llm.opened[0][0] == "org/model"
    assert llm.calls[0][2].temperature == 0
    assert "/help lists the commands" in result.err
    assert llm.is_closed


def test_reset_and_exit(moejet, llm):
    moejet("chat", "--system", "s", stdin="one\n/reset\ntwo\n/exit\nthree\n")
    assert [message["content"] for message in llm.calls[1][1]] == ["s", "two"]
    assert len(llm.calls) == 2


def test_commands_answer_without_the_model(moejet, llm):
    result = moejet("chat", stdin="/help\n/stats\n/rest\n/frobnicate\n")
    assert llm.calls == []
    for text in (
        "/reset   forget the conversation",
        "no answers yet",
        "unknown command /rest; did you mean '/reset'?",
        "unknown command /frobnicate; /help lists the commands",
    ):
        assert text in result.err


def test_a_path_is_a_message_and_not_a_command(moejet, llm):
    moejet("chat", stdin="/etc/hosts is a file\n/etc/hosts\n")
    assert len(llm.calls) == 2


def test_stats(moejet, llm):
    err = moejet("chat", stdin="a\nb\n/stats\n").err
    assert "2 answers, 22 tokens, 44 tok/s · the last turn took 34 tokens of context" in err


def test_interrupt_stops_the_answer_and_not_the_program(moejet, llm, typed):
    handler = signal.getsignal(signal.SIGINT)
    typed("first", "second")
    # The pieces 0-4 are the thought; piece 8 lies inside the answer.
    llm.on_piece = lambda index: (
        index == 8 and len(llm.calls) == 1 and os.kill(os.getpid(), signal.SIGINT)
    )
    result = moejet("chat")
    assert result.code == 0
    assert "stopped" in result.err
    assert llm.num_aborts == 1
    roles = [message["role"] for message in llm.calls[1][1]]
    assert roles == ["user", "assistant", "user"]
    assert "The answer is 126.".startswith(llm.calls[1][1][1]["content"])
    assert signal.getsignal(signal.SIGINT) is handler


def test_a_stopped_thought_takes_its_turn_out_of_the_history(moejet, llm, typed):
    typed("first", "second")
    llm.on_piece = lambda index: (
        index == 1 and len(llm.calls) == 1 and os.kill(os.getpid(), signal.SIGINT)
    )
    result = moejet("chat")
    assert "this turn is left out" in result.err
    assert llm.calls[1][1] == [{"role": "user", "content": "second"}]


def test_second_interrupt_leaves(moejet, llm, typed):
    typed("first", "second")

    def interrupt_twice(index):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    llm.on_piece = interrupt_twice
    assert moejet("chat").code == 130
    assert len(llm.calls) == 1
    assert llm.is_closed


def test_interrupt_at_the_prompt_gives_a_hint(moejet, llm, typed):
    typed(KeyboardInterrupt(), "hello")
    result = moejet("chat")
    assert result.code == 0
    assert "Ctrl-D or /exit leaves" in result.err
    assert len(llm.calls) == 1


def test_a_prompt_that_is_too_long_keeps_the_conversation(moejet, llm):
    llm.max_prompt_chars = 150
    result = moejet("chat", stdin="short\n" + "x" * 200 + "\n/reset\nagain\n")
    assert "moejet: error: the prompt has 99 tokens, max_context=10" in result.err
    assert "/reset starts a new conversation" in result.err
    assert llm.calls[-1][1] == [{"role": "user", "content": "again"}]
    # A script must be told; a person has seen it.
    assert result.code == 2


def test_a_full_context_is_explained(moejet, llm):
    llm.finish_reason = "length"
    assert "the context is full: /reset" in moejet("chat", stdin="a\n").err
    llm.completion_tokens = 5
    err = moejet("chat", "--max-tokens", "5", stdin="a\n").err
    assert "the context is full" not in err
    assert "cut off: token limit reached" in err


def test_hide_thinking(moejet, llm):
    assert moejet("chat", "--hide-thinking", stdin="a\n").out == "The answer is 126.\n"
