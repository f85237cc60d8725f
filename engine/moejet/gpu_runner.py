"""Runs the model on a GPU, with the routed experts that do not live there on the CPU.

Decode batches are padded and, on CUDA, replayed as one graph (`decode_graphs`). The calling thread then serves the
layers' CPU shares (`experts.bridge`) until the step is done. All other batches are launched operation by operation.

Prompts of many tokens do without the CPU: its experts stream to the GPU (`experts.expert_ring`).

Nothing but replays and copies is launched while the GPU waits for the CPU in mid-step: loading a kernel or asking the
driver for memory may wait for the GPU in turn.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moejet.batch import Batch
from moejet.config import EngineConfig, ModelConfig
from moejet.decode_graphs import Choice, DecodeSteps, synchronize
from moejet.device_batch import DeviceBatch
from moejet.experts.bridge import CpuBridge
from moejet.experts.expert_cache import ExpertCache
from moejet.experts.expert_ring import ExpertRing, Transfers
from moejet.experts.hybrid_experts import HybridExperts
from moejet.experts.placement import Placement
from moejet.experts.stream_threshold import stream_threshold
from moejet.gpu_memory import GpuMemory, key_chunk
from moejet.latent_layout import row_elements
from moejet.layers.gpu import GpuDenseWeights
from moejet.models.deepseek import DeepseekForCausalLM
from moejet.ops.device_sampling import SamplingTensors, sample_on_device
from moejet.ops.latent_rows import CACHE_TYPES
from moejet.request import Request
from moejet.sampler import SampledToken, sampled_token, samples_plainly

if TYPE_CHECKING:
    from moejet._C import ThreadPool

logger = logging.getLogger(__name__)

_abandoned: list[Any] = []  # of runners whose device did not come to rest

# Of logits that are on the device at a time.
_LOGITS_BYTES = 64 << 20


class GpuRunner:
    """`ModelRunner` for a model whose dense weights and cache [layers, blocks, block_size, row] are on a device."""

    samples = True

    def __init__(
        self,
        model: DeepseekForCausalLM,
        model_config: ModelConfig,
        config: EngineConfig,
        *,
        num_blocks: int,
        max_context: int,
        dense: GpuDenseWeights,
        pool: ThreadPool,
        isa: str,
        bridge: CpuBridge | None,
        ring: ExpertRing | None,
        expert_cache: ExpertCache | None,
    ):
        self.model, self.pool, self.isa = model, pool, isa
        self.device, self.bridge, self.ring = dense.device, bridge, ring
        self.expert_cache = expert_cache
        self._config, self._dtype = config, dense.dtype
        self._stream_tokens: int | None = None  # from which on a step streams; None: it does not
        self.native_seconds = 0.0
        # Entered around what a step launches: for measurements, see `hybrid_timing`.
        self.clock: Callable[[], AbstractContextManager[object]] = nullcontext
        # What the plan says, and what it may use.
        self.memory: GpuMemory | None = None
        self.vram_bytes = 0
        row = row_elements(
            model_config.kv_lora_rank, model_config.qk_rope_head_dim, config.cache_dtype
        )
        # Zeros: what masks exclude is multiplied by zero, and must be finite for that.
        self.latent_cache = torch.zeros(
            *(model_config.num_hidden_layers, num_blocks, config.block_size, row),
            dtype=CACHE_TYPES[config.cache_dtype],
            device=dense.device,
        )
        self._max_context = max_context
        self._key_chunk = key_chunk(model_config)
        self.decoding = DecodeSteps(
            model,
            self.latent_cache,
            bridge,
            max_num_requests=min(config.max_num_requests, config.max_batch_tokens),
            max_context=max_context,
        )
        self._has_to_reset = False  # the bridge, which was not possible after the last step

    def weights_loaded(self) -> None:
        """Prepares streaming: experts are pinned where they are, if they can be, and the threshold is decided."""
        if self.ring is None:
            return
        self.ring.prepare()
        if self.ring.is_pinned and self.expert_cache is not None:
            self.expert_cache.read_in_place()
        wanted = self._config.stream_prefill_tokens
        if wanted != "auto":
            self._stream_tokens = wanted
            return
        layers = [moe.experts for moe in self.model.moe_layers]
        most = self._config.max_batch_tokens
        self._stream_tokens = stream_threshold(
            self.ring,
            next(layer for layer in layers if isinstance(layer, HybridExperts) and layer.in_ram),
            self.model.config,
            max_tokens=most,
            dtype=self._dtype,
        )
        if self._stream_tokens > most:
            logger.info(
                "no step of max_batch_tokens=%d streams; a larger one would from %d on",
                most,
                self._stream_tokens,
            )

    def close(self) -> None:
        """Releases what experts travel through, once the device is done with it, and the graphs: none runs any more."""
        with self.on_device():
            try:
                if self.expert_cache is not None:
                    self.expert_cache.close()
                if self.bridge is not None:
                    self.bridge.close()
            except BaseException:
                if not self._is_idle():
                    # Waiting might never end, and what the device may still use has to stay.
                    _abandoned.append((self.ring, dict(self.decoding.steps)))
                    raise
                self._release()
                raise
            self._release()

    def _release(self) -> None:
        synchronize(self.device)
        if self.ring is not None:
            self.ring.close()
        self.decoding.steps.clear()

    def _is_idle(self) -> bool:
        return self.device.type != "cuda" or torch.cuda.current_stream(self.device).query()

    @property
    def placement(self) -> Placement:
        """Where the routed experts live."""
        assert self.memory is not None
        return self.memory.placement

    def transfers(self) -> Transfers:
        """What has been copied of experts so far; any thread may ask, and nothing waits."""
        streamed = Transfers() if self.ring is None else self.ring.transfers()
        if self.expert_cache is None:
            return streamed
        fetched = self.expert_cache.counters
        return replace(
            streamed,
            fetched_bytes=fetched.fetched_bytes,
            copy_seconds=streamed.copy_seconds + fetched.copy_seconds,
        )

    def expert_loads(self) -> tuple[int, int]:
        """Routed experts that the CPU has read so far, and the bytes of their weights."""
        if self.bridge is None:
            return 0, 0
        counters = self.bridge.counters()
        return int(counters["distinct_experts"]), int(counters["weight_bytes"])

    def cache_counts(self) -> tuple[int, int, int]:
        """Uses of experts in layers with a cache, how many of them it had, and bytes fetched for it."""
        if self.expert_cache is None:
            return 0, 0, 0
        counters = self.expert_cache.counters
        return counters.uses, counters.hits, counters.fetched_bytes

    def hidden(self, num_rows: int) -> Tensor | None:
        """Not kept: a captured step hands out logits or tokens only."""
        return None

    def execute(self, batch: Batch) -> Tensor:
        """Logits [L, V] fp32 on the CPU of the rows batch.logits_indices; their latents are in the cache afterwards."""
        if self.decoding.takes(batch):
            logits = self._timed(lambda: self._decode(batch))
            return logits[batch.logits_indices]
        return self._timed(lambda: self._run(batch))

    def sample(
        self, batch: Batch, rows: Sequence[int], requests: Sequence[Request]
    ) -> list[tuple[Request, SampledToken]] | None:
        """Computes a batch and chooses a token for each of `requests` from its logits' row, on the device.

        rows: as of `batch.logits_indices`. None, and nothing is computed, if that is not possible: they want more than
        temperature and cut-offs, or logits or scores to look at.
        """
        if not requests or not all(samples_plainly(request) for request in requests):
            return None
        if any(request.scores is not None for request in batch.sampled):
            return None
        if self.decoding.takes(batch) and len(set(rows)) == len(rows):
            at = batch.logits_indices[list(rows)].tolist()
            choice = Choice(at, list(requests))
            tokens = self._timed(lambda: self._decode(batch, choice))[at]
        else:
            choice = Choice(list(rows), list(requests))
            tokens = self._timed(lambda: self._run(batch, choice))
        return [
            (request, sampled_token(request, token))
            for request, token in zip(requests, tokens.tolist(), strict=True)
        ]

    def _timed(self, step: Callable[[], Tensor]) -> Tensor:
        """Runs a step to its end; if it fails, what it left on the stream is let through."""
        start = time.perf_counter()
        try:
            if self._has_to_reset:
                self._reset_bridge()
            with torch.inference_mode(), self.on_device():
                if self.expert_cache is not None:
                    self.expert_cache.advance()
                result = step()
                synchronize(self.device)
            return result
        except BaseException as error:
            if self.bridge is not None:
                try:
                    self._reset_bridge()
                except RuntimeError as second:
                    self._has_to_reset = True
                    error.add_note(f"and the device does not come to rest: {second}")
            raise
        finally:
            self.native_seconds += time.perf_counter() - start

    def _reset_bridge(self) -> None:
        """On the model's device: what is asked about its stream concerns the current one."""
        assert self.bridge is not None
        with self.on_device():
            self.bridge.reset()
        self._has_to_reset = False

    def on_device(self) -> AbstractContextManager[object]:
        """The calling thread may have another current device than the one that loaded the model."""
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _copy_blocks(self, batch: Batch) -> None:
        for source, target in batch.block_copies:
            self.latent_cache[:, target] = self.latent_cache[:, source]
        batch.block_copies.clear()

    def _decode(self, batch: Batch, choice: Choice | None = None) -> Tensor:
        self._copy_blocks(batch)
        return self.decoding.run(batch, choice, self.clock)

    def _run(self, batch: Batch, choice: Choice | None = None) -> Tensor:
        """A batch of any kind, launched operation by operation: logits [L, V], or a token per row of the choice."""
        self._copy_blocks(batch)
        there = DeviceBatch.of(
            batch,
            self.model.embed_tokens.weight,
            self.device,
            max_context=self._max_context,
            max_key_chunk=self._key_chunk,
        )
        with self.clock():
            with self._streaming(batch.num_tokens):
                hidden = self.model.forward(there, self.latent_cache)
            return self._results(there, hidden, choice)

    def _results(self, there: DeviceBatch, hidden: Tensor, choice: Choice | None) -> Tensor:
        """Of the rows that are wanted, on the CPU: logits, or the tokens of the choice."""
        assert there.logits_indices is not None
        wanted = there.logits_indices
        if choice is not None:
            wanted = wanted[torch.tensor(choice.rows, device=self.device)]
        vocab = self.model.config.vocab_size
        rows = max(1, _LOGITS_BYTES // (4 * vocab))
        parts = []
        for begin in range(0, wanted.shape[0], rows):
            logits = self.model.compute_logits(hidden[wanted[begin : begin + rows]])
            if choice is None:
                parts.append(logits.cpu())
                continue
            part = slice(begin, begin + rows)
            columns = SamplingTensors.of(
                [request.params for request in choice.requests[part]],
                choice.uniforms[part],
                device=self.device,
                adjust=False,
            )
            parts.append(sample_on_device(logits, columns)[0].cpu())
        return torch.cat(parts) if parts else torch.empty(0, 0)

    def _streaming(self, num_tokens: int) -> AbstractContextManager[None]:
        """In which the layers' experts in RAM stream to the GPU, if there are enough tokens."""
        if self.ring is None or self._stream_tokens is None or num_tokens < self._stream_tokens:
            return nullcontext()
        return self.ring.step()
