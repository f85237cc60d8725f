"""Bytes and operations per token, against counts by hand and against what an engine holds."""

from dataclasses import replace

import pytest
import torch

from moejet import LLM
from moejet.config import DENSE_FORMATS, EXPERT_FORMATS, ModelConfig
from moejet.model_cost import ModelCost
from moejet.presets import PRESETS

TINY = ModelConfig(
    model_type="deepseek_v3",
    vocab_size=512,
    hidden_size=256,
    intermediate_size=256,
    moe_intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    q_lora_rank=128,
    kv_lora_rank=128,
    qk_nope_head_dim=128,
    qk_rope_head_dim=32,
    v_head_dim=128,
    num_experts=8,
    num_experts_per_tok=2,
    num_shared_experts=1,
    first_k_dense_replace=1,
)
# Per layer, by hand.
Q = 128 * 256 + 128 * 4 * 160
KV_A = 256 * 160
UP = 128 * 4 * (128 + 128)
OUT = 4 * 128 * 256
EXPERT = 3 * 256 * 128
ROUTER = 8 * 256
DENSE_MLP = 3 * 256 * 256
HEAD = 512 * 256
ABSORBED = 3 * 4 * (2 * 128 + 32)  # multiply-adds of a query and a key, all layers and heads
EXPANDED = 3 * 4 * (128 + 32 + 128)
LINEAR = 3 * (Q + KV_A + OUT) + DENSE_MLP + 2 * (EXPERT + ROUTER + 2 * EXPERT)


def cost(config=TINY, expert_format="bf16", dense_format="bf16", cache_dtype="bf16"):
    formats = ((expert_format, expert_format),) * config.num_moe_layers
    return ModelCost(config, formats, dense_format, cache_dtype)


def test_decode_by_hand():
    read = 2 * (3 * (Q + KV_A + UP + OUT) + DENSE_MLP + 2 * EXPERT + HEAD) + 4 * 2 * ROUTER
    read += 2 * 2 * 2 * EXPERT
    assert cost().decode_bytes(context=0) == pytest.approx(read)
    assert cost().decode_bytes(context=10) == pytest.approx(read + 10 * 3 * 160 * 2)
    operations = 2 * (LINEAR + 3 * UP + HEAD + 7 * ABSORBED)
    assert cost().decode_operations(context=7) == operations
    assert cost().decode_operations(context=7, batch=3) == 3 * operations


def test_several_sequences_share_experts():
    one, four, many = (cost().decode_bytes(0, batch) for batch in (1, 4, 1000))
    assert cost().unique_experts(1) == pytest.approx(2)
    assert cost().unique_experts(4) == pytest.approx(8 * (1 - 0.75**4))
    assert cost().unique_experts(1000) == pytest.approx(8)
    assert one < four < 4 * one
    assert many - one == pytest.approx(2 * 2 * 6 * EXPERT)


def test_prefill_counts_the_cheaper_attention():
    shape = replace(TINY, kv_lora_rank=256)  # more per pair in latent space
    absorbed, expanded, up = 3 * 4 * (2 * 256 + 32), EXPANDED, 2 * UP
    linear = LINEAR + 3 * 256 * 128  # kv_a_proj
    # One token over a long context is a decoding step.
    assert cost(shape).prefill_operations(1, 999) == cost(shape).decode_operations(1000)
    # 300 tokens: 300 * 301 / 2 pairs, keys and values built once.
    by_hand = 2 * (300 * (linear + 3 * up) + HEAD + 45150 * expanded)
    assert cost(shape).prefill_operations(300) == by_hand
    # Behind a context, every pair with it counts, and its keys are built as well.
    deep = 2 * (300 * (linear + 3 * up) + HEAD + (45150 + 300 * 50) * expanded + 50 * 3 * up)
    assert cost(shape).prefill_operations(300, depth=50) == deep
    # Few queries of many keys do not build them.
    few = 2 * (3 * (linear + 3 * up) + HEAD + (6 + 3 * 900) * absorbed)
    assert cost(shape).prefill_operations(3, depth=900) == few


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("q_lora_rank", [None, 128])
@pytest.mark.parametrize("dense_format", DENSE_FORMATS)
def test_weight_bytes_are_what_an_engine_holds(dense_format, q_lora_rank, tied):
    config = replace(TINY, tie_word_embeddings=tied, q_lora_rank=q_lora_rank)
    with LLM.synthetic(config, expert_format="int8", dense_format=dense_format) as llm:
        held = _held_bytes(llm.engine.runner.model)
        # Norms and biases are not counted, nor is padding.
        assert held == pytest.approx(llm.cost.weight_bytes, rel=0.02)
        assert llm.weight_bytes()["total"] == round(llm.cost.weight_bytes)
        routed = sum(layer.experts.nbytes for layer in llm.engine.runner.model.moe_layers)
        assert routed == pytest.approx(llm.cost.routed_bytes, rel=0.02)


def _held_bytes(root):
    """Bytes of all tensors and packed matrices that are reachable from an object."""
    total, seen, queue = 0, set(), [root]
    while queue:
        item = queue.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            total += item.numel() * item.itemsize
        elif isinstance(item, list):
            queue += item
        elif isinstance(getattr(item, "nbytes", None), int):
            total += item.nbytes
        elif type(item).__module__.startswith("moejet"):
            names = getattr(item, "__slots__", None) or getattr(item, "__dict__", ())
            queue += [getattr(item, name) for name in names if name != "rope"]
    return total


def test_published_sizes():
    """Active parameters per token as the models' authors give them."""
    for name, billions in (("deepseek-v3", 37.0), ("deepseek-v2-lite", 2.4), ("kimi-k2", 32.0)):
        operations = cost(PRESETS[name]).decode_operations(context=0)
        assert operations / 2e9 == pytest.approx(billions, rel=0.15)


@pytest.mark.parametrize("weight_format", EXPERT_FORMATS)
def test_formats_scale_the_bytes(weight_format):
    from moejet.config import FORMAT_BITS

    some = cost(expert_format=weight_format)
    assert some.expert_bytes == EXPERT * FORMAT_BITS[weight_format] / 8
    assert cost(cache_dtype="fp32").latent_bytes == 2 * some.latent_bytes == 3 * 160 * 4


def test_a_token_of_the_published_shape_takes_656_bytes_in_fp8():
    assert cost(PRESETS["deepseek-v3"], cache_dtype="fp8").latent_bytes == 61 * 656


def test_down_projections_may_have_a_format_of_their_own():
    mixed = ModelCost(TINY, (("q4_k", "q6_k"), ("q4_k", "q4_k")), "bf16", "bf16")
    assert mixed.expert_bytes == EXPERT / 3 * (2 * 4.5 + (6.625 + 4.5) / 2) / 8
    assert mixed.routed_bytes == 2 * TINY.num_experts * mixed.expert_bytes
    assert cost(expert_format="q4_k").expert_bytes == EXPERT * 4.5 / 8
