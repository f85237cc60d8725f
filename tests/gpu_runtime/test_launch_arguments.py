"""A whole step as a GPU would get it, on meta tensors: what is launched takes the device's tensors and no others.

torch refuses to mix meta tensors with the CPU's, and the launchers check shapes, types and strides as they do on a GPU.
Kernels neither run nor compile.
"""

from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch

from moejet.batch import Batch
from moejet.config import ModelConfig
from moejet.device_batch import DeviceBatch, PaddedBatch
from moejet.experts.hybrid_experts import HybridExperts
from moejet.experts.resident_experts import ResidentExperts
from moejet.latent_layout import row_elements
from moejet.layers.gpu import GpuDenseWeights
from moejet.models.deepseek import DeepseekForCausalLM
from moejet.ops.device_sampling import SamplingTensors, sample_on_device
from moejet.ops.latent_rows import CACHE_TYPES
from moejet.request import Request, SamplingParams
from moejet.testing.checkpoints import FAMILIES, hf_config

META = torch.device("meta")


class Bridge:
    """Checks what it is given, as the copies to pinned memory need it."""

    def __init__(self):
        self.pending = {}

    def submit(self, layer, x, topk_ids, topk_weights, **tables):
        assert all(table is None or table.device == META for table in tables.values())
        for tensor, dtype in (
            (x, torch.bfloat16),
            (topk_ids, torch.int32),
            (topk_weights, torch.float32),
        ):
            assert tensor.device == META
            assert tensor.dtype == dtype
            assert tensor.is_contiguous()
        self.pending[layer] = x

    def collect(self, layer):
        return torch.empty_like(self.pending.pop(layer))


@pytest.fixture
def launched(monkeypatch):
    """Names of the kernels that were launched. Meta tensors say that they are a GPU's."""
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    from moejet.kernels.card import CARDS, pretend

    names = []

    def record(self, *args, grid, warmup, **kwargs):
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        assert tensors, self.fn.__name__
        assert {tensor.device for tensor in tensors} == {META}, self.fn.__name__
        names.append(self.fn.__name__)

    is_cuda = property(lambda tensor: tensor.device.type == "meta")
    monkeypatch.setattr(torch.Tensor, "is_cuda", is_cuda, raising=False)
    with patch.object(JITFunction, "run", record), pretend(CARDS[90]):
        yield names


def _request(length: int, done: int, first_block: int) -> Request:
    request = Request(
        request_id=str(first_block),
        index=0,
        prompt_token_ids=tuple(range(length)),
        params=SamplingParams(top_p=0.9),
        seed=0,
        max_total_tokens=length + 1,
        eos_token_ids=frozenset(),
    )
    request.num_computed_tokens = done
    request.block_table = list(range(first_block, first_block + -(-length // 16)))
    return request


def _model(config: ModelConfig, resident: int, dense_format: str, format: str):
    sizes = (config.num_experts, config.hidden_size, config.moe_intermediate_size)

    def make_experts(layer: int) -> HybridExperts:
        there = here = None
        if resident:
            kind = {"format": format, "down_format": format, "device": META}
            there = ResidentExperts(range(resident), *sizes, **kind)
        if resident < config.num_experts:
            here = SimpleNamespace(pool=None)
        experts = HybridExperts(here, there)
        if here is not None:
            experts.attach(Bridge(), layer)
        return experts

    dense = GpuDenseWeights(dense_format, META, torch.bfloat16, {})
    return DeepseekForCausalLM(config, make_experts=make_experts, dense=dense, max_context=256)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("resident", "dense_format", "format", "cache"),
    [(0, "int8", "int4_g32", "bf16"), (3, "fp8", "int8", "fp8"), (8, "bf16", "bf16", "bf16")],
)
def test_steps(family, resident, dense_format, format, cache, launched):
    overrides = {"qk_rope_head_dim": 16, "kv_lora_rank": 64, "num_hidden_layers": 2}
    config = ModelConfig.from_hf(hf_config(family, **overrides))
    config = replace(config, max_position_embeddings=256)
    model = _model(config, min(resident, config.num_experts), dense_format, format)
    row = row_elements(config.kv_lora_rank, config.qk_rope_head_dim, cache)
    caches = torch.zeros(2, 40, 16, row, dtype=CACHE_TYPES[cache], device=META)
    embedding = model.embed_tokens.weight
    for size in (1, 8, 24):
        padded = PaddedBatch(size, embedding, META, max_context=256, max_blocks=16)
        logits = model.compute_logits(model.forward(padded.batch(), caches))
        assert (logits.dtype, logits.shape) == (torch.float32, (size, config.vocab_size))
        for is_random, has_cut_offs in ((False, False), (True, False), (True, True)):
            columns = padded.sampling(is_random=is_random, has_cut_offs=has_cut_offs)
            tokens = sample_on_device(logits, columns)[0]
            assert (tokens.device, tokens.dtype) == (META, torch.int32)
    assert len(launched) > 30
    # A prompt; single tokens beside prompts; short queries of one length.
    for lens in ([(90, 0)], [(70, 69), (40, 0), (9, 8)], [(12, 4), (9, 1)]):
        before = len(launched)
        requests = [_request(*sizes, 1 + 10 * i) for i, sizes in enumerate(lens)]
        batch = Batch.build(requests, [n - done for n, done in lens], block_size=16)
        there = DeviceBatch.of(batch, embedding, META, max_context=256, max_key_chunk=64)
        hidden = model.forward(there, caches)
        logits = model.compute_logits(hidden[there.logits_indices])
        assert logits.shape == (len(lens), config.vocab_size)
        params = [request.params for request in requests]
        columns = SamplingTensors.of(params, [0.5] * len(lens), device=META, adjust=False)
        assert sample_on_device(logits, columns)[0].shape == (len(lens),)
        assert len(launched) > before + 10
