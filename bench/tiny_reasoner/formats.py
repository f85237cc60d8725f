"""The tiny reasoner stored as fp8, int4 and GGUF: greedy accuracy on the same held-out problems.

    python bench/tiny_reasoner/formats.py [--problems 300] [--json FILE]

Each copy is written as published checkpoints of that kind are, loaded by moejet in its native format, and asked the
same questions. Intervals are Wilson's, 95 %. GGUF's K types need rows of 256 weights, which this model does not have.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from evaluate import wilson

from moejet import LLM, SamplingParams
from moejet.cli.environment import describe_environment
from moejet.cli.results import add_json_option, line_writer
from moejet.resolve import resolve_model
from moejet.testing import arithmetic
from moejet.testing.gguf_files import write_gguf
from moejet.testing.quantised import quantise_checkpoint
from moejet.tokenizer import Tokenizer

GREEDY = SamplingParams(temperature=0.0, max_tokens=400)
GGUF_TYPES = ("F16", "Q8_0", "Q5_0", "Q4_0", "Q4_1")


def _add_merge(metadata: dict[str, Any]) -> None:
    """The vocabulary has no merges, which readers of GGUF insist on; the prompts here are token ids anyway."""
    key = "tokenizer.ggml"
    known = set(metadata[f"{key}.tokens"][0])
    joined = next(t for t in known if len(t) == 2 and t[0] in known and t[1] in known)
    metadata[f"{key}.merges"] = ([f"{joined[0]} {joined[1]}"], metadata[f"{key}.merges"][1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--problems", type=int, default=300)
    add_json_option(parser)
    args = parser.parse_args()
    source = resolve_model("tiny-reasoner")
    tokenizer = Tokenizer.from_path(source)
    environment = describe_environment()
    posed = arithmetic.held_out_problems(args.problems, seed=0)
    prompts = []
    for _, question in posed:
        conversation = [{"role": "user", "content": question}]
        text = tokenizer.apply_chat_template(conversation, add_generation_prompt=True)
        prompts.append(tokenizer.encode(text, add_special_tokens=False))
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        cases: dict[str, tuple[Path, dict[str, str]]] = {
            "bf16, exact": (source, {"expert_format": "bf16", "dense_format": "fp32"}),
            "bf16, default": (source, {}),
        }
        for method in ("fp8", "fp8_ue8m0", "int4"):
            path = quantise_checkpoint(source, root / method, method)
            cases[method] = (path, {"expert_format": "native"})
            cases[f"{method} as int4_g32"] = (path, {"expert_format": "int4_g32"})
        for kind in GGUF_TYPES:
            file = write_gguf(source, root / f"{kind}.gguf", kind, edit=_add_merge)
            cases[f"GGUF {kind}"] = (file, {"expert_format": "native"})
        print(f"{'stored as':24}{'experts':10}{'accuracy':>9}  95 % interval")
        for label, (path, options) in cases.items():
            with LLM(path, max_context=1024, cache_tokens=32768, **options) as llm:
                results = llm.generate(prompts, GREEDY)
                used = llm.config.expert_format
            right = sum(
                arithmetic.extract_answer(tokenizer.decode(list(r.outputs[0].token_ids)))
                == problem.answer
                for r, (problem, _) in zip(results, posed, strict=True)
            )
            accuracy = right / len(posed)
            low, high = wilson(accuracy, len(posed))
            print(f"{label:24}{used:10}{accuracy:9.3f}  [{low:.3f}, {high:.3f}]", flush=True)
            line = {"bench": "tiny_formats", **environment, "stored": label, "experts": used}
            line |= {"problems": len(posed), "accuracy": accuracy, "interval": [low, high]}
            with line_writer(args.json) as write:
                write(line)


if __name__ == "__main__":
    main()
