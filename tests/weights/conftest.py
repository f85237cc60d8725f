"""A model to pack, and a directory of a test's own for its packed weights."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from moejet.testing.checkpoints import tiny_checkpoint
from moejet.testing.packed_weights import Used


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("cached"), "deepseek_v3")


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOEJET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def used() -> Iterator[Used]:
    handler = Used()
    loggers = [logging.getLogger(f"moejet.{name}") for name in ("loading", "weights.packed_cache")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    yield handler
    for logger in loggers:
        logger.removeHandler(handler)
        logger.setLevel(logging.NOTSET)
