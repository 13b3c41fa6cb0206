"""Token embedding with its rows dealt to ranks."""

from __future__ import annotations

from torch import Tensor, nn

from framework.layers.group import Group


class VocabEmbedding(nn.Module):
    """Look up rows `first .. first + len(weight)` of the vocabulary here, the rest on the other ranks."""

    def __init__(self, weight: Tensor, first: int, group: Group, scale: float) -> None:
        super().__init__()
        self.weight = weight
        self.first = first
        self.group = group
        # the published models multiply by the scale rounded to their dtype
        self.scale = None if scale == 1.0 else weight.new_tensor(scale)

    def forward(self, token_ids: Tensor) -> Tensor:
        """[T] int64 -> [T, H]."""
        if self.group.size == 1:
            x = self.weight.index_select(0, token_ids)
        else:
            local = token_ids - self.first
            elsewhere = (local < 0) | (local >= self.weight.shape[0])
            x = self.weight.index_select(0, local.masked_fill(elsewhere, 0))
            x = self.group.all_reduce(x.masked_fill(elsewhere.unsqueeze(1), 0))
        return x if self.scale is None else x * self.scale
