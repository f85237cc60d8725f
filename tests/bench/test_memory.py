"""Resident memory of a loaded and busy engine is what the plan says."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench/memory.py"


@pytest.mark.slow
def test_the_plan_is_within_five_percent(tmp_path):
    """1.5 GB, for half a minute."""
    lines = tmp_path / "lines.jsonl"
    shape = ["--shape", "deepseek-v2-lite:layers=2", "--context", "1024"]
    options = {"max_batch_tokens": 512, "max_num_requests": 16, "num_threads": 1}
    shape += ["--options", json.dumps(options)]
    subprocess.run([sys.executable, BENCH, *shape, "--json", lines], check=True)
    [found] = map(json.loads, lines.read_text().splitlines())
    assert found["plan_bytes"] > 1.2e9
    assert 0.95 < found["fraction"] < 1.05
