"""Benchmarks as tests: what their lines say of the machine need not be true to the percent."""

import pytest

from moejet import ceilings


@pytest.fixture(autouse=True)
def quick_memory_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ceilings, "read_buffer_bytes", lambda: 8 << 20)
    monkeypatch.setattr(ceilings, "_TRIAL_SECONDS", 0.001)
