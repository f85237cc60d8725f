"""A scalar head on the trunk: how likely a step is right, read off hidden states that decoding computes anyway.

score = sigmoid(w h + b), h [D] the final-normed hidden state of a step's last token. A checkpoint has one if it holds
step_head.weight [1, D] and step_head.bias [1], beside the model's tensors or in a step_head.safetensors of its own.
`step_head_pattern` in config.json may say, as a regular expression, how those lines of the thinking begin that are
steps.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from moejet.json_file import read_json_object
from moejet.weights.checkpoint import INDEX_NAME, SINGLE_NAME

_WEIGHT, _BIAS = "step_head.weight", "step_head.bias"


class StepHead:
    """weight [1, D] and bias [1] of any float dtype. pattern: of lines that are steps, None if all are."""

    def __init__(self, weight: Tensor, bias: Tensor, pattern: str | None = None):
        self.pattern = pattern
        self._weight, self._bias = weight.float(), bias.float()

    def scores(self, hidden: Tensor) -> list[float]:
        """Between 0 and 1, of each row of hidden [L, D]."""
        logits = torch.nn.functional.linear(hidden.float(), self._weight, self._bias)
        scores: list[float] = torch.sigmoid(logits[:, 0]).tolist()
        return scores


def read_step_head(root: Path, hidden_size: int) -> StepHead | None:
    """The head of a checkpoint directory, None if it has none.

    Raises ValueError, naming the file, for a head of another size, half of one, or a file that cannot be read.
    """
    file = _file_of(root)
    if file is None or not file.is_file():
        return None
    try:
        with safe_open(str(file), framework="pt") as tensors:
            names = set(tensors.keys())
            if _WEIGHT not in names:
                return None
            if _BIAS not in names:
                raise ValueError(f"it holds {_WEIGHT} and no {_BIAS}")
            weight, bias = tensors.get_tensor(_WEIGHT), tensors.get_tensor(_BIAS)
    except Exception as error:  # the library raises its own kind for a broken file
        raise ValueError(f"the step head in {file} cannot be read: {error}") from error
    if weight.shape != (1, hidden_size) or bias.shape != (1,):
        raise ValueError(
            f"the step head in {file} has shapes {tuple(weight.shape)} and {tuple(bias.shape)}, and this model needs "
            f"(1, {hidden_size}) and (1,)"
        )
    return StepHead(weight, bias, _pattern_of(root))


def _pattern_of(root: Path) -> str | None:
    config = root / "config.json"
    given = read_json_object(config).get("step_head_pattern") if config.is_file() else None
    try:
        return None if given is None else re.compile(given).pattern
    except (TypeError, re.error) as error:
        raise ValueError(
            f"step_head_pattern={given!r} in {config} must be a regular expression: {error}"
        ) from None


def _file_of(root: Path) -> Path | None:
    own = root / "step_head.safetensors"
    if own.is_file() or not root.is_dir():
        return own
    index = root / INDEX_NAME
    if not index.is_file():
        return root / SINGLE_NAME
    places = read_json_object(index).get("weight_map", {})
    return root / places[_WEIGHT] if _WEIGHT in places else None
