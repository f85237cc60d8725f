"""Moonlight's and Kimi's tokenizer files (tiktoken.model) as a `tokenizers` Tokenizer, without running remote code.

tiktoken.model holds a line per token, its bytes in base64 and its rank. Rank-based BPE merges, of all neighbours whose
bytes together are a token, those of the lowest rank; `tokenizers` merges listed pairs in the order of the list. The
two agree if the list holds every way to split every token into two tokens, in the order of ranks, and if a whole word
that is a token is taken as it is. How words are cut and how many special tokens follow the ranks is not in the files
but in the models' tokenization_kimi.py and tokenization_moonshot.py; both use the values below.

One difference: that code also cuts runs of more than 25,000 characters without (or of) white space.
"""

from __future__ import annotations

import base64
import binascii
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

FILE_NAME = "tiktoken.model"
# The class in the models' own code whose behaviour is rebuilt here.
TOKENIZER_CLASS = "TikTokenTokenizer"
NUM_SPECIAL = 256

_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
WORD_PATTERN = "|".join(
    [
        r"[\p{Han}]+",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


def load_tiktoken(file: Path, settings: dict[str, Any]) -> RawTokenizer:
    """The tokenizer of `file`; settings: the content of tokenizer_config.json beside it.

    Raises ValueError if the file is damaged, or if its words are cut in a way that is not known here.
    """
    name = settings.get("tokenizer_class")
    if name != TOKENIZER_CLASS:
        raise ValueError(
            f"{file.parent / 'tokenizer_config.json'} has tokenizer_class={name!r}; of the models with "
            f"{FILE_NAME}, only those with {TOKENIZER_CLASS!r} (Moonlight, Kimi) are known: save the "
            "tokenizer as tokenizer.json with transformers"
        )
    tokens = _read_tokens(file)
    vocab = {token: rank for rank, token in enumerate(tokens)}
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=_merges(tokens, vocab), ignore_merges=True))
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    raw.decoder = decoders.ByteLevel()
    _add_special_tokens(raw, len(tokens), settings.get("added_tokens_decoder"), file)
    return raw


@lru_cache(maxsize=1)
def byte_of_char() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the others for U+0100 and up, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in set(printable)]
    table = {chr(b): b for b in printable}
    table.update({chr(0x100 + i): b for i, b in enumerate(others)})
    return table


def _read_tokens(file: Path) -> list[str]:
    """Tokens by rank, written in GPT-2's alphabet."""
    alphabet = {byte: char for char, byte in byte_of_char().items()}
    by_rank: dict[int, str] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            encoded, rank = line.split()
            token = base64.b64decode(encoded, validate=True).decode("latin-1").translate(alphabet)
            by_rank[int(rank)] = token
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"{file}, line {number} is not a token in base64 and a rank ({error}): download it "
                "again"
            ) from error
    tokens = [token for _, token in sorted(by_rank.items())]
    is_whole = bool(tokens) and max(by_rank) == len(tokens) - 1 and min(by_rank) == 0
    if not is_whole or len(set(tokens)) != len(tokens) or not set(alphabet.values()) <= set(tokens):
        raise ValueError(f"{file} does not give every byte and every rank once: download it again")
    return tokens


def _merges(tokens: list[str], vocab: dict[str, int]) -> list[tuple[str, str]]:
    merges = []
    for token in tokens:
        for cut in range(1, len(token)):
            if (left := token[:cut]) in vocab and (right := token[cut:]) in vocab:
                merges.append((left, right))
    return merges


def _add_special_tokens(raw: RawTokenizer, first: int, declared: Any, file: Path) -> None:
    """The special tokens after the ranks; those that the settings do not name have names of their id."""
    entries = {int(key): entry for key, entry in (declared or {}).items()}
    added = []
    for token_id in range(first, max([first + NUM_SPECIAL - 1, *entries]) + 1):
        entry = entries.get(token_id, {"content": f"<|reserved_token_{token_id}|>"})
        flags = {k: bool(entry[k]) for k in ("lstrip", "rstrip", "normalized") if k in entry}
        is_special = bool(entry.get("special", True))
        flags.setdefault("normalized", False)
        added.append((is_special, AddedToken(entry["content"], special=is_special, **flags)))
    for is_special, group in groupby(added, key=lambda pair: pair[0]):
        (raw.add_special_tokens if is_special else raw.add_tokens)([token for _, token in group])
    for token_id, (_, token) in enumerate(added, first):
        if raw.token_to_id(token.content) != token_id:
            raise ValueError(
                f"{file.parent / 'tokenizer_config.json'} gives the id {token_id} to "
                f"{token.content!r}, which {FILE_NAME} has already: the files do not belong together"
            )
