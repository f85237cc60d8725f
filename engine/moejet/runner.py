"""Runs the model on one batch: owns the weights and the latent cache."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from moejet.batch import Batch
from moejet.config import EngineConfig, ModelConfig
from moejet.models.deepseek import DeepseekForCausalLM

_MIN_TOKENS_FOR_TORCH_THREADS = 32
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
        # Time spent in forward passes so far: what a step takes beyond it is overhead.
        self.native_seconds = 0.0

    @contextmanager
    def _computing(self, batch: Batch) -> Iterator[None]:
        """Inference mode; torch's threads only where its share is worth them.

        After a parallel operation torch's workers spin for a while on the CPUs that our own pool needs next. A step of
        few tokens gives torch only small operations, so it gets one thread.
        """
        before = torch.get_num_threads()
        if batch.num_tokens < _MIN_TOKENS_FOR_TORCH_THREADS and before > 1:
            torch.set_num_threads(1)
        try:
            with torch.inference_mode():
                yield
        finally:
            if torch.get_num_threads() != before:
                torch.set_num_threads(before)

    def execute(self, batch: Batch) -> Tensor:
        """Logits [L, V] fp32 of the rows batch.logits_indices; the batch's latents are in the cache afterwards."""
        start = time.perf_counter()
        with self._computing(batch):
            hidden = self.model.forward(batch, self.latent_cache)
            if batch.logits_indices.numel() == 0:
                logits = hidden.new_empty((0, 0), dtype=torch.float32)
            else:
                logits = self.model.compute_logits(hidden[batch.logits_indices])
        self.native_seconds += time.perf_counter() - start
        return logits
