"""Loading a model: first start (read, pack, cache), second start (map), each in a process of its own.

    python bench/load.py --directory DIR [--shape deepseek-v2-lite:layers=16] [--stored fp8] [--format native]

Writes a checkpoint of random weights into DIR (kept for the next run; remove it by hand) and measures: the disk's read
rate with the page cache dropped, the packing rate from memory, the first start with the source files dropped from the
page cache, the time to the first token of the second start, and how far resident memory rises above the packed size.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from moejet.cli.environment import describe_environment
from moejet.cli.results import add_json_option, line_writer
from moejet.config import EngineConfig, ModelConfig
from moejet.experts.cpu_experts import CpuExperts, create_pool
from moejet.layers.dense import DenseWeights
from moejet.loading import create_model
from moejet.presets import parse_preset
from moejet.testing.byte_tokenizer import write_tokenizer
from moejet.testing.checkpoints import write_safetensors

SHARD_BYTES = 2 << 30
_KEYS = {
    "num_experts": "n_routed_experts",
    "num_shared_experts": "n_shared_experts",
}


def hf_config(config: ModelConfig, stored: str) -> dict[str, Any]:
    """The config.json of a preset (rope of default type: it does not matter here)."""
    names = (
        *("model_type", "vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size"),
        *("num_hidden_layers", "num_attention_heads", "kv_lora_rank", "qk_nope_head_dim"),
        *("qk_rope_head_dim", "v_head_dim", "num_experts", "num_experts_per_tok"),
        *("num_shared_experts", "first_k_dense_replace", "q_lora_rank", "n_group", "topk_group"),
        *("scoring_func", "topk_method", "routed_scaling_factor", "rms_norm_eps"),
        *("max_position_embeddings", "norm_topk_prob"),
    )
    raw = {_KEYS.get(name, name): getattr(config, name) for name in names}
    raw |= {"bos_token_id": 0, "eos_token_id": 1}
    if stored == "fp8":
        raw["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    return raw


def shapes_of(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that a checkpoint of this model has."""
    pool = create_pool(1)
    engine_config = EngineConfig("shapes").for_model(config)
    model = create_model(engine_config, config, DenseWeights("int8", pool), max_context=16)
    shapes = {name: spec.shape for name, spec in model.tensor_specs().items()}
    pool.close()
    return shapes


def write_checkpoint(root: Path, config: ModelConfig, stored: str) -> None:
    """Random weights in shards of about 2 GB. Values repeat after 64 MB, which nothing here notices."""
    root.mkdir(parents=True)
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(32 << 20, generator=generator).mul_(0.02).to(torch.bfloat16)
    codes = torch.randn(64 << 20, generator=generator).mul_(60).clamp_(-448, 448)
    codes = codes.to(torch.float8_e4m3fn).view(torch.uint8)

    def values(shape: tuple[int, ...], source: torch.Tensor) -> torch.Tensor:
        count = torch.Size(shape).numel()
        whole = source if count <= source.numel() else source.repeat(-(-count // source.numel()))
        return whole[:count].clone().view(shape)

    shard: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    number = 0

    def flush() -> None:
        nonlocal number
        number += 1
        part = root / "part"
        part.mkdir()
        write_safetensors(part, shard)
        name = f"model-{number:05d}.safetensors"
        (part / "model.safetensors").rename(root / name)
        part.rmdir()
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, shape in shapes_of(config).items():
        if stored == "fp8" and name.endswith(("_proj.weight", "_with_mqa.weight")):
            shard[name] = values(shape, codes).view(torch.float8_e4m3fn)
            blocks = tuple(-(-size // 128) for size in shape)
            shard[f"{name}_scale_inv"] = torch.full(blocks, 0.02 / 60)
        else:
            shard[name] = torch.ones(shape).bfloat16() if "norm" in name else values(shape, noise)
        if sum(t.nbytes for t in shard.values()) >= SHARD_BYTES:
            flush()
    flush()
    text = json.dumps({"metadata": {}, "weight_map": index})
    (root / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    write_tokenizer(root)
    text = json.dumps(hf_config(config, stored))
    (root / "config.json").write_text(text, encoding="utf-8")


def drop_from_page_cache(files: list[Path]) -> None:
    """Best effort: pages that other processes map stay."""
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(fd)


def read_rate(files: list[Path]) -> float:
    """GB/s of reading all files from their disk into one buffer: shared disks are fast for the first seconds only."""
    drop_from_page_cache(files)
    buffer = memoryview(bytearray(16 << 20))
    buffer[::4096] = b"x" * len(buffer[::4096])
    start, total = time.perf_counter(), 0
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        done = 0
        while count := os.preadv(fd, [buffer], done):
            done += count
        os.close(fd)
        total += done
    return total / (time.perf_counter() - start) / 1e9


def pack_rate(config: ModelConfig, stored: str, expert_format: str) -> float:
    """GB/s of source bytes that packing takes, from memory, on all threads."""
    pool = create_pool()
    hidden, inner = config.hidden_size, config.moe_intermediate_size
    experts = CpuExperts(16, hidden, inner, format=expert_format, pool=pool)
    w = torch.randn(inner, hidden).mul_(0.02)
    scale = torch.full((-(-inner // 128), -(-hidden // 128)), 1.0)
    source = w.to(torch.float8_e4m3fn) if stored == "fp8" else w.bfloat16()
    elapsed = 0.0
    for _ in range(2):  # the first round makes the memory resident
        start = time.perf_counter()
        for expert in range(16):
            for name in ("gate", "up"):
                experts.set_projection(expert, name, source, scale if stored == "fp8" else None)
        elapsed = time.perf_counter() - start
    pool.close()
    return 32 * source.nbytes / elapsed / 1e9


def start_model(directory: Path, expert_format: str) -> dict[str, Any]:
    """A process that loads the model and generates one token; its own account of it."""
    script = (
        "import json, resource, sys, time; start = time.perf_counter()\n"
        "from moejet import LLM, SamplingParams\n"
        "llm = LLM(sys.argv[1], expert_format=sys.argv[2], packed_cache='on', show_progress=False, "
        "max_context=1024)\n"
        "loaded = time.perf_counter()\n"
        "params = SamplingParams(max_tokens=1, ignore_eos=True)\n"
        "llm.generate([list(range(16))], params); first = time.perf_counter()\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024\n"
        "llm.close(); closed = time.perf_counter()\n"
        "print(json.dumps({'load_s': loaded - start, 'first_token_s': first - start, "
        "'close_s': closed - first, 'peak_bytes': peak}))\n"
    )
    start = time.perf_counter()
    output = subprocess.run(
        [sys.executable, "-c", script, str(directory), expert_format],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    result: dict[str, Any] = json.loads(output)
    return {**result, "process_s": time.perf_counter() - start}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--shape", default="deepseek-v2-lite:layers=16")
    parser.add_argument("--stored", choices=("fp8", "bf16"), default="fp8")
    parser.add_argument("--format", default="native")
    add_json_option(parser)
    args = parser.parse_args()
    config = parse_preset(args.shape)
    root = args.directory / f"{args.shape.replace(':', '-').replace('=', '')}-{args.stored}"
    if not (root / "config.json").exists():
        write_checkpoint(root, config, args.stored)
    shards = sorted(root.glob("*.safetensors"))
    os.environ["MOEJET_CACHE"] = str(args.directory / "cache")
    cache = args.directory / "cache"
    for file in cache.glob("*.packed") if cache.is_dir() else ():
        file.unlink()
    source_bytes = sum(file.stat().st_size for file in shards)
    packed = {"native": args.stored, "auto": "int4_g32"}.get(args.format, args.format)
    result: dict[str, Any] = {"bench": "load", **describe_environment()}
    result |= {"shape": args.shape, "stored": args.stored, "format": args.format}
    result |= {"source_bytes": source_bytes, "read_gbps": read_rate(shards)}
    result["pack_gbps"] = pack_rate(config, args.stored, packed)
    drop_from_page_cache(shards)
    result["first"] = start_model(root, args.format)
    [file] = cache.glob("*.packed")
    result["packed_bytes"] = packed_bytes = file.stat().st_size
    result["second"] = start_model(root, args.format)
    drop_from_page_cache([file])
    result["second_cold"] = start_model(root, args.format)
    bound = min(result["read_gbps"], result["pack_gbps"])
    rate = source_bytes / result["first"]["load_s"] / 1e9
    result |= {"load_gbps": rate, "fraction": rate / bound}
    with line_writer(args.json) as write:
        write(result)
    print(
        f"source {source_bytes / 1e9:.2f} GB, packed {packed_bytes / 1e9:.2f} GB; disk "
        f"{result['read_gbps']:.2f} GB/s, packing {result['pack_gbps']:.2f} GB/s"
    )
    print(f"first start: {rate:.2f} GB/s, {rate / bound:.0%} of the smaller of the two")
    for name in ("first", "second", "second_cold"):
        run = result[name]
        above = (run["peak_bytes"] - packed_bytes) / 1e9
        print(
            f"{name:12} loaded after {run['load_s']:.1f} s, first token after "
            f"{run['first_token_s']:.1f} s, closed {run['close_s']:.1f} s later; peak memory "
            f"{above:+.2f} GB of the packed size"
        )


if __name__ == "__main__":
    main()
