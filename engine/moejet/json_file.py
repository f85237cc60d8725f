"""The JSON files beside a model's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read_json_object(file: Path) -> dict[str, Any]:
    """Raises ValueError, which names the file, if it holds anything but one JSON object."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): download it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return value
