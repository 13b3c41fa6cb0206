"""Which experts a token takes: scores to the k best and their weights."""

from __future__ import annotations

import torch
from torch import Tensor

SOFTMAX, SIGMOID = 0, 1
_GROUP_MAXIMUM, _GROUP_BEST_TWO = 0, 1


def gating_top_k_softmax(x: Tensor, finished: Tensor | None = None, k: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Return the k largest of softmax(x), descending, the lower index first among equals. Not renormalized.

    Args:
        x: [M, E] fp32, fp16 or bf16; the softmax is in fp32.
        finished: not offered here.
        k: choices of a token.

    Returns:
        Weights [M, k] in x's dtype, experts int32 [M, k], and int32 [M, k] of j * M + i: the order of the columns.
    """
    if finished is not None:
        raise NotImplementedError("npu_moe_gating_top_k_softmax: `finished` has no CPU kernel")
    probabilities = x.softmax(-1, dtype=torch.float32)
    experts = largest(probabilities, k)
    tokens = x.shape[0]
    row_index = torch.arange(tokens * k, dtype=torch.int32).view(k, tokens).t().contiguous()
    return probabilities.gather(1, experts).to(x.dtype), experts.int(), row_index


def gating_top_k(
    x: Tensor,
    k: int,
    *,
    bias: Tensor | None = None,
    input_ids: Tensor | None = None,
    tid2eid: Tensor | None = None,
    k_group: int = 1,
    group_count: int = 1,
    group_select_mode: int = 0,
    renorm: int = 0,
    norm_type: int = SOFTMAX,
    out_flag: bool = False,
    routed_scaling_factor: float = 1.0,
    eps: float = 1e-20,
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose by p + bias within the best groups, weigh by p; p = softmax(x) or sigmoid(x), in fp32.

    Args:
        x: [M, E].
        k: choices of a token.
        bias: [E], takes part in the choice only.
        input_ids: not offered here.
        tid2eid: not offered here.
        k_group: groups that a token may choose from.
        group_count: equal groups of neighbouring experts.
        group_select_mode: a group counts as 0 its largest, 1 the sum of its two largest p + bias.
        renorm: 0.
        norm_type: 0 softmax; 1 sigmoid, whose chosen weights are divided by their sum + eps.
        out_flag: hardware fills the third output only then.
        routed_scaling_factor: multiplies the weights.
        eps: of the sigmoid's division.

    Returns:
        Weights [M, k] in x's dtype, by p + bias descending, the lower index first among equals; experts int32
        [M, k]; p fp32 [M, E].
    """
    if input_ids is not None or tid2eid is not None or renorm or norm_type not in (SOFTMAX, SIGMOID):
        raise NotImplementedError(f"npu_moe_gating_top_k: token ids, {renorm=} and {norm_type=} have no CPU kernel")
    if group_select_mode not in (_GROUP_MAXIMUM, _GROUP_BEST_TWO):
        raise ValueError(f"npu_moe_gating_top_k: {group_select_mode=} is neither 0 nor 1")
    scores = x.float()
    p = scores.sigmoid() if norm_type == SIGMOID else scores.softmax(-1)
    choice = p if bias is None else p + bias.float()
    if k_group < group_count:
        choice = _within_groups(choice, group_count, k_group, best=1 + group_select_mode)
    experts = largest(choice, k)
    weights = p.gather(1, experts)
    if norm_type == SIGMOID:
        weights /= weights.sum(-1, keepdim=True) + eps
    return weights.mul_(routed_scaling_factor).to(x.dtype), experts.int(), p


def largest(values: Tensor, k: int) -> Tensor:
    """Return int64 [M, k]: the places of the k largest of each row of [M, E], the lower one first among equals.

    For the one row of a decode step a sort costs a third of a top-k with places in its keys.
    """
    return torch.sort(values, dim=1, descending=True, stable=True).indices[:, :k]


def _within_groups(choice: Tensor, groups: int, kept: int, *, best: int) -> Tensor:
    """Minus infinity for all experts outside the `kept` groups with the largest sum of their `best` values."""
    grouped = choice.view(choice.shape[0], groups, -1)
    allowed = largest(grouped.topk(min(best, grouped.shape[2]), dim=2).values.sum(2), kept)
    outside = torch.ones(grouped.shape[:2], dtype=torch.bool).scatter_(1, allowed, value=False)
    return grouped.masked_fill(outside.unsqueeze(2), float("-inf")).view(choice.shape)
