"""What ends a sample, token by token."""

import pytest

from moejet.commit import Gained, commit_token
from moejet.output import OutputAssembler
from moejet.request import Request, SamplingParams
from moejet.sampler import SampledToken
from moejet.testing.byte_tokenizer import write_tokenizer
from moejet.tokenizer import Tokenizer

EOS = 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    (path / "config.json").write_text(f'{{"eos_token_id": {EOS}}}')
    return Tokenizer.from_path(path)


def run(tokenizer, text: str, *, max_tokens: int = 100, **params) -> tuple[Gained, OutputAssembler]:
    """Commits the tokens of a text and an eos, until something ends the sample."""
    chosen = SamplingParams(**params)
    request = Request("r", 0, (5,), chosen, 0, 1 + max_tokens, frozenset({EOS}))
    tags = ("<think>", "</think>")
    assembler = OutputAssembler(tokenizer, chosen, think_tags=tags, thinking=False)
    for token_id in [*tokenizer.encode(text, add_special_tokens=False), EOS]:
        gained = commit_token(request, assembler, SampledToken(token_id, None))
        if gained.finish_reason is not None:
            return gained, assembler
    raise AssertionError("eos did not end it")


def test_an_eos_ends_it_without_a_reason(tokenizer):
    gained, assembler = run(tokenizer, "abc")
    assert (gained.finish_reason, gained.stop_reason) == ("stop", None)
    assert assembler.content == "abc"


@pytest.mark.parametrize("max_tokens", [100, 4], ids=["eos", "length"])
def test_a_stop_string_that_only_the_end_shows_is_the_reason(tokenizer, max_tokens):
    # Until then it may become a tag, and is no text.
    gained, assembler = run(tokenizer, "<thi", stop="hi", max_tokens=max_tokens)
    assert (gained.finish_reason, gained.stop_reason) == ("stop", "hi")
    assert assembler.text == assembler.content == "<t"


def test_a_stop_string_over_several_tokens_ends_it_with_the_last_of_them(tokenizer):
    gained, assembler = run(tokenizer, "one STOP two", stop="STOP")
    assert (gained.finish_reason, gained.stop_reason) == ("stop", "STOP")
    assert assembler.content == "one "
