"""Kernels under Triton's interpreter, which an environment variable chooses before Triton is imported."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["*"]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
