"""The ranks that share one model, as layers see them. The cluster room provides real groups."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Group(Protocol):
    """Collectives over the tensor-parallel ranks. Every result is bit-equal on all ranks."""

    rank: int
    size: int

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over ranks, in rank order; may write in place; returns the sum, same shape and dtype."""
        ...

    def all_gather(self, x: Tensor, sizes: list[int], dim: int = -1) -> Tensor:
        """Concatenate the ranks' parts along `dim`, in rank order; rank r's part has sizes[r] there."""
        ...

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """Overwrite `x` with the source rank's values (in place) and return it."""
        ...


class Alone:
    """A group of one."""

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return x."""
        return x

    def all_gather(self, x: Tensor, sizes: list[int], dim: int = -1) -> Tensor:
        """Return x."""
        return x

    def broadcast(self, x: Tensor, source: int = 0) -> Tensor:
        """Return x."""
        return x
