"""Routed experts: which of them a token takes, and their MLPs as grouped matmuls."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from framework import ops
from framework.families.base import Moe
from framework.layers.linear import ParallelLinear
from framework.layers.mlp import GatedMLP
from framework.layers.submodules import find_submodules_directly

SOFTMAX, SIGMOID = 0, 1  # norm_type of npu_moe_gating_top_k
DECISIONS = ("experts", "groups")  # what a router may decide otherwise by rounding
COUNTS = 1  # expert_tokens_num_type of npu_moe_init_routing_v2, group_list_type of npu_grouped_matmul


class Router(nn.Module):
    """Scores of all experts to the `top_k` chosen ones and their weights."""

    def __init__(self, gate: ParallelLinear, correction: Tensor | None, moe: Moe) -> None:
        super().__init__()
        self.gate = gate
        self.correction = correction
        self.moe = moe
        self.plain = moe.scoring == "softmax" and moe.groups == 1 and correction is None
        find_submodules_directly(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[T, H] -> weights fp32 [T, k], experts int32 [T, k]; the same on every rank."""
        return self.choose(self.gate(x).float())

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Fp32 [T, E] -> weights and experts."""
        moe = self.moe
        if self.plain:
            weights, chosen, _ = ops.npu_moe_gating_top_k_softmax(scores, k=moe.top_k)
        else:
            # the operator divides sigmoid weights by their sum; softmax weights it leaves as they are
            weights, chosen, _ = ops.npu_moe_gating_top_k(
                scores,
                moe.top_k,
                bias=self.correction,
                k_group=moe.top_groups,
                group_count=moe.groups,
                group_select_mode=1 if moe.group_best > 1 else 0,
                norm_type=SIGMOID if moe.scoring == "sigmoid" else SOFTMAX,
            )
        if moe.renormalize and moe.scoring == "softmax":
            weights = weights / weights.sum(-1, keepdim=True)
        elif not moe.renormalize and moe.scoring == "sigmoid":
            weights = scores.sigmoid().gather(-1, chosen.long())
        return weights * moe.scaling, chosen

    def margins(self, scores: Tensor) -> dict[str, Tensor]:
        """Fp32 [T, E] -> [T] of each decision: how far the last one chosen is from the best left out.

        In what is compared: scores as weights with their correction, of groups the sum of their best.
        """
        return {decision: self._other(scores, decision)[1] for decision in DECISIONS}

    def choose_otherwise(self, scores: Tensor, decision: str) -> tuple[Tensor, Tensor]:
        """Fp32 [T, E] -> weights and experts where the best one left out takes the place of the last one chosen."""
        chosen, _ = self._other(scores, decision)
        weights = self._chances(scores).gather(-1, chosen)
        if self.moe.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights * self.moe.scaling, chosen.int()

    def _chances(self, scores: Tensor) -> Tensor:
        return scores.sigmoid() if self.moe.scoring == "sigmoid" else scores.softmax(-1)

    def _other(self, scores: Tensor, decision: str) -> tuple[Tensor, Tensor]:
        """Experts [T, k] with one decision the other way, and its margin [T]; infinite where that changes nothing."""
        moe = self.moe
        compared = self._chances(scores)
        if self.correction is not None:
            compared = compared + self.correction
        by_group = compared.unflatten(-1, (moe.groups, -1))
        of_groups = by_group.topk(min(moe.group_best, by_group.shape[-1]), dim=-1).values.sum(-1)

        def ranked(groups: Tensor) -> Tensor:
            inside = torch.zeros_like(of_groups, dtype=torch.bool).scatter(1, groups, True)
            return by_group.masked_fill(~inside[..., None], -torch.inf).flatten(1)

        kept = ranked(_order(of_groups)[:, : moe.top_groups])
        if decision == "experts":
            return _other_last(kept, moe.top_k)
        groups, margin = _other_last(of_groups, moe.top_groups)
        plain, other = (_order(values)[:, : moe.top_k] for values in (kept, ranked(groups)))
        return other, margin.masked_fill((plain.sort(-1).values == other.sort(-1).values).all(-1), torch.inf)


def _order(values: Tensor) -> Tensor:
    """[T, N] -> the best first; of equal ones the first, as the operators have it."""
    return values.sort(dim=-1, descending=True, stable=True).indices


def _other_last(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[T, N] -> the k best but the last and the one after it [T, k], and what is between these two [T].

    Where none is left out: the k best, infinity.
    """
    order = _order(values)
    if k == values.shape[-1]:
        return order, torch.full_like(values[:, 0], torch.inf)
    last, after = values.gather(-1, order[:, k - 1 : k + 1]).unbind(-1)
    return torch.cat((order[:, : k - 1], order[:, k : k + 1]), -1), last - after


class Experts(nn.Module):
    """The MLP of a layer with experts: a weighted sum of the chosen ones, and shared ones that every token passes.

    `held`: the half-open range of experts that this rank holds; the ranks' sums are added.
    """

    def __init__(
        self,
        router: Router,
        gate_up: ParallelLinear,
        down: ParallelLinear,
        shared: GatedMLP | None,
        moe: Moe,
        held: tuple[int, int],
    ) -> None:
        super().__init__()
        self.router, self.gate_up, self.down, self.shared_experts = router, gate_up, down, shared
        self.experts, self.top_k, self.held = moe.experts, moe.top_k, held
        self.holds_all = held == (0, moe.experts)
        find_submodules_directly(self)

    def forward(self, x: Tensor) -> Tensor:
        """[T, H] -> [T, H]."""
        weights, chosen = self.router(x)
        rows, places, counts, _ = ops.npu_moe_init_routing_v2(
            x,
            chosen,
            active_num=x.shape[0] * self.top_k,
            expert_num=self.experts,
            expert_tokens_num_type=COUNTS,
            expert_tokens_num_flag=True,
            active_expert_range=list(self.held),
            quant_mode=-1,
        )
        hidden = ops.npu_swiglu(self.gate_up.multiply(rows, counts))
        product = self.down.multiply(self.down.spread(hidden), counts)
        if not self.holds_all:
            # rows of experts that other ranks hold come last, and hold anything
            beyond = torch.arange(product.shape[0], device=product.device) >= counts.sum()
            product = product.masked_fill(beyond.unsqueeze(1), 0)
            weights = weights.masked_fill(places.view_as(weights) < 0, 0)
            places = places.clamp(min=0)
        y = self.down.join(ops.npu_moe_token_unpermute(product, places, weights.to(product.dtype)))
        return y if self.shared_experts is None else y + self.shared_experts(x)
