"""Train the tiny reasoner from nothing on one CPU core and export it in Hugging Face layout.

    python bench/tiny_reasoner/train.py --out DIR

Phase 1 begins with drills (unrelated step lines) and short problems, then learns from generated
samples with injected slips. Then the model samples first passes itself, and phase 2 mixes these,
continued with check rounds, into the data: the checks see the slips that the model really makes.
Phase 2 also drills verdicts and comparisons (--drill-share) and gives what checks look up and
conclude more weight (--check-weight). The step head is refitted afterwards by train_step_head.py.
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import data
import torch
import torch.nn.functional as F
from model import Config, TinyReasoner
from sampling import generate
from tokenizer import BOS, END_THINK, EOS, build, save
from tokenizers import Tokenizer
from torch import Tensor

from moejet.testing import arithmetic as ar

Encoded = tuple[list[int], list[float], list[int]]


def batches(samples: Iterator[Encoded], tokens: int, rng: random.Random) -> Iterator[list[Encoded]]:
    """Batches of about `tokens` tokens of samples of similar length."""
    while True:
        pool = sorted((next(samples) for _ in range(256)), key=lambda s: len(s[0]))
        cut, start = [], 0
        while start < len(pool):
            end = start + 1
            while end < len(pool) and len(pool[end][0]) * (end + 1 - start) <= tokens:
                end += 1
            cut.append(pool[start:end])
            start = end
        if len(cut) > 1 and len(cut[-1]) * len(cut[-1][-1][0]) < tokens // 2:
            cut.pop()  # no tiny batches
        rng.shuffle(cut)
        yield from cut


def collate(batch: list[Encoded]) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids, weights and labels [B, L]."""
    length = max(len(ids) for ids, _, _ in batch)
    ids = torch.zeros(len(batch), length, dtype=torch.long)
    weights = torch.zeros(len(batch), length)
    labels = torch.full((len(batch), length), -1)
    for row, (i, w, s) in enumerate(batch):
        ids[row, : len(i)] = torch.tensor(i)
        weights[row, : len(w)] = torch.tensor(w)
        labels[row, : len(s)] = torch.tensor(s)
    return ids, weights, labels


def losses(
    model: TinyReasoner, ids: Tensor, weights: Tensor, labels: Tensor
) -> tuple[Tensor, Tensor]:
    """Weighted next-token loss, and the loss of the step head at labelled newlines."""
    hidden = model.hidden(ids)
    seen = weights[:, 1:] > 0
    logits = model.lm_head(hidden[:, :-1][seen])
    token_losses = F.cross_entropy(logits, ids[:, 1:][seen], reduction="none")
    w = weights[:, 1:][seen]
    labelled = labels >= 0
    step_logits = model.step_head(hidden[labelled])[:, 0]
    step_loss = F.binary_cross_entropy_with_logits(
        step_logits, labels[labelled].float(), reduction="sum"
    ) / max(1, len(step_logits))
    return (token_losses * w).sum() / w.sum(), step_loss


def optimizer_for(model: TinyReasoner, lr: float) -> torch.optim.AdamW:
    """AdamW; no decay on vectors and embeddings."""
    decayed = [p for n, p in model.named_parameters() if p.dim() > 1 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() < 2 or "embed" in n]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98), fused=True)


class Run:
    """The model in training, its log and its checkpoints."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.out: Path = args.out
        self.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        self.tokenizer: Tokenizer = build()
        self.config = Config(vocab_size=self.tokenizer.get_vocab_size())
        save(self.tokenizer, self.out, max_length=self.config.max_position_embeddings)
        self.encoder = data.Encoder(self.tokenizer)
        self.model = TinyReasoner(self.config)
        self.started = time.monotonic()
        self.tokens = 0
        self.log_file = (self.out / "train_log.jsonl").open("w")
        self.log(parameters=sum(p.numel() for p in self.model.parameters()), **asdict(self.config))

    def log(self, **values: object) -> None:
        """One JSON line."""
        line = json.dumps({"wall_s": round(time.monotonic() - self.started), **values})
        print(line, flush=True)
        self.log_file.write(line + "\n")
        self.log_file.flush()

    def save(self) -> None:
        """Export the model as it is."""
        ids = {
            "bos_token_id": self.tokenizer.token_to_id(BOS),
            "eos_token_id": self.tokenizer.token_to_id(EOS),
            "pad_token_id": self.tokenizer.token_to_id(EOS),
        }
        self.model.export(self.out, **ids)
        settings = {"do_sample": True, "temperature": 0.8, "top_p": 1.0}
        (self.out / "generation_config.json").write_text(
            json.dumps({**ids, **settings}, indent=2) + "\n"
        )

    def samples(self, rng: random.Random, phase: int, own: list[Encoded]) -> Iterator[Encoded]:
        """Encoded samples; phase 1 begins with drills and short problems."""
        begin = 0.25 * self.args.tokens
        while True:
            if phase == 2 and rng.random() < self.args.drill_share:
                drill = data.verdict_drill if rng.random() < 0.4 else data.comparison_drill
                yield self.encoder.encode(drill(rng))
                continue
            if own and rng.random() < self.args.own_share:
                yield own[rng.randrange(len(own))]
                continue
            early = phase == 1 and self.tokens < begin
            if phase == 1 and rng.random() < (0.7 if early else 0.15):
                yield self.encoder.encode(data.drill(rng))
            else:
                check_weight = 1.0 if phase == 1 else self.args.check_weight
                max_steps = 3 if early else 8
                yield self.encoder.encode(data.sample(rng, max_steps, check_weight=check_weight))

    def train(self, phase: int, budget: int, lr: float, own: list[Encoded]) -> None:
        """Train on `budget` tokens with warm-up and cosine decay."""
        rng = random.Random(f"{self.args.seed} {phase}")
        optimizer = optimizer_for(self.model, lr)
        stream = batches(self.samples(rng, phase, own), self.args.batch_tokens, rng)
        begin, step, next_eval = self.tokens, 0, self.args.eval_every
        sums = torch.zeros(2)
        since_tokens, since_time, ratios = self.tokens, time.monotonic(), [0.0]
        while (done := (self.tokens - begin) / budget) < 1:
            factor = min(1.0, (step + 1) / 100)
            if done > (0.3 if phase == 1 else 0.1):
                hold = 0.3 if phase == 1 else 0.1
                factor *= 0.04 + 0.96 * 0.5 * (1 + math.cos(math.pi * (done - hold) / (1 - hold)))
            for group in optimizer.param_groups:
                group["lr"] = lr * factor
            self.model.train()
            ids, weights, labels = collate(next(stream))
            loss, step_loss = losses(self.model, ids, weights, labels)
            (loss + self.args.head_weight * step_loss).backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            early = phase == 1 and done < 0.3
            ratios = [moe.balance(3e-3 if early else 1e-3) for moe in self.model.moes()]
            self.tokens += int((ids > 0).sum())
            sums += torch.stack([loss.detach(), step_loss.detach()])
            step += 1
            if step % 200 == 0:
                now = time.monotonic()
                rate = (self.tokens - since_tokens) / (now - since_time)
                self.log(
                    phase=phase,
                    step=step,
                    tokens=self.tokens,
                    loss=round(float(sums[0]) / 200, 4),
                    step_loss=round(float(sums[1]) / 200, 4),
                    lr=round(lr * factor, 6),
                    load_max_over_mean=[round(r, 2) for r in ratios],
                    tokens_per_s=round(rate),
                )
                sums.zero_()
                since_tokens, since_time = self.tokens, now
            if self.tokens - begin > next_eval or (self.tokens - begin) >= budget:
                next_eval += self.args.eval_every
                self.evaluate()
                self.save()

    def evaluate(self, n: int = 60) -> None:
        """Quick held-out accuracy: one pass and one forced check."""
        problems = ar.held_out_problems(n, seed=1)
        rng = random.Random(0)
        prompts = [self.encoder.ids(data.prompt(text, rng)) for _, text in problems]
        result: dict[str, float] = {}
        for name, temperature, waits in (
            ("greedy", 0.0, 0),
            ("greedy_check", 0.0, 1),
            ("t08", 0.8, 0),
            ("t08_check", 0.8, 1),
        ):
            samples = generate(
                self.model,
                self.tokenizer,
                prompts,
                temperature=temperature,
                waits=waits,
                max_new=500,
            )
            texts = [self.tokenizer.decode(s.ids) for s in samples]
            right = [
                ar.extract_answer(t) == p.answer for t, (p, _) in zip(texts, problems, strict=True)
            ]
            result[name] = sum(right) / n
        self.log(tokens=self.tokens, accuracy=result, example=texts[3])

    def own_samples(self, n: int) -> list[Encoded]:
        """First passes sampled from the model, continued with check rounds; wrong ones dominate."""
        rng = random.Random(f"{self.args.seed} own")
        encoded: list[Encoded] = []
        drawn = wrong = 0
        while len(encoded) < n:
            posed = [data.train_problem(rng, 8) for _ in range(256)]
            texts = [data.prompt(ar.word_problem(p, rng), rng) for p in posed]
            sampled = generate(
                self.model,
                self.tokenizer,
                [self.encoder.ids(t) for t in texts],
                temperature=1.0,
                seed=rng.randrange(2**31),
                max_new=220,
                first_pass_only=True,
            )
            for problem, text, s in zip(posed, texts, sampled, strict=True):
                thinking = self.tokenizer.decode(s.ids)
                drawn += 1
                if not thinking.endswith((END_THINK, "Wait")):
                    continue
                first = thinking.removesuffix(END_THINK).removesuffix("Wait")
                right = all(c.correct for c in ar.check_steps(first, problem))
                wrong += not right
                if right and rng.random() > 0.25:
                    continue
                for _ in range(1 if right else 2):
                    pieces = data.recheck(
                        text, problem, first, rng, check_weight=self.args.check_weight
                    )
                    if pieces is not None:
                        encoded.append(self.encoder.encode(pieces))
        self.log(own_samples=len(encoded), drawn=drawn, wrong=wrong)
        return encoded


def main() -> None:
    """Train, sample, train on, export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=10_000_000, help="of phase 1")
    parser.add_argument("--phase1", type=Path, help="phase1.pt of an earlier run, to skip phase 1")
    parser.add_argument("--own-tokens", type=int, default=3_000_000, help="of phase 2")
    parser.add_argument("--own-samples", type=int, default=3000)
    parser.add_argument("--own-share", type=float, default=0.5)
    parser.add_argument("--drill-share", type=float, default=0.25, help="in phase 2")
    parser.add_argument("--check-weight", type=float, default=2.0, help="in phase 2")
    parser.add_argument("--head-weight", type=float, default=1.0, help="of the step head's loss")
    parser.add_argument("--batch-tokens", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--own-lr", type=float, default=1.2e-3)
    parser.add_argument("--eval-every", type=int, default=2_000_000, help="tokens")
    args = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    run = Run(args)
    if args.phase1 is None:
        run.train(1, args.tokens, args.lr, [])
        torch.save(run.model.state_dict(), run.out / "phase1.pt")
    else:
        run.model.load_state_dict(torch.load(args.phase1))
    run.train(2, args.own_tokens, args.own_lr, run.own_samples(args.own_samples))
    run.save()
    run.log(done=True, tokens=run.tokens)


if __name__ == "__main__":
    main()
