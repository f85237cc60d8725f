"""Reading, packing and keeping weights: `checkpoint` or `gguf`, then `loader`; `packed_cache` for the next start."""
