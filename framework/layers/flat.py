"""Our layers inside models that are not ours: activations of any leading shape, norms over features that are dealt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from framework.layers.group import Group
from framework.layers.linear import ParallelLinear


class FlatLinear(nn.Module):
    """A ParallelLinear for inputs [.., K]: leading dimensions are flattened to tokens and restored."""

    def __init__(self, inner: ParallelLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner, self.dtype = inner, dtype

    def forward(self, x: Tensor) -> Tensor:
        """[.., K of this rank] -> [.., N of this rank]."""
        y = self.inner(x.reshape(-1, x.shape[-1]).to(self.dtype))
        return y.view(*x.shape[:-1], y.shape[-1])


class DealtRMSNorm(nn.Module):
    """x / rms(x) * w over features of which this rank holds a part: the sum of squares is added over the ranks.

    `weight` [this rank's features]; `features` of all ranks.
    """

    def __init__(self, weight: Tensor, eps: float, features: int, group: Group) -> None:
        super().__init__()
        self.weight, self.eps, self.features, self.group = weight, eps, features, group

    def forward(self, x: Tensor) -> Tensor:
        """[.., H of this rank] -> the same."""
        wide = x.float()
        squares = self.group.all_reduce(wide.square().sum(-1, keepdim=True))
        return (wide * torch.rsqrt(squares / self.features + self.eps) * self.weight.float()).to(x.dtype)
