"""What a model can be asked for."""

import pytest

from moejet.presets import PRESETS
from moejet.request_rules import RequestRules
from moejet.testing.byte_tokenizer import write_tokenizer
from moejet.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def rules(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(path)
    tokenizer = Tokenizer.from_path(path)
    model_config = next(iter(PRESETS.values()))
    return RequestRules(model_config, tokenizer, max_context=4096, eos_token_ids=frozenset())


@pytest.mark.parametrize("text", ["a<think>", "<think>\n", "<think>" + " " * 300, "<think> \n\n"])
def test_an_open_tag_at_the_end_opens_the_thinking(rules, text):
    ids = rules.tokenizer.encode(text, add_special_tokens=False)
    assert rules.thinking_of(ids) == (True, ("<think>", "</think>"))


@pytest.mark.parametrize("text", ["a", " ", "<think>a", "think>", "<think></think>" + " " * 300])
def test_other_ends_do_not(rules, text):
    ids = rules.tokenizer.encode(text, add_special_tokens=False)
    assert rules.thinking_of(ids)[0] is False


def test_a_long_prompt_is_not_read_whole(rules, monkeypatch):
    lengths = []
    decode = Tokenizer.decode

    def counting(self, ids, skip_special_tokens=True):
        ids = list(ids)
        lengths.append(len(ids))
        return decode(self, ids, skip_special_tokens)

    monkeypatch.setattr(Tokenizer, "decode", counting)
    ids = rules.tokenizer.encode("word " * 700 + "<think>\n", add_special_tokens=False)
    assert rules.thinking_of(ids)[0]
    assert sum(lengths) < 100 < len(ids)
