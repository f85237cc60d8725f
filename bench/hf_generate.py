"""transformers' generate with its own experts and with moejet's, on a random Qwen3-MoE of about 1 GB.

    OMP_WAIT_POLICY=passive python bench/hf_generate.py [--layers 5] [--experts 64] [--prompt 256] [--new 32]

One model in bf16; the implementations take turns on it, moejet's rounding formats come last (they
cannot be undone). Prompt: one forward pass over --prompt tokens; generation: after 16 tokens, batch 1.
Medians over the repetitions; the first, in which weights are packed, does not count.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
import transformers

import moejet.hf
from moejet.cli.environment import describe_environment, summary

TRANSFORMERS = ("grouped_mm", "batched_mm", "eager")
FORMATS = ("auto", "int8", "int4_g32")


def make_model(args: argparse.Namespace) -> Any:
    config = transformers.Qwen3MoeConfig(
        vocab_size=32000,
        hidden_size=1024,
        moe_intermediate_size=512,
        num_hidden_layers=args.layers,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        num_experts=args.experts,
        num_experts_per_tok=8,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@torch.no_grad()
def prefill_rate(model: Any, prompt: torch.Tensor, repeats: int) -> float:
    """Prompt tokens per second."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        model(prompt, logits_to_keep=1)
        seconds.append(time.perf_counter() - start)
    return prompt.shape[1] / statistics.median(seconds[1:])


def decode_rate(model: Any, prompt: torch.Tensor, new: int, repeats: int) -> float:
    """Tokens per second of generate after the first one."""
    rates = []
    for _ in range(repeats + 1):
        seconds = []
        for count in (1, new + 1):
            start = time.perf_counter()
            model.generate(prompt, max_new_tokens=count, do_sample=False)
            seconds.append(time.perf_counter() - start)
        rates.append(new / (seconds[1] - seconds[0]))
    return statistics.median(rates[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, default in (("layers", 5), ("experts", 64), ("prompt", 256), ("new", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(args.threads)
    for name in FORMATS:
        moejet.hf.register(f"moejet {name}", expert_format=name, num_threads=args.threads)
    model = make_model(args)
    prompt = torch.randint(0, 32000, (1, args.prompt))
    experts = sum(w.nbytes for name, w in model.named_parameters() if ".experts." in name)
    print(summary(describe_environment()))
    print(f"transformers {transformers.__version__}, {experts / 1e9:.2f} GB of experts in bf16")
    print(f"{'experts':<18}{'prompt tok/s':>14}{'generated tok/s':>17}")
    for name in (*TRANSFORMERS, *(f"moejet {name}" for name in FORMATS)):
        if name == f"moejet {FORMATS[-1]}":
            model = make_model(args)  # the weights that int8 has rounded
        model.set_experts_implementation(name)
        # batched_mm gathers the weights of every token: gigabytes for a prompt.
        prefill = (
            "-" if name == "batched_mm" else f"{prefill_rate(model, prompt, args.repeats):.0f}"
        )
        decode = decode_rate(model, prompt[:, :16], args.new, args.repeats)
        print(f"{name:<18}{prefill:>14}{decode:>17.1f}", flush=True)


if __name__ == "__main__":
    main()
