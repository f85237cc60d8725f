"""Measures how fast this machine reads memory: the ceiling for generating tokens one at a time.

Every generated token reads the weights of its experts once, so bytes per token divided by this
rate is the least time that a token can take.
"""

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from moejet import topology

_REPETITIONS = 5


def probe_bytes() -> int:
    """Size of the probe: well beyond the last-level cache, at most a quarter of free memory."""
    wanted = max(1 << 30, 4 * (topology.last_level_cache_bytes() or 0))
    available = topology.memory().available_bytes
    return wanted if available is None else min(wanted, available // 4)


def measure_read_rate(num_threads: int, num_bytes: int) -> float:
    """Best bytes per second over a few passes of `num_threads` threads through `num_bytes`.

    The best pass counts, because other programs can only make a pass slower. numpy's reductions
    release the interpreter lock and are vectorised, so the memory is what limits them.
    """
    data = np.empty(num_bytes // 8, dtype=np.int64)
    parts = np.array_split(data, num_threads)
    best_s = float("inf")
    with ThreadPoolExecutor(num_threads) as pool:
        # Written by all threads, so that the pages exist and lie on the nodes of their threads.
        list(pool.map(lambda part: part.fill(1), parts))
        for _ in range(_REPETITIONS + 1):  # the first pass starts the threads
            start = time.perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            best_s = min(best_s, time.perf_counter() - start)
    return data.nbytes / best_s
