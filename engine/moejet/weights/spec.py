"""What a model expects of one checkpoint tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape that a checkpoint tensor must have, and what to do with it once read (any float dtype, CPU).

    The tensor that `load` gets is contiguous and valid during the call only: its memory is read into again.
    """

    shape: tuple[int, ...]
    load: Callable[[Tensor], object]
    optional: bool = False

    @classmethod
    def copy_into(cls, target: Tensor) -> TensorSpec:
        """A tensor that is copied (and cast) into `target`."""
        return cls(tuple(target.shape), target.copy_)
