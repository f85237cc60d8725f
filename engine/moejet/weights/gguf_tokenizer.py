"""The tokenizer that a GGUF file carries in its metadata, as the engine's Tokenizer.

tokenizer.ggml.tokens are the vocabulary in id order, byte-level as in GPT-2 (tokenizer.ggml.model is "gpt2"), merges
lists the pairs in order of rank as "left right", token_type tells ordinary tokens from control and user-defined ones.
How text is cut before merging is not stored, only named (tokenizer.ggml.pre): `_SPLITS` has the expressions behind the
names that models of this architecture use, as their own tokenizer.json files or tiktoken patterns give them.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as RawTokenizer

from moejet.tiktoken_files import WORD_PATTERN
from moejet.tokenizer import Tokenizer
from moejet.weights.gguf_model import eos_token_ids

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_KEY = "tokenizer.ggml."
_NAMED = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "sep_token": "seperator_token_id",
    "pad_token": "padding_token_id",
    "mask_token": "mask_token_id",
}
_TEMPLATE = re.compile(r"tokenizer\.chat_template\.(?P<name>[^.]+)")

# Letters of bicameral scripts as DeepSeek-V2's tokenizer.json lists them: "from-to" code points.
_CASED = (
    "41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376-377 37b-37d 37f 386 388-38a 38c "
    "38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd 1c90-1cba 1cbd-1cbf 1d00-1d2b "
    "1d6b-1d77 1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 "
    "1fb6-1fbc 1fbe 1fc2-1fc4 1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 "
    "2115 2119-211d 2124 2126 2128 212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183-2184 2c00-2c7b "
    "2c7e-2ce4 2ceb-2cee 2cf2-2cf3 a640-a66d a680-a69b a722-a76f a771-a787 a78b-a78e ab70-abbf fb00-fb06 "
    "fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3 104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df "
    "1e900-1e943"
)
_CJK = r"[\x{4e00}-\x{9fa5}\x{0800}-\x{4e00}\x{ac00}-\x{d7ff}]+"
_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LINES_AND_SPACE = r"\s*[\r\n]+|\s+(?!\S)|\s+"


def _cased_letters() -> str:
    ranges = []
    for item in _CASED.split():
        first, _, last = item.partition("-")
        ranges.append(rf"\x{{{first}}}" + (rf"-\x{{{last}}}" if last else ""))
    return f"[{''.join(ranges)}]"


def _deepseek_v2() -> list[Any]:
    return [
        r"[\r\n]",
        rf"\s?{_cased_letters()}+",
        r"\s?[!-/:-~\x{ff01}-\x{ff0f}\x{ff1a}-\x{ff5e}\x{2018}-\x{201f}\x{3000}-\x{3002}]+",
        r"\s+$",
        _CJK,
        pre_tokenizers.Digits(individual_digits=True),
    ]


def _deepseek_coder() -> list[Any]:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, digits]


def _deepseek_v3() -> list[Any]:
    symbols = r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~]"
    return [
        r"\p{N}{1,3}",
        r"[\x{4e00}-\x{9fa5}\x{3040}-\x{309f}\x{30a0}-\x{30ff}]+",
        rf"{symbols}[A-Za-z]+|[^\r\n\p{{L}}\p{{P}}\p{{S}}]?[\p{{L}}\p{{M}}]+"
        rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_LINES_AND_SPACE}",
    ]


def _kimi_k2() -> list[Any]:
    return [WORD_PATTERN]


def _glm4() -> list[Any]:
    return [
        rf"{_CONTRACTION}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
        rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_LINES_AND_SPACE}"
    ]


# Name -> expressions that isolate their matches one after the other; None: GPT-2's own.
_SPLITS: dict[str, Any] = {
    "gpt-2": None,
    "deepseek-llm": _deepseek_v2,
    "deepseek-coder": _deepseek_coder,
    "deepseek-v3": _deepseek_v3,
    "joyai-llm": _deepseek_v3,
    "kimi-k2": _kimi_k2,
    "glm4": _glm4,
    "chatglm-bpe": _glm4,
}
# tiktoken looks a whole piece up before it merges.
_WHOLE_PIECES_FIRST = ("kimi-k2",)


def gguf_tokenizer(metadata: dict[str, Any]) -> Tokenizer:
    """Builds the tokenizer; ValueError names the key if it is missing, malformed or of a kind that is not supported."""
    kind = metadata.get(f"{_KEY}model")
    if kind != "gpt2":
        raise ValueError(
            f"{_KEY}model={kind!r} is not supported; supported: 'gpt2' (byte-level BPE)"
        )
    tokens = _strings(metadata, "tokens")
    types = _token_types(metadata, len(tokens))
    pre = metadata.get(f"{_KEY}pre")
    if not isinstance(pre, str) or pre not in _SPLITS:
        raise ValueError(
            f"{_KEY}pre={pre!r} is not supported; supported: {', '.join(sorted(_SPLITS))}"
        )
    raw = RawTokenizer(_bpe(metadata, tokens, types, whole_pieces_first=pre in _WHOLE_PIECES_FIRST))
    raw.pre_tokenizer = _pre_tokenizer(pre)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(_added(tokens, types, _CONTROL))
    raw.add_tokens(_added(tokens, types, _USER_DEFINED))
    special = {name: _named_token(metadata, key, tokens) for name, key in _NAMED.items()}
    return Tokenizer(
        raw,
        special_tokens={name: token for name, token in special.items() if token is not None},
        chat_templates=_templates(metadata),
        add_bos_token=metadata.get(f"{_KEY}add_bos_token") is True,
        add_eos_token=metadata.get(f"{_KEY}add_eos_token") is True,
        eos_token_ids=_valid_ids(eos_token_ids(metadata), len(tokens)),
    )


def _strings(metadata: dict[str, Any], name: str) -> list[str]:
    value = metadata.get(f"{_KEY}{name}")
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise ValueError(f"metadata lacks {_KEY}{name}, or it is not a list of strings")
    return value


def _token_types(metadata: dict[str, Any], num_tokens: int) -> list[int]:
    types = metadata.get(f"{_KEY}token_type")
    if types is None:
        return [_NORMAL] * num_tokens
    if (
        not isinstance(types, np.ndarray)
        or types.dtype.kind not in "iu"
        or len(types) != num_tokens
    ):
        raise ValueError(
            f"{_KEY}token_type must have one integer for each of the {num_tokens} tokens"
        )
    return [int(t) for t in types.tolist()]


def _bpe(
    metadata: dict[str, Any], tokens: list[str], types: list[int], *, whole_pieces_first: bool
) -> models.BPE:
    # Unused ids have a made-up text that nothing may turn into.
    used = [
        (t, i) for i, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind != _UNUSED
    ]
    vocab = dict(used)
    if len(vocab) < len(used):
        twice = next(token for token, i in used if vocab[token] != i)
        raise ValueError(f"{_KEY}tokens holds {twice!r} twice")
    merges = []
    for rank, merge in enumerate(_strings(metadata, "merges")):
        left, space, right = merge.partition(" ")
        if not (space and left in vocab and right in vocab and left + right in vocab):
            raise ValueError(
                f"{_KEY}merges: entry {rank}, {merge!r}, does not join two tokens to a third"
            )
        merges.append((left, right))
    return models.BPE(vocab=vocab, merges=merges, ignore_merges=whole_pieces_first)


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    if _SPLITS[name] is None:
        return pre_tokenizers.ByteLevel(add_prefix_space=False)
    steps = [
        pre_tokenizers.Split(Regex(step), "isolated") if isinstance(step, str) else step
        for step in _SPLITS[name]()
    ]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*steps, to_bytes])


def _added(tokens: list[str], types: list[int], kind: int) -> list[AddedToken]:
    return [
        AddedToken(token, special=kind == _CONTROL, normalized=False)
        for token, its_kind in zip(tokens, types, strict=True)
        if its_kind == kind and token
    ]


def _valid_ids(ids: tuple[Any, ...], num_tokens: int) -> tuple[int, ...]:
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < num_tokens:
            raise ValueError(f"{token_id!r} is no id of the {num_tokens} tokens in {_KEY}tokens")
    return ids


def _named_token(metadata: dict[str, Any], key: str, tokens: list[str]) -> str | None:
    token_id = metadata.get(f"{_KEY}{key}")
    if token_id is None:
        return None
    try:
        _valid_ids((token_id,), len(tokens))
    except ValueError as error:
        raise ValueError(f"{_KEY}{key}: {error}") from error
    return tokens[int(token_id)]


def _templates(metadata: dict[str, Any]) -> dict[str, str]:
    """tokenizer.chat_template is the default one; others follow as tokenizer.chat_template.NAME."""
    found = {"default": metadata.get("tokenizer.chat_template")}
    for key, value in metadata.items():
        match = _TEMPLATE.fullmatch(key)
        if match is not None:
            found[match["name"]] = value
    templates = {}
    for name, source in found.items():
        if source is not None:
            if not isinstance(source, str):
                raise ValueError(f"the chat template {name!r} is not a string")
            templates[name] = source
    return templates
