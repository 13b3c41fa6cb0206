"""Linear layers over tensor-parallel ranks. They know cuts and collectives, neither formats nor schemes by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from framework.geometry import Split
from framework.layers.group import Group


@dataclass(frozen=True)
class Part:
    """One matmul of a layer: `apply(x [T, K]) -> [T, N]`, without bias or reduction, and the bytes it holds."""

    apply: Callable[[Tensor], Tensor]
    nbytes: int


class ParallelLinear(nn.Module):
    """y = x W^T + b for a W that is cut over the ranks of a group.

    `parts` are matmuls over the same input whose outputs are concatenated (equal schemes come fused as one part).
    COLUMN and VOCAB: every rank makes its own features. ROW: partial sums are added over the ranks. ROWS_GATHER:
    inputs are gathered, every rank makes some rows, outputs are gathered. The bias is added once, after the
    reduction. `in_sizes`, `out_sizes`: every rank's share of K and N, for the gathers. `names`, `widths`:
    the modules that the layer computes and their share of its output on this rank.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        bias: Tensor | None,
        split: Split,
        group: Group,
        in_sizes: list[int],
        out_sizes: list[int],
        names: Sequence[str] = (),
        widths: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.names, self.widths = list(names), list(widths)
        self.parts = list(parts)
        self.bias = bias
        self.split = split
        self.group = group
        self.in_sizes, self.out_sizes = in_sizes, out_sizes
        self.reduces = split is Split.ROW and group.size > 1
        self.gathers = split is Split.ROWS_GATHER and group.size > 1
        self.apply_first = self.parts[0].apply if len(self.parts) == 1 else None

    @property
    def nbytes(self) -> int:
        """Bytes this rank holds for the layer."""
        own = sum(part.nbytes for part in self.parts)
        return own if self.bias is None else own + self.bias.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """[T, K of this rank] -> [T, N of this rank] (ROW, ROWS_GATHER: all of N)."""
        if self.gathers:
            x = self.group.all_gather(x, self.in_sizes)
        if self.apply_first is not None:
            y = self.apply_first(x)
        else:
            y = torch.cat([part.apply(x) for part in self.parts], dim=-1)
        if self.reduces:
            y = self.group.all_reduce(y)
        elif self.gathers:
            y = self.group.all_gather(y, self.out_sizes)
        return y if self.bias is None else y + self.bias
