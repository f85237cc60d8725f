import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM

import moejet.hf

# What the families' configurations have in common, under all its names.
TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "expert_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "index_topk": 16,
    "index_n_heads": 4,
    "index_head_dim": 32,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


@pytest.fixture(autouse=True)
def _quiet_and_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Instruction sets up to AVX-512 multiply fp32 activations; wider ones round them to bf16."""
    transformers.logging.set_verbosity_error()
    ceiling = os.environ.get("MOEJET_MAX_ISA")
    if ceiling not in ("scalar", "avx2"):
        monkeypatch.setenv("MOEJET_MAX_ISA", "avx512")


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    moejet.hf.register(num_threads=1)
    yield
    for name in list(moejet.hf._registered):
        moejet.hf.unregister(name)


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., nn.Module]:
    """A small random model of a family; weights of unit gain, so that greedy choices have margins."""

    def make(
        family: str = "qwen3_moe",
        *,
        dtype: torch.dtype = torch.float32,
        implementation: str = "eager",
        **changes: Any,
    ) -> nn.Module:
        kind = transformers.CONFIG_MAPPING[family]
        known = kind()
        wanted = {name: value for name, value in TINY.items() if hasattr(known, name)}
        config = kind(**{**wanted, **changes})
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, experts_implementation=implementation
        )
        for w in model.parameters():
            if w.dim() > 1:
                nn.init.normal_(w, std=w.shape[-1] ** -0.5)
        return model.to(dtype).eval()

    return make
