"""The tokenizer of tiny checkpoints: bytes, a few merges, turn markers and thinking tags."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "<|assistant|>{{ message['content'].split('</think>')[-1] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('unknown role ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# Ids 0-5; the tags of thinking are ordinary added tokens, so they survive skip_special_tokens.
_SPECIAL = ("<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>", "<|end|>")
_TAGS = ("<think>", "</think>")
_MERGES = (
    *(("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("i", "n"), ("Ġ", "a"), ("r", "e"), ("o", "n"), ("e", "r")),
    *(("Ġ", "s"), ("n", "d"), ("Ġa", "nd"), ("a", "t"), ("e", "n"), ("o", "r"), ("in", "g"), ("e", "s")),
)  # fmt: skip


def write_tokenizer(root: Path, vocab_size: int = 320) -> None:
    """Writes a byte-level BPE tokenizer of at most `vocab_size` tokens with an R1-style chat template.

    Ids: 0 bos, 1 eos, 2-4 turn markers, 5-6 the thinking tags, then 256 bytes and a few merges.
    """
    from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
    from tokenizers import Tokenizer as RawTokenizer

    fixed = (*_SPECIAL, *_TAGS)
    if vocab_size < len(fixed) + 256:
        raise ValueError(f"vocab_size={vocab_size} is below the {len(fixed) + 256} that bytes need")
    vocab = {token: i for i, token in enumerate(fixed)}
    for symbol in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocab[symbol] = len(vocab)
    merges = list(_MERGES[: vocab_size - len(vocab)])
    for left, right in merges:
        vocab[left + right] = len(vocab)
    raw = RawTokenizer(models.BPE(vocab=vocab, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in _SPECIAL])
    raw.add_tokens([AddedToken(t, normalized=False, special=False) for t in _TAGS])
    raw.post_processor = processors.TemplateProcessing(
        single="<|bos|> $A", pair="<|bos|> $A $B", special_tokens=[("<|bos|>", 0)]
    )
    raw.save(str(root / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|eos|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
        "chat_template": CHAT_TEMPLATE,
    }
    write_json(root / "tokenizer_config.json", settings)


def write_json(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
