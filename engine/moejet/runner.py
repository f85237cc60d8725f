"""Runs the model on one batch: owns the weights and the latent cache."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from moejet.batch import Batch
from moejet.config import EngineConfig, ModelConfig
from moejet.models.deepseek import DeepseekForCausalLM

logger = logging.getLogger(__name__)

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class ModelRunner:
    """The model and its cache [layers, blocks, block_size, C + R]."""

    def __init__(
        self,
        model: DeepseekForCausalLM,
        model_config: ModelConfig,
        config: EngineConfig,
        *,
        num_blocks: int,
    ):
        self.model = model
        shape = (
            model_config.num_hidden_layers,
            num_blocks,
            config.block_size,
            model_config.latent_dim,
        )
        # Untouched pages cost nothing, and rows beyond a request's context are never read.
        self.latent_cache = torch.empty(shape, dtype=DTYPES[config.cache_dtype])

    @torch.inference_mode()
    def execute(self, batch: Batch) -> Tensor:
        """Logits [L, V] fp32 of the rows batch.logits_indices; the batch's latents are in the cache afterwards."""
        hidden = self.model.forward(batch, self.latent_cache)
        if batch.logits_indices.numel() == 0:
            return hidden.new_empty((0, 0), dtype=torch.float32)
        return self.model.compute_logits(hidden[batch.logits_indices])

    @torch.inference_mode()
    def execute_hidden(self, batch: Batch) -> Tensor:
        """Final hidden states [T, D] of all tokens of the batch."""
        return self.model.forward(batch, self.latent_cache)
