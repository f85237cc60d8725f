"""What `LLM.describe` says of a model that runs."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from moejet import LLM
from moejet.presets import PRESETS

SHAPE = replace(
    PRESETS["deepseek-v3"],
    num_hidden_layers=4,
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    moe_intermediate_size=32,
    num_experts=16,
    num_attention_heads=2,
)


def describe(shape=SHAPE, **options) -> list[str]:
    with LLM.synthetic(shape, **options) as llm:
        return llm.describe().split(" · ")


def test_defaults_are_named_with_their_reasons():
    weights, threads, context, place = describe(device="cpu")
    assert re.fullmatch(
        r"int4_g32 experts, int8 dense \(from bf16\): [\d.]+ MiB of [\d.]+ GiB RAM", weights
    )
    assert re.fullmatch(r"\d+ threads? \(one per core\), (avx\w+|amx|scalar)", threads)
    assert re.fullmatch(r"context 32768 of 163840 \(cache [\d.]+ GiB\)", context)
    assert place.startswith("no GPU")


def test_what_was_asked_for_is_told_from_what_the_machine_has():
    options = {"isa": "scalar", "max_context": 64, "num_threads": 1}
    _, threads, context, _ = describe(device="cpu", **options)
    assert re.fullmatch(r"1 thread \(.*\), scalar \(widest: \w+\)", threads)
    assert context.startswith("context 64 of 163840 ")


@pytest.mark.parametrize(
    ("quantization", "options", "expected"),
    [
        ("int4", {}, "int4_g32 experts, int8 dense (as in the checkpoint)"),
        ("fp8", {}, "int4_g32 experts, int8 dense (from fp8)"),
        ("fp8", {"expert_format": "native"}, "fp8 experts, int8 dense (as in the checkpoint)"),
        (None, {"expert_format": "native", "dense_format": "native"}, "bf16 experts, bf16 dense ("),
    ],
)
def test_formats_say_where_they_come_from(quantization, options, expected):
    shape = replace(SHAPE, quantization=quantization)
    assert describe(shape, device="cpu", max_context=64, **options)[0].startswith(expected)


def test_a_gpu_is_named_with_its_share():
    *_, place = describe(device="simulated", gpu_experts=5, max_context=64)
    assert re.fullmatch(r"GPU: 5 of 16 experts and the rest, [\d.]+ GiB of 64.00 GiB", place)
