"""The ranks that share one model, as layers see them. The cluster room provides real groups."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Group(Protocol):
    """Collectives over ranks. Every result is bit-equal on all ranks, but for `all_to_all`."""

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

    def all_to_all(self, parts: list[Tensor], counts: list[list[int]]) -> list[Tensor]:
        """Give parts[r] to rank r; return what each rank had for this one, flat, in rank order.

        `counts[s][r]`: values that rank s has for rank r, the same table on all ranks.
        """
        ...

    def split(self, groups: list[list[int]]) -> Group:
        """Return the group of those that has this rank. All ranks call it alike; each rank is in one of `groups`."""
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

    def all_to_all(self, parts: list[Tensor], counts: list[list[int]]) -> list[Tensor]:
        """Return x, flat."""
        return [parts[0].flatten()]

    def split(self, groups: list[list[int]]) -> Group:
        """Return this group."""
        return self
