"""Fit the step head of an exported tiny reasoner on the model's own labelled samples.

    python bench/tiny_reasoner/train_step_head.py DIR

The trunk stays frozen: the head is a logistic regression on the final-normed hidden state at the
newline that ends each step or check line; whether that step is right is known exactly. Rewrites
`step_head.weight` and `step_head.bias` in DIR/model.safetensors and reports on unseen problems.
"""

import argparse
import json
import random
from pathlib import Path

import data
import torch
import torch.nn.functional as F
from model import TinyReasoner
from safetensors import safe_open
from safetensors.torch import save_file
from sampling import generate
from tokenizer import END_THINK
from tokenizers import Tokenizer
from torch import Tensor

from moejet.testing import arithmetic as ar


def collect(
    model: TinyReasoner, tokenizer: Tokenizer, *, problems: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [N, D], labels [N] and problem numbers [N] of sampled step lines."""
    rng = random.Random(f"step head {seed}")
    hidden: list[Tensor] = []
    labels: list[float] = []
    groups: list[int] = []
    for begin in range(0, problems, 256):
        posed = [data.train_problem(rng, 8) for _ in range(min(256, problems - begin))]
        prompts = [tokenizer.encode(data.prompt(ar.word_problem(p, rng), rng)).ids for p in posed]
        waits = int(begin // 256 % 3 == 2)  # a third of the batches with a forced check
        sampled = generate(
            model,
            tokenizer,
            prompts,
            temperature=1.0,
            seed=seed + begin,
            waits=waits,
            keep_hidden=True,
        )
        for i, (problem, s) in enumerate(zip(posed, sampled, strict=True)):
            thinking = tokenizer.decode(s.ids).partition(END_THINK)[0]
            for check in ar.check_steps(thinking, problem):
                if check.line < len(s.hidden):
                    hidden.append(s.hidden[check.line])
                    labels.append(float(check.step_correct))
                    groups.append(begin + i)
    return torch.stack(hidden), torch.tensor(labels), torch.tensor(groups)


def fit(x: Tensor, y: Tensor, *, l2: float = 1e-4) -> tuple[Tensor, Tensor]:
    """Logistic regression by L-BFGS; returns weight [1, D] and bias [1]."""
    mean, std = x.mean(0), x.std(0) + 1e-6
    z = (x - mean) / std
    w = torch.zeros(x.shape[1], requires_grad=True)
    b = torch.zeros(1, requires_grad=True)
    optimizer = torch.optim.LBFGS([w, b], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.binary_cross_entropy_with_logits(z @ w + b, y) + l2 * w.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    weight = w.detach() / std
    return weight[None], b.detach() - (weight @ mean)[None]


def auc(scores: Tensor, labels: Tensor) -> float:
    """Probability that a right line scores above a wrong one (ties count half)."""
    right, wrong = scores[labels == 1], scores[labels == 0].sort().values
    below = torch.searchsorted(wrong, right) + torch.searchsorted(wrong, right, right=True)
    return float(below.float().mean() / 2 / len(wrong))


def calibration(scores: Tensor, labels: Tensor) -> float:
    """Expected calibration error over ten bins."""
    bins = (scores * 10).long().clamp(max=9)
    error = 0.0
    for b in range(10):
        if (bins == b).any():
            gap = scores[bins == b].mean() - labels[bins == b].mean()
            error += float(gap.abs()) * float((bins == b).float().mean())
    return error


def main() -> None:
    """Collect, fit, report, store."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--problems", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = TinyReasoner.load(args.model)
    tokenizer = Tokenizer.from_file(str(args.model / "tokenizer.json"))
    x, y, groups = collect(model, tokenizer, problems=args.problems, seed=args.seed)
    test = groups >= 0.8 * args.problems
    weight, bias = fit(x[~test], y[~test])
    weight, bias = weight.bfloat16(), bias.bfloat16()
    scores = torch.sigmoid(x[test] @ weight[0].float() + bias.float())
    report = {
        "lines": len(y),
        "wrong_share": round(float(1 - y.mean()), 4),
        "auc": round(auc(scores, y[test]), 4),
        "calibration_error": round(calibration(scores, y[test]), 4),
        "brier": round(float((scores - y[test]).square().mean()), 4),
        "brier_constant": round(float(y[test].var()), 4),
    }
    path = args.model / "model.safetensors"
    with safe_open(path, framework="pt") as f:
        tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
    tensors["step_head.weight"], tensors["step_head.bias"] = weight, bias
    save_file(tensors, path, metadata={"format": "pt"})
    print(json.dumps(report))


if __name__ == "__main__":
    main()
