"""moejet.tokenizer against transformers' AutoTokenizer, on tokenizers of every kind that the families publish."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RawTokenizer

from moejet.resolve import TINY_REASONER, resolve_model
from moejet.testing.byte_tokenizer import CHAT_TEMPLATE, write_tokenizer
from moejet.tokenizer import IncrementalDecoder, Tokenizer

transformers = pytest.importorskip("transformers")

TEXTS = [
    "",
    "a",
    " leading space",
    "The quick brown fox, and then the rest.\n\n  indented\ttab",
    "naïve café — “quotes” … 数学是有趣的 💡👩‍👩‍👧 ﷽",
    "<|user|>hi<think>\nx</think>",
    "1234567 * 89 = 0.5e-10",
    "\x00\x01\r\n",
]
CONVERSATIONS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "hi"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "2 + 2? 💡"},
        {"role": "assistant", "content": "<think>\neasy\n</think>\n\n4"},
        {"role": "user", "content": "  and  3 + 3?\n"},
    ],
]
SPECIAL = ["<s>", "</s>", "<unk>"]


def bytes_and_words() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A sentencepiece-style vocabulary: specials, byte tokens, letters, some merges with a leading metaspace."""
    vocab = {t: i for i, t in enumerate(["<unk>", "<s>", "</s>"])}
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    for letter in "▁abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,é":
        vocab[letter] = len(vocab)
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "a"), ("▁", "▁"), ("o", "x"), ("q", "u")]
    for left, right in merges:
        vocab[left + right] = len(vocab)
    return vocab, merges


def save(root: Path, raw: RawTokenizer, config: dict[str, Any]) -> None:
    raw.save(str(root / "tokenizer.json"))
    (root / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (root / "config.json").write_text(
        json.dumps({"model_type": "deepseek_v3", "eos_token_id": 1}), encoding="utf-8"
    )


def make_tiny(root: Path) -> None:
    write_tokenizer(root)
    (root / "config.json").write_text('{"model_type": "deepseek_v3", "eos_token_id": 1}')


def make_plain_byte_level(root: Path) -> None:
    """GLM's and Qwen's kind: no bos, no template processing."""
    write_tokenizer(root)
    raw = RawTokenizer.from_file(str(root / "tokenizer.json"))
    raw.post_processor = processors.ByteLevel(trim_offsets=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern=" ", behavior="merged_with_next"),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.normalizer = normalizers.NFC()
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eos|>"}
    save(root, raw, {**config, "pad_token": "<|end|>", "chat_template": CHAT_TEMPLATE})


def make_llama(root: Path) -> None:
    """Llama's kind: byte fallback, leading metaspace added on encoding and dropped on decoding."""
    vocab, merges = bytes_and_words()
    raw = RawTokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    raw.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement="▁", prepend_scheme="first", split=False
    )
    raw.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1, right=0),
        ]
    )
    raw.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    raw.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    token = {"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False}
    config = {
        "tokenizer_class": "LlamaTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": {"__type": "AddedToken", **token, "single_word": False},
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "chat_template": [{"name": "default", "template": CHAT_TEMPLATE}],
    }
    save(root, raw, config)


def make_metaspace(root: Path) -> None:
    """Metaspace as the decoder itself, without byte fallback."""
    vocab, merges = bytes_and_words()
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="always")
    raw.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="always")
    raw.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>"}
    save(root, raw, {**config, "chat_template": CHAT_TEMPLATE})


def make_embedded(root: Path) -> None:
    for file in resolve_model(TINY_REASONER).glob("*.json"):
        shutil.copy(file, root)


MAKERS: dict[str, Callable[[Path], None]] = {
    "embedded": make_embedded,
    "tiny": make_tiny,
    "plain_byte_level": make_plain_byte_level,
    "llama": make_llama,
    "metaspace": make_metaspace,
}


@pytest.fixture(scope="module", params=list(MAKERS))
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Any]:
    root = tmp_path_factory.mktemp(request.param)
    MAKERS[request.param](root)
    return Tokenizer.from_path(root), transformers.AutoTokenizer.from_pretrained(root)


def test_encodes_as_transformers(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    for text in TEXTS:
        for special in (True, False):
            expected = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, special) == expected, (text, special)
    assert ours.vocab_size == len(theirs)
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_id == theirs.eos_token_id


def test_decodes_as_transformers(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    rng = random.Random(0)
    cases = [ours.encode(text) for text in TEXTS]
    cases += [[rng.randrange(ours.vocab_size) for _ in range(40)] for _ in range(20)]
    for ids in cases:
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


def test_renders_as_transformers(pair: tuple[Tokenizer, Any]) -> None:
    ours, theirs = pair
    for messages in CONVERSATIONS:
        for add in (True, False):
            expected = theirs.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add
            )
            assert ours.apply_chat_template(messages, add_generation_prompt=add) == expected
            ids = theirs.apply_chat_template(messages, add_generation_prompt=add, return_dict=False)
            assert ours.encode(expected, add_special_tokens=False) == ids


@given(data=st.data())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_stream_equals_whole_decode(pair: tuple[Tokenizer, Any], data: st.DataObject) -> None:
    ours, _ = pair
    ids = st.lists(st.integers(-1 % (ours.vocab_size + 3), ours.vocab_size + 2), max_size=40)
    stream = data.draw(ids | ids.map(lambda v: [i % ours.vocab_size for i in v]))
    check_stream(ours, stream)


@given(text=st.text(max_size=40))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_stream_of_text(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, _ = pair
    check_stream(ours, ours.encode(text))


def check_stream(tokenizer: Tokenizer, ids: list[int]) -> None:
    for skip in (True, False):
        decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip)
        text = "".join(decoder.push(i) for i in ids) + decoder.flush()
        assert text == tokenizer.decode(ids, skip)


def test_random_ids_stream(pair: tuple[Tokenizer, Any]) -> None:
    ours, _ = pair
    rng = random.Random(1)
    for _ in range(200):
        check_stream(ours, [rng.randrange(ours.vocab_size) for _ in range(rng.randrange(60))])


def test_never_half_a_character(pair: tuple[Tokenizer, Any]) -> None:
    ours, _ = pair
    text = "a 数学💡é the 👩‍👩‍👧 end"
    if "\ufffd" in ours.decode(ours.encode(text)) or "数" not in ours.decode(ours.encode(text)):
        pytest.skip("this vocabulary cannot hold the text")
    decoder = IncrementalDecoder(ours)
    pieces = [decoder.push(i) for i in ours.encode(text)]
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces) + decoder.flush() == text


def test_unfinished_character_comes_out_at_the_end(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    tokenizer = Tokenizer.from_path(tmp_path)
    ids = tokenizer.encode("a💡", add_special_tokens=False)[:-1]
    decoder = IncrementalDecoder(tokenizer)
    assert [decoder.push(i) for i in ids] == ["a", "", "", ""]
    assert decoder.flush() == "\ufffd" == tokenizer.decode(ids)[1:]


def test_work_per_token_is_bounded(tmp_path: Path) -> None:
    make_llama(tmp_path)
    decoder = IncrementalDecoder(Tokenizer.from_path(tmp_path))
    ids = decoder._raw.encode("the quick ox " * 300, add_special_tokens=False).ids
    longest = 0
    for token in ids:
        decoder.push(token)
        longest = max(longest, len(decoder._context) + len(decoder._pending))
    assert longest <= 4


def test_a_vocabulary_is_written_out_once_for_all_decoders(tmp_path: Path) -> None:
    """It takes a third of a second for 128000 tokens, and every sample has a decoder."""
    make_tiny(tmp_path)
    tokenizer = Tokenizer.from_path(tmp_path)

    class Counted:
        num_copies = 0

        def __init__(self, raw: RawTokenizer):
            self._raw = raw

        def to_str(self) -> str:
            self.num_copies += 1
            return self._raw.to_str()

        def __getattr__(self, name: str) -> Any:
            return getattr(self._raw, name)

    counted = Counted(tokenizer.raw)
    tokenizer.raw = counted  # type: ignore[assignment]
    for _ in range(8):
        IncrementalDecoder(tokenizer)
    assert counted.num_copies == 1


def deepseek_v3_files(root: Path, **config: Any) -> None:
    """As DeepSeek-V3 is published: LlamaTokenizerFast over a byte-level tokenizer.json without template."""
    write_tokenizer(root)
    raw = RawTokenizer.from_file(str(root / "tokenizer.json"))
    raw.post_processor = processors.ByteLevel(trim_offsets=False)
    settings = {
        "tokenizer_class": "LlamaTokenizerFast",
        "bos_token": {"__type": "AddedToken", "content": "<|bos|>"},
        "eos_token": {"__type": "AddedToken", "content": "<|eos|>"},
        "chat_template": CHAT_TEMPLATE,
    }
    save(root, raw, {**settings, **config})


def test_add_bos_token_is_honoured(tmp_path: Path) -> None:
    deepseek_v3_files(tmp_path, add_bos_token=True, add_eos_token=False)
    ours = Tokenizer.from_path(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    theirs.add_bos_token = True  # what version 4 did on its own
    for text in TEXTS:
        expected = theirs(text)["input_ids"]
        assert ours.encode(text) == expected
        assert ours.encode(text, False) == expected[1:]


def test_add_eos_token_is_honoured(tmp_path: Path) -> None:
    deepseek_v3_files(tmp_path, add_bos_token=False, add_eos_token=True)
    assert Tokenizer.from_path(tmp_path).encode("a")[-1] == 1
    assert Tokenizer.from_path(tmp_path).encode("a")[0] != 0


@pytest.mark.parametrize("maker", [make_tiny, deepseek_v3_files])
def test_no_second_bos(tmp_path: Path, maker: Callable[[Path], None]) -> None:
    maker(tmp_path)
    tokenizer = Tokenizer.from_path(tmp_path)
    prompt = tokenizer.apply_chat_template(CONVERSATIONS[0])
    assert prompt.startswith("<|bos|>")
    assert tokenizer.encode(prompt).count(0) == 1
    assert tokenizer.encode(prompt) == tokenizer.encode(prompt, add_special_tokens=False)


def test_think_tags_survive_decoding(tmp_path: Path) -> None:
    make_tiny(tmp_path)
    tokenizer = Tokenizer.from_path(tmp_path)
    ids = tokenizer.encode("<|user|><think>\na</think>b")
    assert tokenizer.decode(ids) == "<think>\na</think>b"
    assert tokenizer.decode(ids, skip_special_tokens=False).startswith("<|bos|><|user|>")
    assert tokenizer.think_tags == ("<think>", "</think>")
    assert tokenizer.token_to_id("</think>") == 6


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config.json": {"eos_token_id": [3, 4]}}, (3, 4, 1)),
        ({"generation_config.json": {"eos_token_id": 4}}, (4, 1)),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": [1, 2]}}, (1, 2)),
        ({"config.json": {"text_config": {"eos_token_id": 2}}}, (2, 1)),
        ({"config.json": {}}, (1,)),
        ({"config.json": {"eos_token_id": "x"}}, (1,)),
    ],
)
def test_eos_ids(
    tmp_path: Path, files: dict[str, dict[str, Any]], expected: tuple[int, ...]
) -> None:
    make_tiny(tmp_path)
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    assert Tokenizer.from_path(tmp_path).eos_token_ids == expected


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    make_tiny(tmp_path)
    return tmp_path


def test_missing_tokenizer_json(broken: Path) -> None:
    (broken / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"no tokenizer\.json; supported: .*save_pretrained"):
        Tokenizer.from_path(broken)
    (broken / "tokenizer.model").touch()
    with pytest.raises(ValueError, match=r"found tokenizer\.model, which is not read"):
        Tokenizer.from_path(broken)


def test_broken_files(broken: Path) -> None:
    (broken / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        Tokenizer.from_path(broken)
    (broken / "tokenizer_config.json").write_text('{"chat_template": [{"name": "x"}]}')
    with pytest.raises(ValueError, match="chat_template must be a string or a list"):
        Tokenizer.from_path(broken)
    (broken / "tokenizer_config.json").write_text('{"bos_token": "<nope>"}')
    with pytest.raises(ValueError, match=r"bos_token='<nope>' is not in tokenizer\.json"):
        Tokenizer.from_path(broken)
    (broken / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_path(broken)


def test_added_tokens_of_the_settings(broken: Path) -> None:
    config = json.loads((broken / "tokenizer_config.json").read_text())
    size = Tokenizer.from_path(broken).vocab_size
    config["added_tokens_decoder"] = {
        "0": {"content": "<|bos|>", "special": True},
        str(size): {"content": "<|extra|>", "special": True, "normalized": False},
    }
    (broken / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = Tokenizer.from_path(broken)
    assert tokenizer.encode("a<|extra|>", False)[-1] == size
    assert tokenizer.decode([size]) == ""
    config["added_tokens_decoder"] = {str(size + 5): {"content": "<|extra|>", "special": True}}
    (broken / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="do not belong together"):
        Tokenizer.from_path(broken)


def test_bad_text(broken: Path) -> None:
    tokenizer = Tokenizer.from_path(broken)
    with pytest.raises(ValueError, match="lone surrogate at position 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(ValueError, match="text must be a string"):
        tokenizer.encode(b"a")  # type: ignore[arg-type]


def test_truncation_and_padding_of_the_file_are_ignored(broken: Path) -> None:
    raw = RawTokenizer.from_file(str(broken / "tokenizer.json"))
    raw.enable_truncation(4)
    raw.enable_padding(length=64)
    raw.save(str(broken / "tokenizer.json"))
    assert len(Tokenizer.from_path(broken).encode("xyzxyzxyz")) == 10
