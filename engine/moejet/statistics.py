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

from dataclasses import dataclass, field


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
