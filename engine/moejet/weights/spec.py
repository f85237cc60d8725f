"""What a model expects of one checkpoint tensor."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from moejet.weights.stored import StoredWeight


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Shape that a checkpoint tensor must have, and what to do with it once read (any float dtype, CPU).

    The tensor that `load` gets is contiguous and valid during the call only: its memory is read into again.
    Weights that the checkpoint holds quantised go to `load_stored` as they are, or dequantised to `load` if it is None.
    parts: what some checkpoints hold in place of this tensor, by name.
    """

    shape: tuple[int, ...]
    load: Callable[[Tensor], object]
    optional: bool = False
    load_stored: Callable[[StoredWeight], object] | None = None
    parts: Mapping[str, TensorSpec] | None = None

    def take(self, weight: StoredWeight) -> None:
        """Passes a weight on in the form that is wanted."""
        if weight.encoding == "plain" or self.load_stored is None:
            self.load(weight.dequantize())
        else:
            self.load_stored(weight)

    @classmethod
    def stored(
        cls,
        shape: tuple[int, ...],
        load: Callable[[StoredWeight], object],
        *,
        parts: Mapping[str, TensorSpec] | None = None,
    ) -> TensorSpec:
        """A tensor that goes to `load` in whatever form the checkpoint has it."""
        return cls(shape, lambda t: load(StoredWeight.plain(t)), load_stored=load, parts=parts)

    @classmethod
    def copy_into(cls, target: Tensor) -> TensorSpec:
        """A tensor that is copied (and cast) into `target`."""
        return cls(tuple(target.shape), target.copy_)
