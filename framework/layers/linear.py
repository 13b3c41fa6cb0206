"""Linear layers over tensor-parallel ranks. They know cuts and collectives, neither formats nor schemes by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from framework.geometry import Split
from framework.layers.group import Group
from framework.layers.submodules import LeanModule


@dataclass(frozen=True)
class Part:
    """One matmul of a layer, without bias or reduction, and the bytes it holds.

    `apply(x [T, K]) -> [T, N]`; of experts `apply(x, counts)`, whose rows are sorted by expert, counts int64 [E].
    `biased`: `apply(x, bias [N])` adds a bias in the same call.
    """

    apply: Callable[..., Tensor]
    nbytes: int
    biased: bool = False


class ParallelLinear(LeanModule):
    """y = x W^T + b for a W that is cut over the ranks of a group.

    `parts` are matmuls over the same input whose outputs are concatenated (equal schemes come fused as one part).
    COLUMN and VOCAB: every rank makes its own features. ROW: partial sums are added over the ranks. ROWS_GATHER:
    inputs are gathered, every rank makes some rows, outputs are gathered. The bias is added once, after the
    reduction. `in_sizes`: every rank's share of each range of K (ranges are dealt one by one), `out_sizes`: of N, for
    the gathers. `names`, `widths`:
    the modules that the layer computes and their share of its output on this rank.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        bias: Tensor | None,
        split: Split,
        group: Group,
        in_sizes: list[list[int]],
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
        self.reduces = split in (Split.ROW, Split.EXPERT) and group.size > 1
        self.gathers = split is Split.ROWS_GATHER and group.size > 1
        self.apply_first = self.parts[0].apply if len(self.parts) == 1 else None
        if self.apply_first is not None and not self.reduces and not self.gathers:
            # nothing but the matmul: three Python frames less a call, 120 calls a token
            if bias is None:
                self.forward = self.apply_first  # type: ignore[method-assign]
            elif self.parts[0].biased:
                self.forward = partial(self.apply_first, bias=bias)  # type: ignore[method-assign]

    @property
    def nbytes(self) -> int:
        """Bytes this rank holds for the layer."""
        own = sum(part.nbytes for part in self.parts)
        return own if self.bias is None else own + self.bias.nbytes

    def forward(self, x: Tensor) -> Tensor:
        """[T, K of this rank] -> [T, N of this rank] (ROW, ROWS_GATHER: all of N)."""
        y = self.join(self.multiply(self.spread(x)))
        return y if self.bias is None else y + self.bias

    def spread(self, x: Tensor) -> Tensor:
        """Give every rank the inputs that its rectangle multiplies."""
        if not self.gathers:
            return x
        parts = x.split([sizes[self.group.rank] for sizes in self.in_sizes], dim=-1)
        whole = [self.group.all_gather(part, sizes) for part, sizes in zip(parts, self.in_sizes, strict=True)]
        return whole[0] if len(whole) == 1 else torch.cat(whole, dim=-1)

    def multiply(self, x: Tensor, *counts: Tensor) -> Tensor:
        """Return this rank's product; of experts for rows sorted by expert, with their counts."""
        if self.apply_first is not None:
            return self.apply_first(x, *counts)
        return torch.cat([part.apply(x, *counts) for part in self.parts], dim=-1)

    def join(self, y: Tensor) -> Tensor:
        """Add or gather the ranks' products."""
        if self.reduces:
            return self.group.all_reduce(y)
        return self.group.all_gather(y, self.out_sizes) if self.gathers else y
