"""Tokens per second, and how near that is to what this machine's memory can do.

A token has to read each weight that it uses once, so bytes over seconds cannot exceed the rate of plain reads.
`moejet bench` measures the same with all that belongs to it.
"""

from dataclasses import replace

from moejet import LLM
from moejet.ceilings import Meter
from moejet.presets import parse_preset

TOKENS, DEPTH = 16, 256  # generated behind a context of so many tokens

# Layers of a real shape with random weights: the embedded model is so small that caches hold it. A token reads as much
# where there are fewer experts to choose from.
shape = replace(parse_preset("deepseek-v2-lite:layers=2"), vocab_size=1024, num_experts=16)
with LLM.synthetic(shape, max_context=DEPTH + TOKENS + 1) as llm:
    meter = Meter(llm.engine.runner.pool)
    llm.bench_decode(TOKENS, DEPTH)  # warm-up
    before = meter.read().value
    seconds = min(llm.bench_decode(TOKENS, DEPTH) for _ in range(3))
    read_gbps = max(before, meter.read().value)
    token_bytes = llm.cost.decode_bytes(DEPTH + TOKENS / 2)

rate = TOKENS / seconds
gbps = rate * token_bytes / 1e9
print(f"{rate:.2f} tokens/s, {token_bytes / 1e6:.1f} MB per token: {gbps:.2f} GB/s")
print(f"memory can be read at {read_gbps:.2f} GB/s: {gbps / read_gbps:.0%} of it is used")
