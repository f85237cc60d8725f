"""What went to the GPU while a model ran."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Transfers:
    """Packed experts that went to the GPU so far.

    streamed_bytes: for prompts · fetched_bytes: for the cache of experts · copy_seconds: that these copies took, beside
    other work
    """

    streamed_bytes: int = 0
    fetched_bytes: int = 0
    copy_seconds: float = 0.0
