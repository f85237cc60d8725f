"""moejet.weights.gguf_tokenizer: equal to the tokenizer.json that the metadata was made from, on any text."""

from __future__ import annotations

import json
import random
import shutil
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer

from moejet.resolve import resolve_model
from moejet.testing.checkpoints import hf_config, tiny_checkpoint
from moejet.testing.gguf_files import _vocabulary, write_gguf
from moejet.tokenizer import IncrementalDecoder, Tokenizer
from moejet.weights.gguf import GgufFiles
from moejet.weights.gguf_tokenizer import _CASED, _pre_tokenizer, gguf_tokenizer

TEXTS = [
    "",
    " ",
    "the cat and the hat",
    "  leading,  double   and trailing  ",
    "line\nbreaks\r\n\n\ttabs\n ",
    "I'll say it's 12345 or 3.14159, won't I? DON'T",
    "def f(x):\n    return x**2  # comment",
    "Grüße, Ålesund, ΑΒΓ, привет, 你好世界 한국어 かな カナ",
    "👍🏽 e\u0301 \u00a0 \u200b \ufeff \u2028 \x00 \x7f",
    "<think>plan</think><|eos|><|user|>hi<|assistant|>",
    "[PAD300] <|bos|> <|bos|>",
]
RANGES = [(0x20, 0x7E), (0xA0, 0x24F), (0x370, 0x52F), (0x3000, 0x30FF), (0x4E00, 0x4FFF)]
RANGES += [(0xAC00, 0xAD00), (0x1F300, 0x1F64F), (0x0, 0x1F), (0x2000, 0x206F), (0xFF00, 0xFFEF)]


def random_texts(count: int, seed: int) -> list[str]:
    rng = random.Random(seed)
    words = ["the", " and", "<think>", "<|user|>", "\n\n", "  ", "'s", "42", "...", "ing"]
    texts = []
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(1, 24)):
            if rng.random() < 0.4:
                parts.append(rng.choice(words))
            else:
                parts.append(chr(rng.randint(*rng.choice(RANGES))))
        texts.append("".join(parts))
    return texts


def same(ours: Tokenizer, theirs: Tokenizer, texts: list[str]) -> None:
    assert ours.bos_token_id == theirs.bos_token_id
    assert ours.eos_token_id == theirs.eos_token_id
    assert ours.eos_token_ids == theirs.eos_token_ids
    assert ours.vocab_size == theirs.vocab_size
    assert ours.special_token_ids == theirs.special_token_ids
    assert ours.think_tags == theirs.think_tags
    assert ours.chat_template == theirs.chat_template
    for text in texts:
        for add_special_tokens in (True, False):
            ids = theirs.encode(text, add_special_tokens)
            assert ours.encode(text, add_special_tokens) == ids, text
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.decode(ids, skip), text
        decoder = IncrementalDecoder(ours)
        streamed = "".join(decoder.push(i) for i in ids) + decoder.flush()
        expected = IncrementalDecoder(theirs)
        assert streamed == "".join(expected.push(i) for i in ids) + expected.flush()


def test_a_tiny_tokenizer(tmp_path: Path) -> None:
    root = tiny_checkpoint(tmp_path / "hf", "glm4_moe_lite", num_hidden_layers=1)
    file = write_gguf(root, tmp_path / "m.gguf")
    ours, theirs = gguf_tokenizer(GgufFiles.open(file).metadata), Tokenizer.from_path(root)
    assert ours.eos_token_ids == (1, 4)
    same(ours, theirs, TEXTS + random_texts(400, 1))
    messages = [{"role": "user", "content": "hi"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages)
    # Ids without a token are nothing, not their made-up text.
    assert ours.decode([319]) == theirs.decode([319]) == ""


def metadata_of(root: Path, pre_tokenizer: str = "gpt-2", **changes: Any) -> dict[str, Any]:
    """The vocabulary's metadata as it would be read back from a file."""
    import numpy as np

    config = (
        json.loads((root / "config.json").read_text()) if (root / "config.json").is_file() else {}
    )
    config = {**hf_config("deepseek_v3"), **config}
    made = {key: value for key, (value, _) in _vocabulary(root, config, pre_tokenizer).items()}
    made["tokenizer.ggml.token_type"] = np.array(made["tokenizer.ggml.token_type"], np.int32)
    made |= {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return {key: value for key, value in made.items() if value is not None}


OTHER = "[^\\r\\n\\p{L}\\p{N}]?"
UPPER, LOWER = (
    "[\\p{Lu}\\p{Lt}\\p{Lm}\\p{Lo}\\p{M}&&[^\\p{Han}]]",
    "[\\p{Ll}\\p{Lm}\\p{Lo}\\p{M}&&[^\\p{Han}]]",
)
KIMI_K2 = "|".join(
    [
        "[\\p{Han}]+",
        f"{OTHER}{UPPER}*{LOWER}+(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        f"{OTHER}{UPPER}+{LOWER}*(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        "\\p{N}{1,3}",
        " ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*",
        "\\s*[\\r\\n]+",
        "\\s+(?!\\S)",
        "\\s+",
    ]
)


def test_whole_pieces_without_merges(tmp_path: Path) -> None:
    """The embedded model's vocabulary, whose words need no merges, cut as Kimi-K2's is."""
    root = resolve_model("tiny-reasoner")
    for file in root.glob("*.json"):
        shutil.copy(file, tmp_path)
    raw = json.loads((root / "tokenizer.json").read_text(encoding="utf-8"))
    raw["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = KIMI_K2
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw), encoding="utf-8")
    theirs = Tokenizer.from_path(tmp_path)
    adds_bos = theirs.encode("a")[:1] == [theirs.bos_token_id]
    ours = gguf_tokenizer(metadata_of(tmp_path, "kimi-k2", add_bos_token=adds_bos))
    same(ours, theirs, TEXTS + random_texts(400, 2))


DEEPSEEK_V3 = [
    "\\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
]
GLM4 = [
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
]


@pytest.mark.parametrize(
    ("name", "patterns"), [("deepseek-v3", DEEPSEEK_V3), ("glm4", GLM4), ("gpt-2", None)]
)
def test_a_trained_tokenizer(name: str, patterns: list[str] | None, tmp_path: Path) -> None:
    """A BPE with a thousand merges, cut as the published tokenizer.json of the name says."""
    raw = RawTokenizer(models.BPE())
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=patterns is None)
    splits = [pre_tokenizers.Split(Regex(p), "isolated") for p in patterns or []]
    raw.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    raw.decoder = decoders.ByteLevel()
    special = [
        AddedToken(t, special=True, normalized=False) for t in ("<|bos|>", "<|eos|>", "<|user|>")
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    source = Path(__file__).read_text(encoding="utf-8")
    raw.train_from_iterator([source, *TEXTS * 20, *random_texts(300, 3)], trainer)
    raw.add_tokens(
        [AddedToken(t, special=False, normalized=False) for t in ("<think>", "</think>")]
    )
    raw.save(str(tmp_path / "tokenizer.json"))
    settings = {"bos_token": "<|bos|>", "eos_token": "<|eos|>", "add_bos_token": True}
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": "{{ x }}"})
    )
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 1600, "eos_token_id": 1}))
    ours = gguf_tokenizer(metadata_of(tmp_path, name))
    same(ours, Tokenizer.from_path(tmp_path), [source, *TEXTS, *random_texts(400, 4)])


def pieces(name: str, text: str) -> list[str]:
    found = _pre_tokenizer(name).pre_tokenize_str(text)
    return [text[first:last] for _, (first, last) in found]


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        # Digits in threes or one by one, Han apart or with letters. DeepSeek-V2's classes overlap (":-~" holds the
        # ASCII letters, its last one U+0800-U+4E00) and each cuts what the one before left: that is published.
        ("deepseek-v3", "a 12345 你好x", ["a", " ", "123", "45", " ", "你好", "x"]),
        ("deepseek-v3", "f(x).y\n\n z", ["f", "(x", ").", "y", "\n\n", " z"]),
        (
            "deepseek-llm",
            "ab 123\n!? 한글x",
            ["ab", " ", "1", "2", "3", "\n", "!?", " ", "한글", "x"],
        ),
        ("deepseek-llm", "Ωmega ẞ K a", ["Ω", "mega", " ", "ẞ", " K", " a"]),
        ("deepseek-coder", "x = 10;\r\n", ["x", " = ", "1", "0", ";", "\r", "\n"]),
        (
            "kimi-k2",
            "HelloWorld's 你好ab 1234",
            ["Hello", "World's", " ", "你好", "ab", " ", "123", "4"],
        ),
        ("glm4", "It's 12345 déjà", ["It", "'s", " ", "123", "45", " déjà"]),
        ("gpt-2", "It's 12345 déjà", ["It", "'s", " 12345", " déjà"]),
    ],
)
def test_pieces(name: str, text: str, expected: list[str]) -> None:
    assert pieces(name, text) == expected


@pytest.mark.parametrize(
    "name", ["deepseek-llm", "deepseek-coder", "deepseek-v3", "kimi-k2", "glm4", "chatglm-bpe"]
)
def test_pieces_lose_nothing(name: str) -> None:
    for text in TEXTS + random_texts(300, 5):
        assert "".join(pieces(name, text)) == text


def test_letters_of_deepseek_v2() -> None:
    """Cased letters only, in order; those that composition (NFC) would have changed in a copied text are there."""
    ranges = [tuple(int(c, 16) for c in item.split("-")) for item in _CASED.split()]
    assert ranges == sorted(ranges)
    letters = {code for r in ranges for code in range(r[0], r[-1] + 1)}
    assert {unicodedata.category(chr(code)) for code in letters} <= {"Lu", "Ll", "Lt", "Cn"}
    assert letters >= {0x1F7D, 0x1FBE, 0x1FD3, 0x1FDB, 0x2126, 0x212A}


def test_settings(tmp_path: Path) -> None:
    root = tiny_checkpoint(tmp_path, "deepseek_v3", num_hidden_layers=1)
    plain = gguf_tokenizer(metadata_of(root, add_bos_token=False))
    assert plain.encode("a") == plain.encode("a", add_special_tokens=False)
    both = gguf_tokenizer(metadata_of(root, add_eos_token=True))
    assert both.encode("a")[0] == 0
    assert both.encode("a")[-1] == 1
    silent = gguf_tokenizer(metadata_of(root, bos_token_id=None, add_bos_token=True))
    assert silent.bos_token_id is None
    untyped = gguf_tokenizer(metadata_of(root, token_type=None))
    assert untyped.special_token_ids == frozenset()
    named = metadata_of(root) | {"tokenizer.chat_template.tool_use": "{{ 'tools' }}"}
    rendered = gguf_tokenizer(named).apply_chat_template(
        [{"role": "user", "content": ""}], tools=[{}]
    )
    assert rendered == "tools"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "llama"}, r"tokenizer\.ggml\.model='llama' is not supported; supported: 'gpt2'"),
        ({"model": None}, r"tokenizer\.ggml\.model=None"),
        (
            {"pre": "tekken"},
            r"tokenizer\.ggml\.pre='tekken' is not supported; supported: chatglm-bpe",
        ),
        ({"pre": None}, r"tokenizer\.ggml\.pre=None"),
        ({"tokens": None}, r"lacks tokenizer\.ggml\.tokens"),
        ({"tokens": [1, 2]}, r"lacks tokenizer\.ggml\.tokens"),
        ({"token_type": [1, 2]}, "one integer for each of the 320 tokens"),
        ({"merges": None}, r"lacks tokenizer\.ggml\.merges"),
        ({"merges": ["ab"]}, "entry 0, 'ab', does not join"),
        ({"merges": ["a b", "no such"]}, "'a b', does not join two tokens to a third"),
        ({"bos_token_id": 320}, r"bos_token_id: 320 is no id of the 320 tokens"),
        ({"eot_token_id": -1}, r"-1 is no id of the 320 tokens"),
    ],
)
def test_refusals(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    root = tiny_checkpoint(tmp_path, "deepseek_v3", num_hidden_layers=1)
    with pytest.raises(ValueError, match=message):
        gguf_tokenizer(metadata_of(root, **changes))


def test_a_token_twice(tmp_path: Path) -> None:
    root = tiny_checkpoint(tmp_path, "deepseek_v3", num_hidden_layers=1)
    tokens = metadata_of(root)["tokenizer.ggml.tokens"]
    tokens[200] = tokens[100]
    with pytest.raises(ValueError, match="twice"):
        gguf_tokenizer(metadata_of(root, tokens=tokens))
