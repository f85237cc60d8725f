"""How sure the model was, token by token, as running sums: a row of logits is read once and never kept.

All values come from the raw logits, before penalties, masks and temperature, with p the softmax of the row:

  logprob         log p of the chosen token
  entropy         -sum(p log p) over the whole vocabulary, in nats
  gap             log p of the most likely token minus that of the second
  confidence      -mean(log p) of the 20 most likely tokens (arXiv 2508.15260); high where the distribution is peaked
  self_certainty  -mean(log(V p)) over the vocabulary of V: KL divergence of uniform from p (arXiv 2502.18581)
  top5_share      p of the chosen token over the sum of the 5 largest p (arXiv 2411.14405)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # a server's process knows the values and not how they come about
    from torch import Tensor

_NUM_TOP = 20
_NUM_SHARED = 5
_CHUNK_ELEMENTS = 1 << 20  # of logits at a time: temporaries stay within a core's cache


@dataclass(frozen=True, slots=True)
class TokenScores:
    """The values above, of one token, or their sums or means over several."""

    logprob: float = 0.0
    entropy: float = 0.0
    gap: float = 0.0
    confidence: float = 0.0
    self_certainty: float = 0.0
    top5_share: float = 0.0

    def __add__(self, other: TokenScores) -> TokenScores:
        return TokenScores(
            self.logprob + other.logprob,
            self.entropy + other.entropy,
            self.gap + other.gap,
            self.confidence + other.confidence,
            self.self_certainty + other.self_certainty,
            self.top5_share + other.top5_share,
        )

    def __truediv__(self, count: float) -> TokenScores:
        return TokenScores(
            self.logprob / count,
            self.entropy / count,
            self.gap / count,
            self.confidence / count,
            self.self_certainty / count,
            self.top5_share / count,
        )


@dataclass(slots=True)
class TokenStatistics:
    """Over the tokens of a sample that the model chose itself; injected ones do not count."""

    num_tokens: int = 0
    sum: TokenScores = field(default_factory=TokenScores)
    last: TokenScores = field(default_factory=TokenScores)

    @property
    def mean(self) -> TokenScores:
        return self.sum / max(1, self.num_tokens)

    def add(self, scores: TokenScores) -> None:
        self.num_tokens += 1
        self.sum += scores
        self.last = scores

    def copy(self) -> TokenStatistics:
        return TokenStatistics(self.num_tokens, self.sum, self.last)


def token_scores(logits: Tensor, token_ids: list[int]) -> list[TokenScores]:
    """The scores of the token chosen from each row. logits [B, V] fp32, finite or -inf."""
    size = max(1, _CHUNK_ELEMENTS // logits.shape[1])
    result: list[TokenScores] = []
    for begin in range(0, len(token_ids), size):
        result += _scores_of(logits[begin : begin + size], token_ids[begin : begin + size])
    return result


def _scores_of(logits: Tensor, token_ids: list[int]) -> list[TokenScores]:
    import torch

    from moejet.ops.top_logits import top_logits

    vocab_size = logits.shape[1]
    top, _, log_sums = top_logits(logits, min(_NUM_TOP, vocab_size))
    logprobs = logits - torch.tensor(log_sums, dtype=torch.float32).unsqueeze(1)
    probs = torch.exp(logprobs)
    counts = [vocab_size] * len(token_ids)
    if math.isinf(float(logits.amin())):
        # A token that cannot come (-inf) has no share in any mean.
        is_possible = torch.isfinite(logprobs)
        logprobs = logprobs.masked_fill(~is_possible, 0.0)
        counts = is_possible.sum(dim=1).tolist()
    entropies = (-torch.linalg.vecdot(probs, logprobs)).tolist()
    sums = logprobs.sum(dim=1).tolist()
    result = []
    for row, token_id in enumerate(token_ids):
        best = [value - log_sums[row] for value in top[row].tolist() if math.isfinite(value)]
        logprob = float(logits[row, token_id]) - log_sums[row]
        result.append(
            TokenScores(
                logprob=logprob,
                entropy=max(0.0, entropies[row]),
                gap=best[0] - best[1] if len(best) > 1 else 0.0,
                confidence=-sum(best) / len(best),
                self_certainty=-sums[row] / counts[row] - math.log(counts[row]),
                top5_share=math.exp(logprob - best[0])
                / sum(math.exp(value - best[0]) for value in best[:_NUM_SHARED]),
            )
        )
    return result
