"""Ulysses: each rank has some tokens of all heads; for attention it changes them for all tokens of some heads."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from framework.families.tokens import Cut, TokenPlan
from framework.layers.group import Group
from framework.planning.shard import deal


def deal_tokens(model: nn.Module, plan: TokenPlan, group: Group) -> None:
    """Let every rank of the group run the model on its part of the tokens; each returns the whole output."""
    counts: dict[str, list[int]] = {}
    _gather(model.get_submodule(plan.gathered), counts, group)
    for name, module in model.named_modules():
        cuts = [cut for cut in plan.cuts if cut.module == re.sub(r"\d+", "*", name) or cut.module == name]
        if cuts:
            _deal(module, cuts, counts, group)
        streams = plan.attentions.get(name.rpartition(".")[2])
        if streams:
            _attend(module, streams, counts, group)


def _deal(module: nn.Module, cuts: list[Cut], counts: dict[str, list[int]], group: Group) -> None:
    forward = module.forward
    signature = inspect.signature(forward)

    def part(cut: Cut, x: Tensor | None) -> Tensor | None:
        if x is None or (cut.ndim and x.ndim != cut.ndim):
            return x
        shares = deal(x.shape[cut.dim], group.size)
        counts[cut.stream] = [b - a for a, b in shares]
        first, last = shares[group.rank]
        return x.narrow(cut.dim, first, last - first)

    def dealt(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        given = signature.bind(*args, **kwargs)
        for cut in cuts:
            if cut.name in given.arguments:
                given.arguments[str(cut.name)] = part(cut, given.arguments[str(cut.name)])
        out = forward(*given.args, **given.kwargs)
        outputs = [cut for cut in cuts if isinstance(cut.name, int)]
        if not outputs:
            return out
        parts = list(out)
        for cut in outputs:
            parts[int(cut.name)] = part(cut, parts[int(cut.name)])
        return tuple(parts)

    module.forward = dealt


def _gather(module: nn.Module, counts: Mapping[str, list[int]], group: Group) -> None:
    def whole(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return group.all_gather(output, counts["image"], dim=1)

    module.register_forward_hook(whole)


def _attend(module: nn.Module, streams: tuple[str, ...], counts: Mapping[str, list[int]], group: Group) -> None:
    forward: Callable[..., Any] = module.forward

    def attended(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        tokens = [sum(of_rank) for of_rank in zip(*(counts[stream] for stream in streams), strict=True)]
        with _AllTokens(group, tokens):
            return forward(*args, **kwargs)

    module.forward = attended


class _AllTokens(TorchFunctionMode):
    """Within it, torch's attention is over the tokens of all ranks; `tokens` are those of each.

    The order of the tokens is rank by rank, which attention does not see: positions are inside queries and keys.
    """

    def __init__(self, group: Group, tokens: list[int]) -> None:
        super().__init__()
        self.group, self.tokens = group, tokens

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        given = dict(kwargs or {})
        if func is not torch.nn.functional.scaled_dot_product_attention:
            return func(*args, **given)
        given |= dict(zip(("query", "key", "value", "attn_mask"), args, strict=False))
        mask = given.get("attn_mask")
        if mask is not None:
            if mask.shape[-2] != 1:
                raise NotImplementedError("a mask that differs from query to query, over dealt tokens")
            given["attn_mask"] = self.group.all_gather(mask, self.tokens)
        # [3 B, H, tokens, D]: one exchange for the three
        heads = self._to_heads(torch.cat([given.pop("query"), given.pop("key"), given.pop("value")]))
        return self._to_tokens(func(*heads.chunk(3), **given))

    def _to_heads(self, x: Tensor) -> Tensor:
        """[B, H, tokens of this rank, D] -> [B, H / ranks, all tokens, D]."""
        batch, heads, _, width = x.shape
        own = heads // self.group.size
        counts = [[batch * own * mine * width] * self.group.size for mine in self.tokens]
        got = self.group.all_to_all(list(x.chunk(self.group.size, dim=1)), counts)
        return torch.cat([part.view(batch, own, -1, width) for part in got], dim=2)

    def _to_tokens(self, x: Tensor) -> Tensor:
        """[B, H / ranks, all tokens, D] -> [B, H, tokens of this rank, D]."""
        batch, own, _, width = x.shape
        counts = [[batch * own * theirs * width for theirs in self.tokens] for _ in self.tokens]
        got = self.group.all_to_all(list(x.split(self.tokens, dim=2)), counts)
        return torch.cat([part.view(batch, own, -1, width) for part in got], dim=1)
