"""Along which axes the ranks of a plan stand, and who works with whom. Pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from framework.recipe.schema import Parallel

# Innermost first: neighbours talk most, so they share a node where there are several.
AXES = ("tp", "ulysses", "cfg", "data")


@dataclass(frozen=True, slots=True)
class Layout:
    """How many ranks stand along each axis; a rank has one place on all of them.

    `tp`: each holds a part of every weight. `ulysses`: each has a part of the tokens. `cfg`: each makes one of the
    two predictions that guidance combines. `data`: each has outputs of its own.
    """

    tp_size: int = 1
    ulysses_size: int = 1
    cfg_size: int = 1
    data_size: int = 1

    @property
    def sizes(self) -> dict[str, int]:
        """Ranks along each axis."""
        return {axis: getattr(self, f"{axis}_size") for axis in AXES}

    @property
    def size(self) -> int:
        """Ranks in all."""
        return prod(self.sizes.values())

    def at(self, rank: int) -> dict[str, int]:
        """Return a rank's place on each axis."""
        place = {}
        for axis, size in self.sizes.items():
            rank, place[axis] = divmod(rank, size)
        return place

    def groups(self, *axes: str) -> list[list[int]]:
        """Return the groups of ranks that differ in these axes alone, each in rank order."""
        found: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.size):
            place = self.at(rank)
            found.setdefault(tuple(place[axis] for axis in AXES if axis not in axes), []).append(rank)
        return list(found.values())

    @classmethod
    def of(cls, parallel: Parallel) -> Layout:
        """Return the layout that a recipe asks for."""
        return cls(**{f"{axis}_size": getattr(parallel, f"{axis}_size") for axis in AXES})

    def __str__(self) -> str:
        """Name the axes that are used, outermost first."""
        used = [f"{axis} {size}" for axis, size in reversed(self.sizes.items()) if size > 1]
        return " x ".join(used) or "one rank"
