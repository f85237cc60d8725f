"""Parameters of rotary position embeddings."""

from __future__ import annotations

import math
from dataclasses import dataclass

from moejet.validation import is_number, require_number, short


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Rotary embedding parameters. `type` is "default" or "yarn" (arXiv 2309.00071)."""

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 4096
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        for name in ("theta", "factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"):
            if not is_number(value := getattr(self, name)):
                raise ValueError(f"rope_{name}={short(value)} must be a finite number")
        require_number("rope_theta", self.theta, above=0)

    @property
    def cos_sin_scale(self) -> float:
        """Factor on cos and sin: mscale(factor, mscale) / mscale(factor, mscale_all_dim)."""
        if self.type == "default":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _yarn_mscale(self.factor, self.mscale) / _yarn_mscale(
                self.factor, self.mscale_all_dim
            )
        return _yarn_mscale(self.factor, 1.0)

    @property
    def softmax_mscale(self) -> float:
        """Factor on the softmax scale: mscale(factor, mscale_all_dim)^2, as DeepSeek-V2/V3 apply it."""
        if self.type == "default" or not self.mscale_all_dim:
            return 1.0
        return _yarn_mscale(self.factor, self.mscale_all_dim) ** 2


def _yarn_mscale(scale: float, mscale: float) -> float:
    return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0
