"""Expert selection: which experts each token goes to, and with what weight. All arithmetic is fp32.

softmax + greedy                 DeepSeek-V2-Lite: the K largest probabilities
softmax + group_limited_greedy   DeepSeek-V2 (arXiv 2405.04434): the same, within the topk_group groups whose best
                                 expert scores highest
sigmoid + noaux_tc               DeepSeek-V3 (arXiv 2412.19437): a bias steers the selection only; groups are ranked by
                                 the sum of their two best biased scores; weights come from the unbiased scores
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moejet.config import ModelConfig
from moejet.environment import use_reference
from moejet.extension import load_extension
from moejet.ops.native import check_dims, check_tensor, cpu_isa, runs_native

_MAX_NATIVE_EXPERTS = 1024


def router_topk(
    router_logits: Tensor, bias: Tensor | None, config: ModelConfig
) -> tuple[Tensor, Tensor]:
    """Selects experts.

    router_logits [T, E] fp32 · bias [E] fp32 (`e_score_correction_bias`; None for softmax routers).
    Returns topk_ids [T, K] int32 and topk_weights [T, K] fp32, routed_scaling_factor and renormalisation included,
    from the best expert on; among equal scores the smaller id comes first. NaN counts as the largest score.
    """
    if router_logits.is_cuda and not use_reference():
        from moejet.kernels.router_topk import router_topk as launch

        selection = selection_of(config)
        return launch(router_logits, bias if selection["is_sigmoid"] else None, **selection)
    check_dims("router_logits", router_logits, "T, E")
    if router_logits.shape[1] > _MAX_NATIVE_EXPERTS or not runs_native(router_logits, bias):
        check_tensor(
            "router_logits",
            router_logits,
            (len(router_logits), config.num_experts),
            router_logits,
        )
        if bias is not None:
            check_tensor("bias", bias, router_logits.shape[1:], router_logits)
        return router_topk_ref(router_logits, bias, config)
    num_tokens, top_k = router_logits.shape[0], config.num_experts_per_tok
    topk_ids = torch.empty(num_tokens, top_k, dtype=torch.int32)
    topk_weights = torch.empty(num_tokens, top_k, dtype=torch.float32)
    load_extension().router_topk(
        router_logits,
        topk_ids,
        topk_weights,
        config.scoring_func,
        group_rank(config),
        config.n_group,
        config.topk_group,
        config.norm_topk_prob,
        config.routed_scaling_factor,
        bias if config.scoring_func == "sigmoid" else None,
        isa=cpu_isa(),
    )
    return topk_ids, topk_weights


def group_rank(config: ModelConfig) -> str:
    """By what groups of experts are ranked, as the extension names it; "none": all groups are kept."""
    if config.topk_method == "greedy" or config.n_group == 1:
        return "none"
    return "best_two" if config.topk_method == "noaux_tc" else "best"


def selection_of(config: ModelConfig) -> dict[str, Any]:
    """The router as the Triton launcher takes it."""
    return {
        "top_k": config.num_experts_per_tok,
        "is_sigmoid": config.scoring_func == "sigmoid",
        "num_groups": 1 if config.topk_method == "greedy" else config.n_group,
        "kept_groups": config.topk_group,
        "best_two": config.topk_method == "noaux_tc",
        "renormalise": config.norm_topk_prob,
        "scale": config.routed_scaling_factor,
    }


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
    topk_ids = _best(choice, config.num_experts_per_tok)
    topk_weights = scores.gather(1, topk_ids)
    if config.norm_topk_prob:
        topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + 1e-20)
    return topk_ids.to(torch.int32), topk_weights * config.routed_scaling_factor


def _mask_groups(choice: Tensor, config: ModelConfig) -> Tensor:
    """Sets the scores of experts outside the best topk_group groups to -inf.

    Biased scores may be negative, so a zero there could win over an expert of a chosen group.
    """
    num_tokens, num_experts = choice.shape
    grouped = choice.view(num_tokens, config.n_group, num_experts // config.n_group)
    if config.topk_method == "noaux_tc":
        best = min(2, grouped.shape[-1])
        group_scores = grouped.topk(best, dim=-1).values.sum(dim=-1)
    else:
        group_scores = grouped.amax(dim=-1)
    kept = _best(group_scores, config.topk_group)
    mask = torch.zeros_like(group_scores, dtype=torch.bool).scatter_(1, kept, True)
    return grouped.masked_fill(~mask.unsqueeze(-1), float("-inf")).view_as(choice)


def _best(scores: Tensor, k: int) -> Tensor:
    """Indices of the k largest of each row, the smaller one first among equals (torch.topk leaves that open)."""
    return torch.argsort(scores, dim=-1, descending=True, stable=True)[:, :k]
