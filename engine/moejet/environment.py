"""Everything that is read from the environment: the variables MOEJET_*."""

from __future__ import annotations

import logging
import math
import os
from pathlib import Path

from moejet.config import DEVICES, ISAS
from moejet.validation import require_choice


def env_max_isa() -> str | None:
    """MOEJET_MAX_ISA: the widest instruction set that "auto" may choose; it can only lower."""
    value = os.environ.get("MOEJET_MAX_ISA")
    if value is not None:
        require_choice("MOEJET_MAX_ISA", value, ISAS)
    return value


def env_num_threads() -> int | None:
    """MOEJET_NUM_THREADS: CPU workers, where the engine option is not given."""
    value = os.environ.get("MOEJET_NUM_THREADS")
    if value is None:
        return None
    if not value.isdigit() or int(value) == 0:
        raise ValueError(f"MOEJET_NUM_THREADS={value!r} must be a positive integer")
    return int(value)


def openmp_spins() -> bool:
    """Whether idle OpenMP threads keep their cores busy for a while: so unless its variables say otherwise."""
    names = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    passive = os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive"
    return not passive and not any(name in os.environ for name in names)


def env_numa_nodes() -> int | None:
    """MOEJET_NUMA_NODES: memory nodes to divide weights among, in place of the machine's.

    1 switches the division off. Any other number that is not the machine's makes virtual nodes: workers and weights are
    divided as they would be, but memory is not placed (for tests).
    """
    value = os.environ.get("MOEJET_NUMA_NODES")
    if value is None:
        return None
    if not value.isdigit() or not 1 <= int(value) <= 64:
        raise ValueError(f"MOEJET_NUMA_NODES={value!r} must be an integer from 1 to 64")
    return int(value)


def env_cache_dir() -> Path | None:
    """MOEJET_CACHE: where packed weights are kept, or "off"; default: moejet in the user's cache directory."""
    value = os.environ.get("MOEJET_CACHE")
    if value == "off":
        return None
    if value:
        return Path(value).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "moejet"


def env_device() -> str:
    """MOEJET_DEVICE: what device="auto" stands for, auto or cpu or cuda."""
    value = os.environ.get("MOEJET_DEVICE", "auto")
    require_choice("MOEJET_DEVICE", value, DEVICES[:3])
    return value


def env_worker_timeout() -> float:
    """MOEJET_WORKER_TIMEOUT: seconds, beside 2 ns per multiplication, that CPU workers may take for a layer's experts.

    Then a step on a GPU fails, instead of waiting for a worker that does not come back.
    """
    value = os.environ.get("MOEJET_WORKER_TIMEOUT", "3")
    try:
        seconds = float(value)
    except ValueError:
        seconds = math.nan
    if not seconds > 0:
        raise ValueError(f"MOEJET_WORKER_TIMEOUT={value!r} must be a number of seconds above 0")
    return seconds


def use_graphs() -> bool:
    """MOEJET_EAGER=1: a GPU's steps are launched operation by operation, for debugging; 0: graphs where possible."""
    value = os.environ.get("MOEJET_EAGER", "0")
    if value not in ("0", "1"):
        raise ValueError(f"MOEJET_EAGER={value!r} must be 0 or 1")
    return value == "0"


def env_api_key() -> str | None:
    """MOEJET_API_KEY: a key that clients of `moejet serve` have to show, beside those of its options."""
    return os.environ.get("MOEJET_API_KEY")


def use_reference() -> bool:
    """MOEJET_REF=1: every operation runs its slow torch reference (for bisecting)."""
    value = os.environ.get("MOEJET_REF", "0")
    if value not in ("0", "1"):
        raise ValueError(f"MOEJET_REF={value!r} must be 0 or 1")
    return value == "1"


def env_log_level() -> int:
    """MOEJET_LOG: debug, info, warning or error."""
    value = os.environ.get("MOEJET_LOG", "warning").lower()
    levels = {"debug": logging.DEBUG, "info": logging.INFO}
    levels.update({"warning": logging.WARNING, "error": logging.ERROR})
    require_choice("MOEJET_LOG", value, levels)
    return levels[value]
