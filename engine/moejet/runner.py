"""Runs the model on one batch: owns the weights and the latent cache."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from moejet import huge_pages
from moejet.batch import Batch
from moejet.config import EngineConfig, ModelConfig
from moejet.cpu_program import CpuProgram
from moejet.environment import use_reference
from moejet.latent_layout import row_elements
from moejet.layers.dense import DenseWeights
from moejet.models.deepseek import DeepseekForCausalLM
from moejet.ops.latent_rows import CACHE_TYPES
from moejet.request import Request
from moejet.sampler import SampledToken

if TYPE_CHECKING:
    from moejet._C import ThreadPool


class Runner(Protocol):
    """What an engine needs: `ModelRunner` on the CPU, `gpu_runner.GpuRunner`."""

    model: DeepseekForCausalLM
    latent_cache: Tensor
    pool: ThreadPool
    isa: str
    native_seconds: float
    samples: bool  # whether `sample` may choose tokens

    def weights_loaded(self) -> None: ...
    def expert_loads(self) -> tuple[int, int]: ...
    def cache_counts(self) -> tuple[int, int, int]: ...
    def hidden(self, num_rows: int) -> Tensor | None: ...
    def execute(self, batch: Batch) -> Tensor: ...
    def sample(
        self, batch: Batch, rows: Sequence[int], requests: Sequence[Request]
    ) -> list[tuple[Request, SampledToken]] | None: ...


class ModelRunner:
    """The model and its cache [layers, blocks, block_size, row], rows as in `moejet.latent_layout`.

    A step is one native call, or goes through the torch layers with MOEJET_REF=1. native_seconds adds up the time spent
    in it, so that the rest of a step is known to be Python's.
    """

    samples = False

    def __init__(
        self,
        model: DeepseekForCausalLM,
        model_config: ModelConfig,
        config: EngineConfig,
        *,
        num_blocks: int,
        dense: DenseWeights,
    ):
        self.model = model
        self.pool = dense.pool
        self.isa = dense.isa
        shape = (
            model_config.num_hidden_layers,
            num_blocks,
            config.block_size,
            row_elements(
                model_config.kv_lora_rank, model_config.qk_rope_head_dim, config.cache_dtype
            ),
        )
        # Untouched pages cost nothing, and rows beyond a request's context are never read.
        self.latent_cache = huge_pages.empty(*shape, dtype=CACHE_TYPES[config.cache_dtype])
        self.native_seconds = 0.0
        self._program: CpuProgram | None = None
        self._hidden: Tensor | None = None
        if not use_reference():
            self._program = CpuProgram(
                model,
                self.latent_cache,
                max_tokens=config.max_batch_tokens,
                pool=dense.pool,
                isa=dense.isa,
                attention_form="invariant" if config.deterministic else "auto",
            )

    def weights_loaded(self) -> None:
        """To be called once, before the first batch."""

    def expert_loads(self) -> tuple[int, int]:
        """Routed experts read so far, and the bytes of their weights; zeros with MOEJET_REF=1."""
        return (0, 0) if self._program is None else self._program.expert_loads()

    def cache_counts(self) -> tuple[int, int, int]:
        """Zeros: there is no GPU that could have copies of experts."""
        return 0, 0, 0

    def hidden(self, num_rows: int) -> Tensor | None:
        """What the last logits were computed from [L, D], until the next step."""
        return self._hidden if self._program is None else self._program.hidden(num_rows)

    def sample(
        self, batch: Batch, rows: Sequence[int], requests: Sequence[Request]
    ) -> list[tuple[Request, SampledToken]] | None:
        """None: tokens are chosen from the logits of `execute`."""
        return None

    def execute(self, batch: Batch) -> Tensor:
        """Logits [L, V] fp32 of the rows batch.logits_indices; the batch's latents are in the cache afterwards."""
        start = time.perf_counter()
        try:
            for source, target in batch.block_copies:
                self.latent_cache[:, target] = self.latent_cache[:, source]
            batch.block_copies.clear()
            if self._program is not None:
                return self._program.run(batch)
            with torch.inference_mode():
                hidden = self.model.forward(batch, self.latent_cache)
                if batch.logits_indices.numel() == 0:
                    return hidden.new_empty((0, 0), dtype=torch.float32)
                self._hidden = hidden[batch.logits_indices]
                return self.model.compute_logits(self._hidden)
        finally:
            self.native_seconds += time.perf_counter() - start
