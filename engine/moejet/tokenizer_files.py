"""The files of a checkpoint's tokenizer: tokenizer.json or Kimi's tiktoken.model, and the settings beside it.

tokenizer_config.json, special_tokens_map.json, the chat templates in their several places, and the ids that end an
answer, of generation_config.json or config.json.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as RawTokenizer

from moejet import tiktoken_files
from moejet.json_file import read_json_object
from moejet.validation import short

logger = logging.getLogger(__name__)

NAMED_TOKENS = (
    *("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"),
)


def read_tokenizer(root: Path) -> dict[str, Any]:
    """What `moejet.tokenizer.Tokenizer` is made of, by the names of its arguments. Raises ValueError."""
    settings = _read_json(root / "tokenizer_config.json")
    raw = _read_raw(root, settings)
    _add_missing_tokens(raw, settings.get("added_tokens_decoder"), root)
    named = {**_read_json(root / "special_tokens_map.json"), **settings}
    return {
        "raw": raw,
        "special_tokens": {n: t for n in NAMED_TOKENS if (t := _content(named.get(n)))},
        "chat_templates": _read_templates(root, settings.get("chat_template")),
        "add_bos_token": settings.get("add_bos_token") is True,
        "add_eos_token": settings.get("add_eos_token") is True,
        "eos_token_ids": _read_eos_ids(root),
    }


def _read_raw(root: Path, settings: dict[str, Any]) -> RawTokenizer:
    file = root / "tokenizer.json"
    if file.is_file():
        try:
            return RawTokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(
                f"{file} cannot be read ({error}): download it again, or update tokenizers"
            ) from error
    ranks = root / tiktoken_files.FILE_NAME
    if ranks.is_file():
        return tiktoken_files.load_tiktoken(ranks, settings)
    found = " (found tokenizer.model, which is not read)" * (root / "tokenizer.model").is_file()
    raise ValueError(
        f"{root} holds no tokenizer.json{found}; supported: the tokenizers library's tokenizer.json, "
        "which transformers' save_pretrained writes for most tokenizers, and Kimi's tiktoken.model"
    )


def _read_json(file: Path) -> dict[str, Any]:
    return read_json_object(file) if file.is_file() else {}


def _content(token: Any) -> str | None:
    """A special token is written as a string or as {"content": ...}."""
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _add_missing_tokens(raw: RawTokenizer, added: Any, root: Path) -> None:
    """Adds tokens that only tokenizer_config.json declares, which must keep the ids that it gives them."""
    for key, entry in sorted((added or {}).items(), key=lambda item: int(item[0])):
        content = _content(entry)
        if content is None or raw.token_to_id(content) is not None:
            continue
        flags = {k: bool(entry[k]) for k in ("lstrip", "rstrip", "normalized") if k in entry}
        token = AddedToken(content, special=bool(entry.get("special")), **flags)
        (raw.add_special_tokens if token.special else raw.add_tokens)([token])
        if raw.token_to_id(content) != int(key):
            raise ValueError(
                f"{root / 'tokenizer_config.json'} gives {content!r} the id {key}, which does not "
                "continue tokenizer.json: the tokenizer files do not belong together"
            )


def _read_templates(root: Path, value: Any) -> dict[str, str]:
    """Templates by name; files (chat_template.jinja, additional_chat_templates/) win over the settings."""
    templates: dict[str, str] = {}
    if isinstance(value, str):
        templates["default"] = value
    elif isinstance(value, list):
        named = [e for e in value if isinstance(e, dict) and "name" in e and "template" in e]
        if len(named) != len(value):
            raise ValueError(
                f"{root / 'tokenizer_config.json'}: chat_template must be a string or a list of "
                "{name, template} objects"
            )
        templates = {str(entry["name"]): str(entry["template"]) for entry in named}
    elif isinstance(value, dict):
        templates = {str(name): str(source) for name, source in value.items()}
    elif value is not None:
        raise ValueError(
            f"{root / 'tokenizer_config.json'} has chat_template={short(value)}, which must be a "
            "string or a list of {name, template} objects: download it again"
        )
    legacy = _read_json(root / "chat_template.json").get("chat_template")
    if isinstance(legacy, str):
        templates["default"] = legacy
    file = root / "chat_template.jinja"
    if file.is_file():
        templates["default"] = file.read_text(encoding="utf-8")
    for extra in sorted((root / "additional_chat_templates").glob("*.jinja")):
        templates[extra.stem] = extra.read_text(encoding="utf-8")
    return templates


def _read_eos_ids(root: Path) -> list[int]:
    """generation_config.json decides; else config.json, or its text_config."""
    config = _read_json(root / "config.json")
    candidates = [
        _read_json(root / "generation_config.json").get("eos_token_id"),
        config.get("eos_token_id"),
        (config.get("text_config") or {}).get("eos_token_id"),
    ]
    for value in candidates:
        ids = value if isinstance(value, list) else [value]
        if value is not None and all(isinstance(v, int) and not isinstance(v, bool) for v in ids):
            return list(ids)
        if value is not None:
            logger.warning(
                "ignoring eos_token_id=%r in %s: not an id or a list of ids", value, root
            )
    return []
