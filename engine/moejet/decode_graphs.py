"""Steps that decode on a device: padded to one of a few sizes and, on CUDA, replayed as one graph each.

The graph holds model, choice of tokens, and the copy of the result. The first batch of a kind is launched operation by
operation and captured afterwards.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moejet.batch import Batch
from moejet.device_batch import PaddedBatch, padded_sizes
from moejet.environment import use_graphs, use_reference
from moejet.experts.bridge import CpuBridge
from moejet.models.deepseek import DeepseekForCausalLM
from moejet.ops.device_sampling import sample_on_device
from moejet.request import Request
from moejet.sampler import uniform

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Choice:
    """What a step's rows choose by, where the device does it: rows of the logits, and whose they are."""

    rows: list[int]
    requests: list[Request]

    @property
    def kind(self) -> tuple[bool, bool]:
        """Whether any row draws, and whether any cuts off: what decides about the launches."""
        params = [request.params for request in self.requests]
        return (
            any(p.temperature > 0.0 for p in params),
            any(p.top_k or p.top_p < 1.0 or p.min_p for p in params),
        )

    @property
    def uniforms(self) -> list[float]:
        return [uniform(r.seed, len(r.token_ids)) for r in self.requests]


Kind = tuple[bool, bool] | None  # of the choice; None: logits go to the host


@dataclass(slots=True)
class _Graph:
    """A captured step, and where it leaves its result: pinned, logits [n, V] fp32 or token ids [n] int32."""

    graph: torch.cuda.CUDAGraph
    result: Tensor


@dataclass(slots=True)
class DecodeStep:
    inputs: PaddedBatch
    graphs: dict[Kind, _Graph] = field(default_factory=dict)


class DecodeSteps:
    """Of a model with its cache [layers, blocks, block_size, row] on a device; used by one thread.

    steps: by the number of rows · uses_graphs: until a capture fails
    """

    def __init__(
        self,
        model: DeepseekForCausalLM,
        latent_cache: Tensor,
        bridge: CpuBridge | None,
        *,
        max_num_requests: int,
        max_context: int,
    ):
        self._model, self._latent_cache, self._bridge = model, latent_cache, bridge
        self._device = latent_cache.device
        self._max_context = max_context
        self._max_blocks = -(-max_context // latent_cache.shape[2])
        self._sizes = padded_sizes(max_num_requests)
        self.steps: dict[int, DecodeStep] = {}
        self.uses_graphs = self._device.type == "cuda" and use_graphs() and not use_reference()
        self._graph_memory: Any = None  # that all graphs share

    def takes(self, batch: Batch) -> bool:
        """Whether it is a decode batch: one new token of each request, and not too many of them."""
        return max(batch.query_lens) == 1 and len(batch.requests) <= self._sizes[-1]

    def padded(self, num_requests: int) -> int:
        """Rows of a decode step for so many requests."""
        return next(size for size in self._sizes if size >= num_requests)

    def input_bytes(self, num_requests: int) -> int:
        """What a decode step for so many requests moves to the device before it begins; 0 before the first one."""
        step = self.steps.get(self.padded(num_requests))
        return 0 if step is None else step.inputs.staging.nbytes

    def run(
        self,
        batch: Batch,
        choice: Choice | None,
        clock: Callable[[], AbstractContextManager[object]],
    ) -> Tensor:
        """Logits of all rows of a decode batch, or their tokens, of which only those of the choice mean anything.

        clock: entered around what is launched
        """
        size = self.padded(batch.num_tokens)
        step = self.steps.get(size)
        if step is None:
            inputs = PaddedBatch(
                size,
                self._model.embed_tokens.weight,
                self._device,
                max_context=self._max_context,
                max_blocks=self._max_blocks,
            )
            step = self.steps[size] = DecodeStep(inputs)
        kind = None if choice is None else choice.kind
        step.inputs.fill(batch)
        if choice is not None:
            step.inputs.fill_choice(
                choice.rows, [request.params for request in choice.requests], choice.uniforms
            )
        step.inputs.staging.upload()
        captured = step.graphs.get(kind)
        if captured is None:
            with clock():
                result = self.launch(step.inputs, kind).cpu()
            if self.uses_graphs:
                self._try_capture(step, kind)
            return result[: batch.num_tokens]
        with clock():
            captured.graph.replay()
        if self._bridge is not None:
            self._bridge.run_step(size)
        synchronize(self._device)
        return captured.result[: batch.num_tokens].clone()

    def launch(self, inputs: PaddedBatch, kind: Kind) -> Tensor:
        """Enqueues a step over the padded batch: logits [n, V] or token ids [n] on the device."""
        hidden = self._model.forward(inputs.batch(), self._latent_cache)
        logits = self._model.compute_logits(hidden)
        if kind is None:
            return logits
        is_random, has_cut_offs = kind
        columns = inputs.sampling(is_random=is_random, has_cut_offs=has_cut_offs)
        return sample_on_device(logits, columns)[0]

    def _try_capture(self, step: DecodeStep, kind: Kind) -> None:
        try:
            step.graphs[kind] = self._capture(step.inputs, kind)
        except RuntimeError as error:
            self.uses_graphs = False
            logger.warning(
                "steps cannot be captured as graphs (%s): they are launched operation by operation, which is slower",
                error,
            )
            if self._bridge is not None:
                self._bridge.reset()

    def _capture(self, inputs: PaddedBatch, kind: Kind) -> _Graph:
        """Records the same as a graph, after it has run once: all kernels are loaded then."""
        start = time.perf_counter()
        if self._graph_memory is None:
            self._graph_memory = torch.cuda.graph_pool_handle()
        vocab = self._model.config.vocab_size
        shape = (inputs.size,) if kind is not None else (inputs.size, vocab)
        dtype = torch.float32 if kind is None else torch.int32
        result = torch.empty(shape, dtype=dtype, pin_memory=True)
        graph = torch.cuda.CUDAGraph()
        synchronize(self._device)
        # Other threads may use the device meanwhile: the one that copies blocks to disk does.
        with torch.cuda.graph(graph, pool=self._graph_memory, capture_error_mode="thread_local"):
            result.copy_(self.launch(inputs, kind), non_blocking=True)
        elapsed = time.perf_counter() - start
        logger.debug("captured a graph for %d requests in %.2f s", inputs.size, elapsed)
        return _Graph(graph, result)


def synchronize(device: torch.device) -> None:
    """Waits for what the calling thread's current stream has been given."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()
