"""moejet: runs DeepSeek-class mixture-of-experts reasoners on one GPU plus RAM, or on the CPU.

>>> from moejet import LLM
>>> with LLM() as llm:                                    # the embedded tiny reasoner
...     print(llm.chat([{"role": "user", "content": "Start with 17, add 25."}])[0].text)

Importing this package loads neither torch nor the C++ extension nor Triton; first use does.
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
