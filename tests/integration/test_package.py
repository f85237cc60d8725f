"""The package as a whole: what importing it costs, and traps of the layout."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def _run(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_loads_nothing_heavy():
    slow = ("torch", "numpy", "transformers", "triton", "tokenizers", "jinja2", "moejet._C")
    code = f"import sys, moejet; print([m for m in {slow} if m in sys.modules])"
    assert _run(code) == "[]"


def test_cpu_path_needs_neither_triton_nor_transformers():
    code = """
import sys
for name in ("triton", "transformers"):
    sys.modules[name] = None
from dataclasses import replace
from moejet import LLM, SamplingParams
from moejet.presets import PRESETS
shape = replace(PRESETS["deepseek-v3"], num_hidden_layers=4, vocab_size=64, hidden_size=64,
                intermediate_size=64, moe_intermediate_size=32, num_experts=16, num_attention_heads=2)
with LLM.synthetic(shape, max_context=64) as llm:
    print(len(llm.generate([[1, 2, 3]], SamplingParams(max_tokens=2, ignore_eos=True))[0].outputs[0].token_ids))
"""
    assert _run(code) == "2"


def test_every_public_name_can_be_imported():
    import moejet

    for name in moejet.__all__:
        assert getattr(moejet, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = moejet.nothing


def test_kernels_is_no_package():
    """An __init__.py there would shadow Hugging Face's `kernels` package from the repository root."""
    if not (ROOT / "kernels").is_dir():
        pytest.skip("not a source tree")
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "engine" / "moejet" / "kernels").is_symlink()
