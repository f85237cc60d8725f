"""ModelConfig reads real-world config.json spellings and refuses what it would compute wrongly."""

import json
from dataclasses import replace

import pytest

from moejet.config import EngineConfig, ModelConfig
from moejet.environment import env_max_isa, env_num_threads, use_reference
from moejet.presets import PRESETS

V3 = {
    "model_type": "deepseek_v3",
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "topk_method": "noaux_tc",
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 3,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",
    "hidden_act": "silu",
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-06,
    "num_nextn_predict_layers": 1,
    "tie_word_embeddings": False,
    "rope_theta": 10000,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "attention_bias": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def _without(raw: dict, *keys: str) -> dict:
    return {k: v for k, v in raw.items() if k not in keys}


def test_v3_file_equals_the_preset():
    assert ModelConfig.from_hf(V3) == PRESETS["deepseek-v3"]


def test_new_rope_spelling_equals_the_old():
    rope = {**V3["rope_scaling"], "rope_type": "yarn", "rope_theta": 10000}
    rope.pop("type")
    raw = {**_without(V3, "rope_scaling", "rope_theta"), "rope_parameters": rope}
    assert ModelConfig.from_hf(raw) == ModelConfig.from_hf(V3)


def test_kimi_text_config_is_found():
    text = {**V3, "model_type": "kimi_k2", "n_group": 1, "topk_group": 1}
    outer = {"model_type": "kimi_k25", "text_config": text, "eos_token_id": [7, 8]}
    config = ModelConfig.from_hf(outer)
    assert config.model_type == "kimi_k2"
    assert config.n_group == 1


def test_v2_lite_spelling():
    raw = {
        **_without(V3, "n_group", "topk_group"),
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "scoring_func": "softmax",
        "topk_method": "greedy",
        "norm_topk_prob": False,
        "n_group": None,
        "topk_group": None,
    }
    config = ModelConfig.from_hf(raw)
    assert config.q_lora_rank is None
    assert config.n_group == config.topk_group == 1


def test_glm_needs_no_router_keys_and_reads_layer_types():
    raw = _without(V3, "scoring_func", "topk_method", "first_k_dense_replace", "rope_scaling")
    raw |= {"model_type": "glm4_moe_lite", "num_hidden_layers": 3, "n_group": 1, "topk_group": 1}
    config = ModelConfig.from_hf(raw)
    assert (config.scoring_func, config.first_k_dense_replace) == ("sigmoid", 1)
    layered = ModelConfig.from_hf({**raw, "mlp_layer_types": ["dense", "dense", "sparse"]})
    assert layered.first_k_dense_replace == 2
    with pytest.raises(ValueError, match="mlp_layer_types"):
        ModelConfig.from_hf({**raw, "mlp_layer_types": ["sparse", "dense", "sparse"]})


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}


def _int4(**weights):
    known = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group"}
    group = {"weights": {**known, "group_size": 32, **weights}, "targets": ["Linear"]}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
    }


@pytest.mark.parametrize(
    ("quantization", "auto", "native"),
    [(None, "int4_g32", "bf16"), (FP8, "int4_g32", "fp8"), (_int4(), "int4_g32", "int4_g32")],
)
def test_expert_format_by_checkpoint(quantization, auto, native):
    raw = {**V3, "quantization_config": quantization}
    nested = {"model_type": "kimi_k25", "text_config": raw}
    for source in (raw, nested):
        model = ModelConfig.from_hf(source)
        for asked, expected in (("auto", auto), ("native", native), ("int8", "int8")):
            config = EngineConfig(model="x", expert_format=asked)
            assert config.for_model(model).expert_format == expected


@pytest.mark.parametrize(
    ("quantization", "native"), [(None, "bf16"), (FP8, "fp8"), (_int4(), "bf16")]
)
def test_dense_format_by_checkpoint(quantization, native):
    model = ModelConfig.from_hf({**V3, "quantization_config": quantization})
    for asked, expected in (("auto", "int8"), ("native", native), ("fp32", "fp32")):
        config = EngineConfig(model="x", dense_format=asked).for_model(model)
        assert config.dense_formats_of(model) == (expected, {})
        assert config.for_model(model) == config


@pytest.mark.parametrize(
    ("own", "auto", "native"),
    [("q4_k", "native", "native"), ("int8", "native", "native"), ("bf16", "int8", "bf16")],
)
def test_dense_format_of_gguf_files(own, auto, native):
    formats = (("lm_head", own), ("model.layers.0.self_attn.o_proj", "bf16"))
    model = replace(ModelConfig.from_hf(V3), quantization="gguf", dense_formats=formats)
    for asked, expected in (("auto", auto), ("native", native), ("int4_g32", "int4_g32")):
        config = EngineConfig(model="x", dense_format=asked).for_model(model)
        assert config.dense_format == expected
        decided = ("int8", dict(formats)) if expected == "native" else (expected, {})
        assert config.dense_formats_of(model) == decided


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "llama"}, ("model_type='llama'", "deepseek_v3")),
        ({"model_type": None}, ("model_type=None",)),
        ({"scoring_func": "sqrtsoftplus"}, ("scoring_func='sqrtsoftplus'", "sigmoid")),
        ({"topk_method": "magic"}, ("topk_method='magic'",)),
        ({"rope_scaling": {"type": "longrope"}}, ("longrope", "yarn")),
        ({"partial_rotary_factor": 0.5}, ("partial_rotary_factor=0.5",)),
        ({"hidden_act": "gelu"}, ("hidden_act='gelu'", "silu")),
        ({"moe_layer_freq": 2}, ("moe_layer_freq=2",)),
        ({"quantization_config": {"quant_method": "awq"}}, ("quant_method='awq'", "fp8")),
        ({"quantization_config": {"quant_method": "fp8"}}, ("weight_block_size=None", "128")),
        ({"quantization_config": {**FP8, "fmt": "e5m2"}}, ("fmt='e5m2'", "e4m3")),
        ({"quantization_config": {**FP8, "weight_block_size": [64, 128]}}, ("[64, 128]",)),
        ({"quantization_config": _int4(num_bits=8)}, ("num_bits=8", "group_0", "4")),
        ({"quantization_config": _int4(symmetric=False)}, ("symmetric=False",)),
        ({"quantization_config": _int4(group_size=128)}, ("group_size=128", "32")),
        ({"quantization_config": _int4(actorder="group")}, ("actorder='group'",)),
        ({"quantization_config": {**_int4(), "format": "float-quantized"}}, ("float-quantized",)),
        ({"quantization_config": {**_int4(), "config_groups": {}}}, ("config_groups={}",)),
        ({"num_key_value_heads": 8}, ("num_key_value_heads=8",)),
        ({"hidden_size": None}, ("hidden_size",)),
        ({"hidden_size": "7168"}, ("hidden_size='7168'", "int")),
        ({"hidden_size": -1}, ("hidden_size=-1",)),
        ({"qk_nope_head_dim": 0}, ("qk_nope_head_dim=0",)),
        ({"rms_norm_eps": float("nan")}, ("rms_norm_eps=nan",)),
        ({"rope_scaling": None, "rope_theta": float("inf")}, ("rope_theta=inf",)),
        ({"num_hidden_layers": 10**9}, ("num_hidden_layers=1000000000", "1000 is allowed")),
        ({"n_routed_experts": 2**40}, ("num_experts=1099511627776",)),
        ({"vocab_size": 10**10}, ("vocab_size=10000000000",)),
        ({"num_experts_per_tok": 500}, ("num_experts_per_tok=500",)),
        ({"n_group": 7}, ("n_group=7",)),
        ({"model_type": "deepseek_v2", "scoring_func": "softmax"}, ("norm_topk_prob",)),
    ],
)
def test_refusals_name_key_and_value(change, words):
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the words are checked below)
        ModelConfig.from_hf({**V3, **change})
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_from_directory_and_broken_json(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        ModelConfig.from_hf(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(V3))
    assert ModelConfig.from_hf(tmp_path).num_experts == 256


def test_presets_have_published_parameter_counts():
    """Total parameters in billions, as published."""
    published = {
        "deepseek-v2-lite": 15.7,
        "deepseek-v2": 236,
        "deepseek-v3": 671,
        "kimi-k2": 1026,
        "moonlight": 16.0,
        "glm-4.7-flash": 29.9,
    }
    for name, billions in published.items():
        config = PRESETS[name]
        expert = 3 * config.hidden_size * config.moe_intermediate_size
        experts = config.num_moe_layers * config.num_experts * expert
        total = config.num_dense_parameters + experts
        assert total / 1e9 == pytest.approx(billions, rel=0.01), name


def test_unknown_engine_option_gets_a_hint():
    with pytest.raises(ValueError, match="did you mean 'expert_format'"):
        EngineConfig.create(model="x", expert_fromat="int8")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"expert_format": "int4"}, "expert_format='int4'"),
        ({"dense_format": "fp16"}, "dense_format='fp16'"),
        ({"max_context": 0}, "max_context=0"),
        ({"num_threads": -1}, "num_threads=-1"),
        ({"block_size": 2.5}, "block_size=2.5"),
        ({"isa": "avx1024"}, "isa='avx1024'"),
        ({"arithmetic": "int4"}, "arithmetic='int4'"),
    ],
)
def test_bad_engine_values(options, words):
    with pytest.raises(ValueError, match=words):
        EngineConfig.create(model="x", **options)


def test_environment_values_are_checked(monkeypatch):
    monkeypatch.setenv("MOEJET_MAX_ISA", "sse9")
    with pytest.raises(ValueError, match="MOEJET_MAX_ISA='sse9'"):
        env_max_isa()
    monkeypatch.setenv("MOEJET_NUM_THREADS", "none")
    with pytest.raises(ValueError, match="MOEJET_NUM_THREADS"):
        env_num_threads()
    monkeypatch.setenv("MOEJET_REF", "yes")
    with pytest.raises(ValueError, match="MOEJET_REF"):
        use_reference()
