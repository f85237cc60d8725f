"""Which device and which card a launch is for."""

import importlib

import pytest
import torch

pytest.importorskip("triton")

from moejet.kernels import card

LAUNCHERS = {
    "fused_add_rms_norm": "fused_add_rms_norm",
    "gather_latent": "gather_latent",
    "linear": "linear",
    "mla_decode": "mla_decode",
    "mla_prefill": "mla_prefill",
    "mla_prepare": "mla_prepare",
    "moe_experts": "moe_experts",
    "rms_norm": "rms_norm",
    "rope": "apply_rope",
    "router_topk": "router_topk",
    "sample": "sample_tokens",
    "silu_mul": "silu_mul",
    "store_latent": "store_latent",
    "top_logits": "top_logits",
}


class _Entered(Exception):
    pass


@pytest.mark.parametrize(("module", "name"), LAUNCHERS.items())
def test_launchers_enter_the_device_of_their_tensor(module, name, monkeypatch):
    x, seen = torch.empty(1), []

    def device_of(tensor):
        seen.append(tensor)
        raise _Entered

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    with pytest.raises(_Entered):
        getattr(importlib.import_module(f"moejet.kernels.{module}"), name)(x)
    assert seen[0] is x


def test_a_device_without_an_index_is_the_current_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(card, "_properties", lambda index: index)
    assert card.card_of(torch.device("cuda")) == 3
    assert card.card_of(torch.device("cuda", 0)) == 0
