"""moejet.tiktoken_files against tiktoken itself, on vocabularies made here."""

from __future__ import annotations

import base64
import json
import random
import sys
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as RawTokenizer

from moejet.tiktoken_files import WORD_PATTERN, byte_of_char, load_tiktoken
from moejet.tokenizer import IncrementalDecoder, Tokenizer

tiktoken = pytest.importorskip("tiktoken")
ROOT = Path(__file__).resolve().parent.parent

CHINESE = (
    "混合专家模型在每一层只激活少数专家，因此计算量远小于参数量。数学是有趣的，推理需要一步一步来。"
    "北京市的天气今天很好，我们去公园散步。机器学习模型的训练需要大量的数据和计算资源。"
)
# Named special tokens by their place after the ranks, as Kimi's tokenizer_config.json names them.
NAMED = {
    **{0: "[BOS]", 1: "[EOS]", 2: "<|im_end|>", 3: "<|im_user|>", 4: "<|im_assistant|>"},
    **{9: "[EOT]", 10: "<|im_system|>", 17: "<|im_middle|>", 254: "[UNK]", 255: "[PAD]"},
}
THINK = {22: "<think>", 23: "</think>"}
TEXTS = [
    "",
    "The quick brown fox doesn't jump; it'll WE'RE i'M 'S 'ſ",
    "def f(x: int) -> int:\n    return x ** 2 + 1  # comment\n\n\n\tif True:\r\n\t\tpass",
    "1234567890 3.14159 ١٢٣٤ ½ Ⅷ 1e-10",
    "中文English混合 汉字abc你好，世界！カタカナ ひらがな 한국어 々〇",
    "   leading and trailing   \n \n\t \r\n  ",
    " " * 50 + "\n" * 20 + "\u00a0\u2003\u3000x\u0085y\u200b",
    "naïve café e\u0301 Ǆ ǅ ʰ ß ſ K — “quotes” … 💡👩‍👩‍👧 ﷽ \x00\x01",
    "aaaaaaaaaaaaaaaaa bbbbbbbb ========== -------- ababababab",
    "[BOS]<|im_user|>user<|im_middle|>hi<think>x</think><|im_end|>[EOT]",
]


def corpus() -> list[str]:
    sources = sorted((ROOT / "engine/moejet").glob("*.py"))[:6]
    code = [file.read_text(encoding="utf-8") for file in sources]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    return [*code, readme, *[CHINESE] * 3, "\n\n\n        \t\t x = 1\n" * 9, *TEXTS]


def train_ranks(size: int) -> dict[bytes, int]:
    """A byte-level BPE vocabulary in the order in which training found its tokens."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    raw.train_from_iterator(corpus(), trainer)
    table = byte_of_char()
    return {bytes(table[c] for c in token): i for token, i in raw.get_vocab().items()}


def write_files(root: Path, ranks: dict[bytes, int], **changes: Any) -> Path:
    lines = [
        b"%s %d" % (base64.b64encode(t), r) for t, r in sorted(ranks.items(), key=lambda p: p[1])
    ]
    (root / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(len(ranks) + offset): {"content": token, "special": offset in NAMED, **flags}
        for offset, token in {**NAMED, **THINK}.items()
    }
    config = {
        "added_tokens_decoder": added,
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "tokenizer_class": "TikTokenTokenizer",
        "bos_token": "[BOS]",
        "eos_token": "<|im_end|>",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        **changes,
    }
    (root / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (root / "config.json").write_text('{"model_type": "kimi_k2", "eos_token_id": 1}')
    return root


def reference(ranks: dict[bytes, int]) -> Any:
    """What the models' own code builds from the same files."""
    named = {**NAMED, **THINK}
    special = {
        named.get(i, f"<|reserved_token_{len(ranks) + i}|>"): len(ranks) + i for i in range(256)
    }
    return tiktoken.Encoding(
        "kimi", pat_str=WORD_PATTERN, mergeable_ranks=ranks, special_tokens=special
    )


@pytest.fixture(scope="module", params=[300, 1500])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    ranks = train_ranks(request.param)
    root = write_files(tmp_path_factory.mktemp("kimi"), ranks)
    return Tokenizer.from_path(root), reference(ranks)


def check(pair: Any, text: str) -> None:
    ours, theirs = pair
    ids = ours.encode(text)
    assert ids == theirs.encode(text, allowed_special="all")
    assert ours.decode(ids, skip_special_tokens=False) == text
    decoder = IncrementalDecoder(ours, skip_special_tokens=False)
    assert "".join(decoder.push(i) for i in ids) + decoder.flush() == text


@pytest.mark.parametrize("text", TEXTS)
def test_encoding_equals_tiktoken(pair: Any, text: str) -> None:
    check(pair, text)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=60))
def test_any_text(pair: Any, text: str) -> None:
    check(pair, text)


def test_mixtures_of_everything(pair: Any) -> None:
    choice = random.Random(0)
    pieces = [*TEXTS, CHINESE, "'s", "'LL", " ", "\n", "\r\n", "\t", "1", "12", "a", "A", "é", "字"]
    pieces += ["<|reserved_token_", "<|im_", "|>", "aa", "ab", "ba", "  "]
    for _ in range(300):
        parts = []
        for _ in range(choice.randrange(1, 12)):
            piece = choice.choice(pieces)
            start = choice.randrange(len(piece) + 1)
            parts.append(piece[start : start + choice.randrange(1, 9)])
        check(pair, "".join(parts))
    for _ in range(300):
        check(pair, "".join(choice.choices("aab\n  e", k=choice.randrange(1, 40))))


def test_ranks_that_no_training_would_give(tmp_path: Path) -> None:
    choice = random.Random(1)
    words = {bytes(choice.choices(b"ab ", k=choice.randrange(2, 6))) for _ in range(60)}
    tokens = [*(bytes([i]) for i in range(256)), *sorted(words)]
    choice.shuffle(tokens)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    pair = Tokenizer.from_path(write_files(tmp_path, ranks)), reference(ranks)
    different = 0
    for _ in range(1000):
        text = "".join(choice.choices("ab ", k=choice.randrange(1, 14)))
        different += pair[0].encode(text) != pair[1].encode(text)
        assert pair[0].decode(pair[0].encode(text)) == text
    # Neighbours "a", "ba", "b" may make "aba" ... in two overlapping ways; which comes first is the only difference.
    assert different < 20


def test_words_are_cut_alike_around_every_character() -> None:
    regex = pytest.importorskip("regex")
    pattern = regex.compile(WORD_PATTERN, regex.V1)
    splitter = pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated")
    for code in range(sys.maxunicode + 1):
        c = chr(code)
        # Characters newer than this Python's tables may be known to one library and not to the other.
        if unicodedata.category(c) in ("Cn", "Cs", "Co") or 0xAC00 < code < 0xD700:
            continue
        if 0x4E10 < code < 0x9FA0 or (code > 0x17000 and code % 16):
            continue
        text = f"a{c}B{c}1{c}{c} {c}'{c}中{c}\n"
        assert [part for part, _ in splitter.pre_tokenize_str(text)] == pattern.findall(text), code


def test_special_tokens(pair: Any) -> None:
    ours, theirs = pair
    base = theirs.n_vocab - 256
    assert ours.vocab_size == base + 256
    assert (ours.bos_token_id, ours.eos_token_id) == (base, base + 2)
    assert ours.eos_token_ids == (1, base + 2)
    assert ours.token_to_id(f"<|reserved_token_{base + 100}|>") == base + 100
    assert ours.think_tags == ("<think>", "</think>")
    ids = ours.encode("<|im_user|>hi<think>no</think>")
    assert ids[0] == base + 3
    assert ours.decode(ids) == "hi<think>no</think>"
    assert ours.special_token_ids == frozenset(range(base, base + 256)) - {base + 22, base + 23}


def test_a_vocabulary_of_published_size_loads_fast(tmp_path: Path) -> None:
    choice = random.Random(2)
    tokens = [bytes([i]) for i in range(256)]
    known = set(tokens)
    letters = [letter.encode() for letter in "etaoinsrhldc "]
    while len(tokens) < 163_584:  # lengths and numbers of splits about those of a real vocabulary
        word = tokens[choice.randrange(len(tokens))] + choice.choice(letters)
        if word not in known and len(word) <= 12:
            known.add(word)
            tokens.append(word)
    root = write_files(tmp_path, {token: rank for rank, token in enumerate(tokens)})
    start = time.process_time()  # not disturbed by what else runs here
    tokenizer = Tokenizer.from_path(root)
    assert tokenizer.vocab_size == 163_840
    assert time.process_time() - start < 20  # usually below 2; anything quadratic takes minutes


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "every byte and every rank once"),
        (b"IQ== 0\nIg== x\n", "line 2 is not a token"),
        (b"IQ== 0\n???? 1\n", "line 2 is not a token"),
        (b"IQ==\n", "line 1 is not a token"),
        (b"IQ== 0\nIg== 1\n", "every byte and every rank once"),
    ],
)
def test_damaged_files(tmp_path: Path, content: bytes, reason: str) -> None:
    file = tmp_path / "tiktoken.model"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=reason):
        load_tiktoken(file, {"tokenizer_class": "TikTokenTokenizer"})


def test_files_that_are_not_understood(tmp_path: Path) -> None:
    ranks = {bytes([i]): i for i in range(256)}
    write_files(tmp_path, ranks, tokenizer_class="QWenTokenizer")
    with pytest.raises(ValueError, match="tokenizer_class='QWenTokenizer'; of the models with"):
        Tokenizer.from_path(tmp_path)
    write_files(tmp_path, ranks, added_tokens_decoder={"300": {"content": "a", "special": True}})
    with pytest.raises(ValueError, match="gives the id 300 to 'a', which"):
        Tokenizer.from_path(tmp_path)
    for gap in ({**ranks, b"ab": 300}, {**{k: v for k, v in ranks.items() if v}, b"ab": 0}):
        write_files(tmp_path, gap)
        with pytest.raises(ValueError, match="every byte and every rank once"):
            Tokenizer.from_path(tmp_path)
    # tokenizer.json wins where both are there.
    write_files(tmp_path, ranks)
    raw = RawTokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    raw.decoder = decoders.ByteLevel()
    raw.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"\[BOS\]|does not continue"):
        Tokenizer.from_path(tmp_path)
