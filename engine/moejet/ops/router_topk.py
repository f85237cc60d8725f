"""Expert selection: which experts each token goes to, and with what weight. All arithmetic is fp32.

softmax + greedy                 DeepSeek-V2-Lite: the K largest probabilities
softmax + group_limited_greedy   DeepSeek-V2 (arXiv 2405.04434): the same, within the topk_group groups whose best
                                 expert scores highest
sigmoid + noaux_tc               DeepSeek-V3 (arXiv 2412.19437): a bias steers the selection only; groups are ranked by
                                 the sum of their two best biased scores; weights come from the unbiased scores
"""

from __future__ import annotations

import torch
from torch import Tensor

from moejet.config import ModelConfig


def router_topk(
    router_logits: Tensor, bias: Tensor | None, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """Selects experts.

    router_logits [T, E] fp32 · bias [E] fp32 (`e_score_correction_bias`; None for softmax routers).
    Returns topk_ids [T, K] int32 and topk_weights [T, K] fp32, routed_scaling_factor and renormalisation included.
    """
    return router_topk_ref(router_logits, bias, config)


def router_topk_ref(
    router_logits: Tensor, bias: Tensor | None, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """Torch reference of `router_topk`."""
    logits = router_logits.float()
    if config.scoring_func == "softmax":
        scores = torch.softmax(logits, dim=-1)
        choice = scores
    else:
        scores = torch.sigmoid(logits)
        choice = scores + (0.0 if bias is None else bias.float())
    if config.topk_method != "greedy" and config.n_group > 1:
        choice = _mask_groups(choice, config)
    topk_ids = torch.topk(choice, config.num_experts_per_tok, dim=-1).indices
    topk_weights = scores.gather(1, topk_ids)
    if config.norm_topk_prob:
        topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + 1e-20)
    return topk_ids.to(torch.int32), topk_weights * config.routed_scaling_factor


def _mask_groups(choice: Tensor, config: ModelConfig) -> Tensor:
    """Sets the scores of experts outside the best topk_group groups to -inf.

    Biased scores may be negative, so a zero there could win over an expert of a chosen group.
    """
    grouped = choice.view(choice.shape[0], config.n_group, -1)
    if config.topk_method == "noaux_tc":
        best = min(2, grouped.shape[-1])
        group_scores = grouped.topk(best, dim=-1).values.sum(dim=-1)
    else:
        group_scores = grouped.amax(dim=-1)
    kept = group_scores.topk(config.topk_group, dim=-1).indices
    mask = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, kept, True)
    return grouped.masked_fill(~mask.unsqueeze(-1), float("-inf")).view_as(choice)
