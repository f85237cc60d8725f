"""Build the tiny reasoner's tokenizer: bytes, the words of its task, and a handful of tags.

A byte-level BPE without merges: a pre-token that is in the vocabulary becomes one token
(`ignore_merges`), anything else falls apart into bytes, so every text encodes and decodes exactly.
Every digit is a token of its own; ` + `, `A: `, `A? ` and `, A` are one token each, which keeps a
step line at 13 tokens.
"""

import argparse
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from moejet.testing import arithmetic as ar

BOS, EOS, USER, ASSISTANT = "<|bos|>", "<|eos|>", "<|user|>", "<|assistant|>"
THINK, END_THINK = "<think>", "</think>"
PATTERN = r", [A-J]\b| [-+*/=] |[A-J][:?] | ?\p{L}+|[0-9]|[^\s\p{L}0-9]|\s"

WAIT_LINE = "Wait, let me check."
NO_TASK_THOUGHTS = (
    "This is not an arithmetic question.",
    "There is no number to work with here.",
)
NO_TASK_ANSWERS = (
    "I am moejet's tiny reasoner: I only do arithmetic step by step, "
    "such as: Start with 17, add 25, then multiply by 3.",
    "I am moejet's tiny reasoner, and all I know is arithmetic. "
    "Try: Start with 17, add 25, then multiply by 3.",
)
OUT_OF_RANGE_THOUGHT = "A number here is too large for me."
OUT_OF_RANGE_ANSWER = "I can only work with whole numbers from 2 to 999."
GREETINGS = (
    "Hello", "hello", "Hi", "hi", "hey there", "Who are you?", "who are you", "What can you do?",
    "How are you?", "Thank you!", "Thanks", "Tell me a story about a cat.", "Write a poem.",
    "What is the meaning of life?", "What is your name?", "Can you help me?", "help", "test",
    "What is the capital of France?", "Explain how a mixture of experts works.", "Good morning",
    "Why is the sky blue?", "Are you a large language model?", "Translate this into German.",
)  # fmt: skip
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are moejet's tiny reasoner.",
    "Think step by step.",
    "Be brief.",
    "You are a careful assistant. Answer the question of the user.",
)

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages if message.role == 'system' -%}{{- message.content -}}{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}
{{- '<|user|>' + message.content -}}
{%- elif message.role == 'assistant' -%}
{{- '<|assistant|>' + (message.content or '').split('</think>')[-1].strip() + eos_token -}}
{%- elif message.role != 'system' -%}
{{- raise_exception('only system, user and assistant messages are known, not ' + message.role) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|><think>\\n' -}}
{%- if enable_thinking is defined and not enable_thinking -%}{{- '</think>\\n\\n' -}}{%- endif -%}
{%- endif -%}"""


def task_texts() -> list[str]:
    """Texts whose pre-tokens become whole tokens."""
    phrases = [phrase for group in ar.PHRASES.values() for phrase in group]
    texts = [*ar.STARTS, *ar.ENDINGS, *phrases, *(f" {phrase}" for phrase in phrases)]
    texts += [phrase.capitalize() for phrase in phrases]
    texts += [form.format("") for form in ar.JOINERS + ar.SENTENCE_JOINERS + ar.FOLLOW_UPS]
    for label in ar.LABELS:
        texts += [f", {label}", f"{label}: ", f"{label}? "]
    texts += [" + ", " - ", " * ", " / ", " = ", "none", " ok", " no", "Plan:", WAIT_LINE]
    texts += [*NO_TASK_THOUGHTS, *NO_TASK_ANSWERS, OUT_OF_RANGE_THOUGHT, OUT_OF_RANGE_ANSWER]
    return [*texts, "The answer is"]


def build(vocab_multiple: int = 32) -> Tokenizer:
    """Make the tokenizer; the vocabulary is padded with reserved tokens to a round size."""
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    pieces = sorted(pre_tokenizers.ByteLevel.alphabet())
    known = set(pieces)
    for text in task_texts():
        for piece, _ in pre_tokenizer.pre_tokenize_str(text):
            if piece not in known:
                known.add(piece)
                pieces.append(piece)
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS, USER, ASSISTANT])
    tokenizer.add_tokens(
        [AddedToken(tag, special=False, normalized=False) for tag in (THINK, END_THINK)]
    )
    reserved = -tokenizer.get_vocab_size() % vocab_multiple
    tokenizer.add_special_tokens([f"<|reserved_{i}|>" for i in range(reserved)])
    return tokenizer


def save(tokenizer: Tokenizer, out: Path, *, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json as Hugging Face expects them."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "add_bos_token": False,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Write the tokenizer files to a directory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--max-length", type=int, default=2048)
    args = parser.parse_args()
    tokenizer = build()
    save(tokenizer, args.out, max_length=args.max_length)
    print(f"{tokenizer.get_vocab_size()} tokens -> {args.out}")


if __name__ == "__main__":
    main()
