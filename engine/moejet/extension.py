"""The compiled kernels, imported on first use so that configuration and planning work without them."""

import logging
from functools import cache
from types import ModuleType
from typing import Protocol

from moejet.environment import env_max_isa

logger = logging.getLogger(__name__)


class _Placed(Protocol):
    @property
    def bind_error(self) -> str: ...


def load_extension() -> ModuleType:
    """The module moejet._C. Raises ImportError with a remedy if it is not built."""
    try:
        from moejet import _C
    except ImportError as error:
        raise ImportError(
            f"the compiled kernels moejet._C cannot be loaded ({error}): install a wheel for this Python "
            "and this system, or run `pip install .` in the sources (needs a C++17 compiler)"
        ) from error
    return _C


def resolve_isa(isa: str = "auto") -> str:
    """The instruction set to use: the widest usable one up to MOEJET_MAX_ISA for "auto", else exactly `isa`."""
    resolved: str = load_extension().resolve_isa(isa, env_max_isa())
    return resolved


def report_placement(weights: _Placed) -> None:
    """Warns, once, if the system refused to place weights on their memory nodes."""
    if weights.bind_error:
        _warn_not_placed(weights.bind_error)


@cache
def _warn_not_placed(reason: str) -> None:
    logger.warning(
        "%s: weights lie where the worker that loads them runs; in a container, allow mbind "
        "(docker: --cap-add SYS_NICE)",
        reason,
    )
