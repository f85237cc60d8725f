"""Published dimensions of real models: shapes only, for benchmarks, planning and tests.

Sources: the config.json that each organisation publishes with its weights.
"""

import re
from dataclasses import replace

from moejet.config import ModelConfig
from moejet.rope_config import RopeConfig
from moejet.validation import require_choice, short


def _yarn(factor: float, mscale: float, *, beta_fast: float = 32.0) -> RopeConfig:
    return RopeConfig(
        type="yarn",
        factor=factor,
        original_max_position_embeddings=4096,
        beta_fast=beta_fast,
        mscale=mscale,
        mscale_all_dim=mscale,
    )


PRESETS: dict[str, ModelConfig] = {
    "deepseek-v2-lite": ModelConfig(
        model_type="deepseek_v2",
        vocab_size=102400,
        hidden_size=2048,
        intermediate_size=10944,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        num_experts=64,
        num_experts_per_tok=6,
        num_shared_experts=2,
        first_k_dense_replace=1,
        scoring_func="softmax",
        topk_method="greedy",
        norm_topk_prob=False,
        rope=_yarn(40.0, 0.707),
        max_position_embeddings=163840,
        bos_token_id=100000,
        eos_token_ids=(100001,),
    ),
    "deepseek-v2": ModelConfig(
        model_type="deepseek_v2",
        vocab_size=102400,
        hidden_size=5120,
        intermediate_size=12288,
        moe_intermediate_size=1536,
        num_hidden_layers=60,
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        num_experts=160,
        num_experts_per_tok=6,
        num_shared_experts=2,
        first_k_dense_replace=1,
        n_group=8,
        topk_group=3,
        scoring_func="softmax",
        topk_method="group_limited_greedy",
        norm_topk_prob=False,
        routed_scaling_factor=16.0,
        rope=_yarn(40.0, 1.0),
        max_position_embeddings=163840,
        bos_token_id=100000,
        eos_token_ids=(100001,),
    ),
    "deepseek-v3": ModelConfig(
        model_type="deepseek_v3",
        vocab_size=129280,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        num_experts=256,
        num_experts_per_tok=8,
        num_shared_experts=1,
        first_k_dense_replace=3,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        rope=_yarn(40.0, 1.0),
        max_position_embeddings=163840,
        bos_token_id=0,
        eos_token_ids=(1,),
        num_nextn_predict_layers=1,
    ),
    "kimi-k2": ModelConfig(
        model_type="kimi_k2",
        vocab_size=163840,
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=64,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        num_experts=384,
        num_experts_per_tok=8,
        num_shared_experts=1,
        first_k_dense_replace=1,
        routed_scaling_factor=2.827,
        rope=RopeConfig(
            theta=50000.0,
            type="yarn",
            factor=32.0,
            original_max_position_embeddings=4096,
            beta_fast=1.0,
            mscale=1.0,
            mscale_all_dim=1.0,
        ),
        max_position_embeddings=131072,
        bos_token_id=163584,
        eos_token_ids=(163585,),
    ),
    "moonlight": ModelConfig(
        model_type="deepseek_v3",
        vocab_size=163840,
        hidden_size=2048,
        intermediate_size=11264,
        moe_intermediate_size=1408,
        num_hidden_layers=27,
        num_attention_heads=16,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        num_experts=64,
        num_experts_per_tok=6,
        num_shared_experts=2,
        first_k_dense_replace=1,
        routed_scaling_factor=2.446,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=50000.0),
        max_position_embeddings=8192,
        bos_token_id=163584,
        eos_token_ids=(163585,),
    ),
    "glm-4.7-flash": ModelConfig(
        model_type="glm4_moe_lite",
        vocab_size=154880,
        hidden_size=2048,
        intermediate_size=10240,
        moe_intermediate_size=1536,
        num_hidden_layers=47,
        num_attention_heads=20,
        q_lora_rank=768,
        kv_lora_rank=512,
        qk_nope_head_dim=192,
        qk_rope_head_dim=64,
        v_head_dim=256,
        num_experts=64,
        num_experts_per_tok=4,
        num_shared_experts=1,
        first_k_dense_replace=1,
        routed_scaling_factor=1.8,
        rms_norm_eps=1e-5,
        rope=RopeConfig(theta=1000000.0),
        max_position_embeddings=202752,
        eos_token_ids=(154820, 154827, 154829),
        num_nextn_predict_layers=1,
    ),
}


def parse_preset(text: str) -> ModelConfig:
    """Reads "NAME" or "NAME:layers=N" into a model configuration."""
    name, _, option = text.partition(":")
    require_choice("shape", name, PRESETS)
    preset = PRESETS[name]
    if not option:
        return preset
    key, _, value = option.partition("=")
    if (
        key != "layers"
        or not re.fullmatch("[0-9]{1,6}", value)
        or not 1 <= int(value) <= preset.num_hidden_layers
    ):
        raise ValueError(
            f"shape={short(text)} must be {name}:layers=N with N from 1 to {preset.num_hidden_layers}"
        )
    return replace(preset, num_hidden_layers=int(value))
