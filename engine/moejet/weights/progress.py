"""How far loading is: share, bytes, rate, time left."""

from __future__ import annotations

from dataclasses import dataclass

from moejet.progress import bar, duration


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """State after one more piece was loaded."""

    bytes_done: int
    bytes_total: int
    elapsed_s: float
    tensor: str

    @property
    def gbps(self) -> float:
        return self.bytes_done / max(self.elapsed_s, 1e-9) / 1e9

    @property
    def remaining_s(self) -> float:
        if self.bytes_done == 0:
            return float("inf")
        return self.elapsed_s * (self.bytes_total - self.bytes_done) / self.bytes_done

    def __str__(self) -> str:
        share = self.bytes_done / self.bytes_total if self.bytes_total else 1.0
        left = "" if self.remaining_s == float("inf") else f" · {duration(self.remaining_s)} left"
        return (
            f"loading {bar(share)} · "
            f"{self.bytes_done / 2**30:.2f} of {self.bytes_total / 2**30:.2f} GiB · "
            f"{self.gbps:.2f} GB/s{left}"
        )
