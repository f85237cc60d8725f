"""Tries what a model on the GPU needs: `python -m moejet.cli.gpu_selftest` prints JSON.

`moejet doctor` starts this as a process of its own, because what it looks for may hang or end the process that looks:
a Triton kernel is compiled and run, then layers of experts are handed to the CPU, one by one and in a graph.
"""

import json
import statistics
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from moejet.experts.bridge import Stream

EXPERTS, HIDDEN, INTERMEDIATE, TOP_K, LAYERS, TOKENS = 4, 256, 128, 2, 8, 2
_REPLAYS = 50


def kernel_error(device: "torch.device") -> float:
    """Of a small Triton kernel, against its torch reference."""
    import torch

    from moejet.ops.rms_norm import rms_norm, rms_norm_ref

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, HIDDEN, generator=generator).to(device)
    weight = torch.randn(HIDDEN, generator=generator).to(device)
    arguments = (x, weight, 1e-6)
    ours = rms_norm(*arguments, out_dtype=torch.float32)
    theirs = rms_norm_ref(*arguments, out_dtype=torch.float32)
    return float((ours - theirs).abs().max())


def hand_over(stream: "Stream") -> dict[str, Any]:
    """Whether results come back right, how flags are set, and what a layer costs that has next to nothing to compute.

    Where `stream` is a CUDA one, layers are captured in a graph and timed in its replays; else one by one.
    """
    import torch

    from moejet.experts.bridge import CpuBridge
    from moejet.experts.cpu_experts import CpuExperts, create_pool

    pool = create_pool()
    try:
        layers = [
            CpuExperts(EXPERTS, HIDDEN, INTERMEDIATE, format="bf16", pool=pool)
            for _ in range(LAYERS)
        ]
        for seed, layer in enumerate(layers):
            layer.fill_random(seed)
        bridge = CpuBridge(
            layers, stream, top_k=TOP_K, max_tokens=TOKENS, dtype=torch.float32, timeout_s=10.0
        )
        generator = torch.Generator().manual_seed(1)
        x = torch.randn(TOKENS, HIDDEN, generator=generator)
        ids = torch.rand(TOKENS, EXPERTS, generator=generator).argsort(-1)[:, :TOP_K].int()
        mix = torch.rand(TOKENS, TOP_K, generator=generator)
        expected = x
        for layer in layers:
            out = torch.empty_like(x)
            layer.run_kernels(expected, ids, mix, out)
            expected = out
        given = [tensor.to(stream.device) for tensor in (x, ids, mix)]

        def enqueue() -> torch.Tensor:
            y = given[0]
            for layer in range(LAYERS):
                bridge.submit(layer, y, given[1], given[2])
                y = bridge.collect(layer)
            return y

        error = float((enqueue().cpu() - expected).abs().max())
        run = enqueue if stream.device.type == "cpu" else _captured(enqueue, bridge)
        error = max(error, float((run().cpu() - expected).abs().max()))
        seconds = []
        with bridge.answering_at_once():
            for _ in range(_REPLAYS):
                start = time.perf_counter()
                run()
                seconds.append(time.perf_counter() - start)
        mode, reason = getattr(stream, "mode", "simulated"), getattr(stream, "reason", "")
        bridge.close()
        return {
            "error": error,
            "mode": mode,
            "reason": reason,
            "layer_us": 1e6 * statistics.median(seconds) / LAYERS,
        }
    finally:
        pool.close()


def _captured(enqueue: "Callable[[], torch.Tensor]", bridge: Any) -> "Callable[[], torch.Tensor]":
    import torch

    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        result = enqueue()

    def run() -> torch.Tensor:
        graph.replay()
        bridge.run_step(TOKENS)
        torch.cuda.synchronize()
        return result

    return run


def main() -> None:
    """Print one JSON line per step, so that the reader knows the last step before a crash."""
    import torch

    from moejet.experts.bridge import CudaStream

    device = torch.device("cuda", torch.cuda.current_device())
    print(json.dumps({"start": "a Triton kernel"}), flush=True)
    print(json.dumps({"done": "kernel", "error": kernel_error(device)}), flush=True)
    print(json.dumps({"start": "handing layers to the CPU"}), flush=True)
    print(json.dumps({"done": "hand-over", **hand_over(CudaStream(device))}), flush=True)


if __name__ == "__main__":
    main()
