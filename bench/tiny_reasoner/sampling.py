"""Batched sampling from the torch model, with forced checks and step scores."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from model import LatentCache, TinyReasoner
from tokenizer import END_THINK, EOS
from tokenizers import Tokenizer
from torch import Tensor


@dataclass
class Sample:
    """One completion."""

    ids: list[int] = field(default_factory=list)
    step_scores: list[float] = field(default_factory=list)  # one per newline token fed back
    logprob: float = 0.0
    hidden: list[Tensor] = field(default_factory=list)  # final-normed, at newline tokens


def left_pad(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """ids [B, L] and the number of pads of each row [B]."""
    length = max(len(p) for p in prompts)
    ids = torch.tensor([[0] * (length - len(p)) + list(p) for p in prompts])
    return ids, torch.tensor([length - len(p) for p in prompts])


@torch.no_grad()
def generate(
    model: TinyReasoner,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    *,
    temperature: float,
    seed: int = 0,
    max_new: int = 900,
    waits: int = 0,
    first_pass_only: bool = False,
    keep_hidden: bool = False,
) -> list[Sample]:
    """Sample one completion per prompt; the first `waits` ends of thinking become "Wait".

    With `first_pass_only` a completion ends with the first "Wait" or end of thinking.
    """
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    eos, end_think, wait, newline = (
        tokenizer.token_to_id(t) for t in (EOS, END_THINK, "Wait", "Ċ")
    )
    ids, pads = left_pad(prompts)
    max_new = min(max_new, model.c.max_position_embeddings - ids.shape[1])
    cache = LatentCache(model.c, len(prompts), ids.shape[1] + max_new)
    samples = [Sample() for _ in prompts]
    rows = torch.arange(len(prompts))
    waits_left = torch.full((len(prompts),), waits)
    alive = torch.ones(len(prompts), dtype=torch.bool)
    columns = torch.arange(ids.shape[1] + max_new)
    length = ids.shape[1]
    causal = columns[:length] <= columns[:length, None]
    mask = causal & ((columns[:length] >= pads[:, None, None]) | torch.eye(length).bool())
    mask = mask[:, None]
    for _ in range(max_new):
        hidden = model.hidden(ids, start=cache.filled, mask=mask, cache=cache)[:, -1]
        if ids.shape[1] == 1:
            for i in (ids[:, 0] == newline).nonzero()[:, 0].tolist():
                sample = samples[int(rows[i])]
                sample.step_scores.append(float(torch.sigmoid(model.step_head(hidden[i]))))
                if keep_hidden:
                    sample.hidden.append(hidden[i])
        logits = model.lm_head(hidden).float()
        if temperature:
            probs = torch.softmax(logits / temperature, dim=-1)
            token = torch.multinomial(probs, 1, generator=generator)[:, 0]
        else:
            token = logits.argmax(-1)
        forced = (token == end_think) & (waits_left > 0)
        waits_left -= forced.long()
        token = torch.where(forced, wait, token)
        logprobs = torch.log_softmax(logits, dim=-1).gather(1, token[:, None])[:, 0].tolist()
        for row, t, lp, was_forced, was_alive in zip(
            rows.tolist(), token.tolist(), logprobs, forced.tolist(), alive.tolist(), strict=True
        ):
            samples[row].ids.append(t)
            samples[row].logprob += 0.0 if was_forced or not was_alive else lp
        alive &= token != eos
        if first_pass_only:
            alive &= (token != end_think) & (token != wait)
        if not alive.any():
            break
        if int(alive.sum()) < 0.9 * len(alive):
            # Finished rows go on until enough have gathered; what they add is cut off below.
            keep = alive.nonzero()[:, 0]
            cache.keep(keep)
            rows, waits_left, pads, token = rows[keep], waits_left[keep], pads[keep], token[keep]
            alive = alive[keep]
        ids = token[:, None]
        mask = (columns[: cache.filled + 1] >= pads[:, None])[:, None, None]
    for sample in samples:
        for stop in (eos, end_think, wait) if first_pass_only else (eos,):
            if stop in sample.ids:
                sample.ids = sample.ids[: sample.ids.index(stop) + 1]
        lines = sample.ids.count(newline)
        sample.step_scores, sample.hidden = sample.step_scores[:lines], sample.hidden[:lines]
    return samples
