"""Choosing tokens on the device: what `moejet.ops.sample` does, from tensors, without waiting for the host.

Everything that decides a token is a tensor of the batch, so that a captured graph samples whatever its rows ask for.
The kernels count probability in integers (2^-44 of the likeliest token's), torch's reference in float64. They may
disagree where u falls within rounding of a boundary between two tokens, and for any u where a cut-off ties: where a
cumulative probability (top_p) or a token's own (min_p) equals the cut-off but for rounding, one more or one less of
several equal tokens is kept. Tokens below 2^-44 of the likeliest are impossible to the kernels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moejet.environment import use_reference
from moejet.ops.sample_ref import sample_tokens_ref
from moejet.request import SamplingParams


@dataclass(frozen=True, slots=True)
class Penalties:
    """Of each row: repetition, presence, frequency [B] fp32 (1, 0, 0 where off) and token counts [B, V] int32.

    A count is 2 * (occurrences in the output) + (1 if the prompt has it): see `count_tokens`. Whoever replays a graph
    adds 2 for each token that it keeps.
    """

    repetition: Tensor
    presence: Tensor
    frequency: Tensor
    counts: Tensor


@dataclass(frozen=True, slots=True)
class SamplingTensors:
    """How each of B rows chooses, on the logits' device.

    temperature fp32 (0: greedy) · top_k int32 (0: off) · top_p, min_p, uniforms fp64, all [B] · bias_ids [B, L] int32
    (-1: none) with bias_values [B, L] fp32. is_random and has_cut_offs are what the host knows of all rows: False
    leaves launches out.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    uniforms: Tensor
    penalties: Penalties | None = None
    bias_ids: Tensor | None = None
    bias_values: Tensor | None = None
    is_random: bool = True
    has_cut_offs: bool = True

    @classmethod
    def of(
        cls,
        params: Sequence[SamplingParams],
        uniforms: Sequence[float],
        *,
        device: torch.device | str,
        counts: Tensor | None = None,
        adjust: bool = True,
    ) -> SamplingTensors:
        """From the rows' parameters and numbers in [0, 1); counts [B, V] are needed where a row has penalties.

        adjust=False leaves penalties and logit_bias out: the logits have them already.
        """

        def column(values: list[float], dtype: torch.dtype) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        penalties = None
        if adjust and any(p.has_penalties for p in params):
            assert counts is not None, "rows with penalties need counts"
            penalties = Penalties(
                column([p.repetition_penalty for p in params], torch.float32),
                column([p.presence_penalty for p in params], torch.float32),
                column([p.frequency_penalty for p in params], torch.float32),
                counts,
            )
        bias_ids, bias_values = _bias_tensors(
            [(adjust and p.logit_bias) or {} for p in params], device
        )
        return cls(
            column([p.temperature for p in params], torch.float32),
            column([min(p.top_k, 2**31 - 1) for p in params], torch.int32),
            column([p.top_p for p in params], torch.float64),
            column([p.min_p for p in params], torch.float64),
            column(list(uniforms), torch.float64),
            penalties,
            bias_ids,
            bias_values,
            is_random=any(p.temperature > 0.0 for p in params),
            has_cut_offs=any(p.top_k or p.top_p < 1.0 or p.min_p for p in params),
        )


def count_tokens(token_ids: Sequence[int], num_prompt_tokens: int, vocab_size: int) -> Tensor:
    """A row of `Penalties.counts`, [V] int32 on the CPU."""
    ids = torch.tensor(token_ids, dtype=torch.int64)
    counts = 2 * torch.bincount(ids[num_prompt_tokens:], minlength=vocab_size)
    counts[ids[:num_prompt_tokens]] |= 1
    return counts.int()


def sample_on_device(
    logits: Tensor, rows: SamplingTensors, *, with_logprobs: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(token ids [B] int32, their log-probabilities [B] fp32, log-sum-exp [B] fp32); the last two on request.

    logits [B, V] fp32, bf16 or fp16, last dimension adjacent. A token is BAD_LOGITS where the row, after penalties and
    bias, holds NaN or +inf, or nothing above -inf. Log-probabilities are those of the raw logits.
    """
    if logits.is_cuda and not use_reference():
        from moejet.kernels.sample import sample_tokens as launch

        penalties, biases = rows.penalties, None
        if rows.bias_ids is not None and rows.bias_values is not None:
            biases = (rows.bias_ids, rows.bias_values)
        tokens, log_sums = launch(
            logits,
            rows.temperature,
            rows.top_k,
            rows.top_p,
            rows.min_p,
            rows.uniforms,
            penalties=None
            if penalties is None
            else (
                penalties.repetition,
                penalties.presence,
                penalties.frequency,
                penalties.counts,
            ),
            biases=biases,
            log_sums=with_logprobs,
            is_random=rows.is_random,
            has_cut_offs=rows.has_cut_offs,
        )
        return tokens, *_logprobs(logits, tokens, log_sums)
    return sample_on_device_ref(logits, rows, with_logprobs=with_logprobs)


def sample_on_device_ref(
    logits: Tensor, rows: SamplingTensors, *, with_logprobs: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Torch reference of `sample_on_device`, in float64."""
    params = [
        SamplingParams(temperature=t, top_k=k, top_p=p, min_p=m)
        for t, k, p, m in zip(
            rows.temperature.tolist(),
            rows.top_k.tolist(),
            rows.top_p.tolist(),
            rows.min_p.tolist(),
            strict=True,
        )
    ]
    adjusted = _adjust(logits.float(), rows)
    chosen = sample_tokens_ref(adjusted, params, rows.uniforms.tolist())
    tokens = torch.tensor(chosen, dtype=torch.int32, device=logits.device)
    log_sums = torch.logsumexp(logits.double(), dim=-1).float() if with_logprobs else None
    return tokens, *_logprobs(logits, tokens, log_sums)


def _logprobs(
    logits: Tensor, tokens: Tensor, log_sums: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    if log_sums is None:
        return None, None
    chosen = logits.gather(1, tokens.clamp(min=0).long()[:, None])[:, 0]
    return chosen.float() - log_sums, log_sums


def _adjust(logits: Tensor, rows: SamplingTensors) -> Tensor:
    if rows.penalties is not None:
        penalties = rows.penalties
        factor = penalties.repetition[:, None]
        lowered = torch.where(logits > 0, logits / factor, logits * factor)
        logits = torch.where(penalties.counts != 0, lowered, logits)
        times = penalties.counts >> 1
        penalty = penalties.presence[:, None] + penalties.frequency[:, None] * times
        logits = torch.where(times > 0, logits - penalty, logits)
    if rows.bias_ids is not None and rows.bias_values is not None:
        values = rows.bias_values.masked_fill(rows.bias_ids < 0, 0.0)
        logits = logits.scatter_add(1, rows.bias_ids.clamp(min=0).long(), values)
    return logits


def _bias_tensors(
    biases: list[Mapping[int, float]], device: torch.device | str
) -> tuple[Tensor | None, Tensor | None]:
    longest = max((len(bias) for bias in biases), default=0)
    if longest == 0:
        return None, None
    ids = torch.full((len(biases), longest), -1, dtype=torch.int32)
    values = torch.zeros(len(biases), longest, dtype=torch.float32)
    for row, bias in enumerate(biases):
        ids[row, : len(bias)] = torch.tensor(list(bias.keys()), dtype=torch.int32)
        values[row, : len(bias)] = torch.tensor(list(bias.values()), dtype=torch.float32)
    return ids.to(device), values.to(device)
