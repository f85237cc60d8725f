"""moejet: runs DeepSeek-class mixture-of-experts reasoners on one GPU plus RAM, or on the CPU.

>>> from moejet import LLM
>>> with LLM() as llm:                                    # the embedded tiny reasoner
...     print(llm.chat([{"role": "user", "content": "Start with 17, add 25."}])[0].text)

Importing this package loads neither torch nor the C++ extension nor Triton; first use does.

A token's way, by modules of this package:

1. Who asks. `moejet run` and Python call `llm.LLM`, which steps the engine on the caller's thread. An HTTP request is
   checked, rendered and tokenised (`server.routes`, `server.protocol`, `server.prompts`), becomes jobs of a
   `server.generation.Generation`, and goes by a `server.backend.Backend`, here or over `server.frames` in the
   engine's own process, to `async_llm.AsyncLLM`: a ticket (`engine_state`) and a command for the engine's thread
   (`engine_loop`).
2. `engine.Engine.add_request`: a prompt with n samples is a `group.Group` of n `request.Request`s, checked by
   `request_rules`. A request is a number, num_computed_tokens, that catches up with its tokens.
3. `engine.Engine.step` asks `scheduler.Scheduler.schedule`: prefixes are found by their hashes, blocks taken from
   `block_pool` (behind it `prefix_tier`, on disk), long prompts cut into chunks. The outcome is a `batch.Batch`.
4. `step_compute` has a `runner.Runner` compute it, in parts if it fails. On the CPU (`runner.ModelRunner`) the whole
   model was recorded once as a native program, `cpu_program`, csrc/program.h: a step is one call and one parallel
   region (csrc/thread_pool.h). On a GPU (`gpu_runner`) a step that decodes is one CUDA graph, any other is launched
   operation by operation.
5. `models.deepseek` is that model in readable form: the GPU and MOEJET_REF=1 run it as it stands. Per layer, norm and
   attention over the latent cache (`layers.mla`, on a device `layers.gpu`), then norm, router and experts
   (`layers.moe`). Routed experts are packed in RAM (`experts.cpu_experts`, csrc/moe.h) or, beside a GPU, wherever
   they live (`experts.hybrid_experts`): in its memory, as copies of those asked for most, streamed for long prompts,
   or computed by the CPU (`experts.bridge`) while the GPU computes the shared ones.
6. `sampler.sample` turns logits into tokens, keyed by seed and position (`ops.sample`; on a GPU
   `ops.device_sampling`).
7. `engine.Engine.step` commits: policies may replace the token or inject others (`sample_state`), `commit` appends it
   under the stop rules, and an `output.OutputAssembler` makes text of it: bytes to characters
   (`tokenizer.IncrementalDecoder`), thinking from answer, stop strings cut.
8. `request.StreamDelta` by delta it goes back: to who steps the `LLM`, or by a `mailbox` and a `request_stream` to an
   event loop, where the dialect's renderer writes it out. The last delta holds the `request.RequestOutput`.
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "LLM": "moejet.llm",
    "AsyncLLM": "moejet.async_llm",
    "RequestStream": "moejet.request_stream",
    "QueueFullError": "moejet.ticket",
    "EngineStepError": "moejet.ticket",
    "EngineDeadError": "moejet.ticket",
    "EngineClosedError": "moejet.ticket",
    "SamplingParams": "moejet.request",
    "RequestOutput": "moejet.request",
    "CompletionOutput": "moejet.request",
    "StreamDelta": "moejet.request",
    "TokenLogprobs": "moejet.request",
    "Timings": "moejet.request",
    "Grammar": "moejet.grammar",
    "TokenPolicy": "moejet.policy",
    "ModelConfig": "moejet.config",
    "EngineConfig": "moejet.config",
}

if TYPE_CHECKING:
    from moejet.async_llm import AsyncLLM as AsyncLLM
    from moejet.config import EngineConfig as EngineConfig
    from moejet.config import ModelConfig as ModelConfig
    from moejet.grammar import Grammar as Grammar
    from moejet.llm import LLM as LLM
    from moejet.policy import TokenPolicy as TokenPolicy
    from moejet.request import CompletionOutput as CompletionOutput
    from moejet.request import RequestOutput as RequestOutput
    from moejet.request import SamplingParams as SamplingParams
    from moejet.request import StreamDelta as StreamDelta
    from moejet.request import Timings as Timings
    from moejet.request import TokenLogprobs as TokenLogprobs
    from moejet.request_stream import RequestStream as RequestStream
    from moejet.ticket import EngineClosedError as EngineClosedError
    from moejet.ticket import EngineDeadError as EngineDeadError
    from moejet.ticket import EngineStepError as EngineStepError
    from moejet.ticket import QueueFullError as QueueFullError

__all__ = [
    "LLM",
    "AsyncLLM",
    "CompletionOutput",
    "EngineClosedError",
    "EngineConfig",
    "EngineDeadError",
    "EngineStepError",
    "Grammar",
    "ModelConfig",
    "QueueFullError",
    "RequestOutput",
    "RequestStream",
    "SamplingParams",
    "StreamDelta",
    "Timings",
    "TokenLogprobs",
    "TokenPolicy",
    "__version__",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'moejet' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__
