"""What Triton specialises kernels by: once a graph is captured, nothing may be compiled any more."""

from collections import defaultdict

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from moejet import LLM
from moejet.batch import Batch
from moejet.testing.checkpoints import tiny_checkpoint

OPTIONS = {
    "device": "simulated",
    "gpu_experts": 5,
    "expert_cache": 4,
    "expert_format": "int4_g32",
    "dense_format": "int8",
    "cache_dtype": "fp32",
    "max_context": 64,
    "isa": "avx2",
    "stream_prefill_tokens": 0,
}


# What the CPU is told to compute must be sensible; other results are whatever was in memory.
_COMPUTED = ("_router_topk_kernel", "_hand_over_kernel")


def _kind(value):
    """As Triton sees an argument: a pointer's type and alignment, an integer's being 1 or a multiple of 16."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return "1" if value == 1 else "16" if value % 16 == 0 else "int"
    return value


@pytest.fixture
def launched(monkeypatch):
    """{kernel: [kinds of its arguments, one set for each launch that differs]} since the last clear()."""
    seen = defaultdict(set)
    run = InterpretedFunction.run

    def record(self, *args, **kwargs):
        options = {name: value for name, value in kwargs.items() if name not in ("grid", "warmup")}
        kinds = tuple(_kind(value) for value in args)
        seen[self.fn.__name__].add((kinds, tuple(sorted(options.items(), key=str))))
        if self.fn.__name__ in _COMPUTED:
            run(self, *args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", record)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    return seen


def _unaligned(launched):
    """[(kernel, number of the argument)] of pointers that are no multiple of 16."""
    return [
        (name, number)
        for name, launches in launched.items()
        for kinds, _ in launches
        for number, kind in enumerate(kinds)
        if isinstance(kind, tuple) and not kind[1]
    ]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_capture_launches_what_the_first_step_compiled(tmp_path, launched):
    """And all its tensors are aligned: views into staging buffers and tables too, those of prompts as well."""
    shape = {"qk_rope_head_dim": 16, "num_hidden_layers": 3, "moe_intermediate_size": 96}
    path = tiny_checkpoint(tmp_path, "deepseek_v3", dtype=torch.bfloat16, **shape)
    with LLM(path, **OPTIONS) as llm:
        runner, size = llm.engine.runner, llm.config.block_size
        runner.expert_cache._stream._stream.synchronize()
        with llm.engine.scratch_request([7, 5, 9]) as a, llm.engine.scratch_request([3]) as b:
            launched.clear()
            runner.execute(Batch.build([a, b], [2, 1], block_size=size))
            prompt = {name: set(kinds) for name, kinds in launched.items()}
            a.num_computed_tokens = 2
            launched.clear()
            runner.execute(Batch.build([a, b], [1, 1], block_size=size))
            first = {name: set(kinds) for name, kinds in launched.items()}
            launched.clear()
            [step] = runner.decoding.steps.values()
            with torch.inference_mode():
                runner.decoding.launch(step.inputs, None)  # as `_capture` does
        assert dict(launched) == first
        assert _unaligned(first) == _unaligned(prompt) == []
        # Layers share their kernels: rows of the cache's tables begin as aligned as the first.
        for name in ("_hand_over_kernel", "_gate_up_kernel"):
            assert len(first[name]) == 1
            assert sum(isinstance(kind, tuple) for kind in next(iter(first[name]))[0]) >= 6
