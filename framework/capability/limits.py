"""What the hardware form of a scheme's op takes (conf/ops/limits.yaml), and how a shard beyond it is run."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True, slots=True)
class Limit:
    """The limits of one scheme on one layer type; conf/ops/limits.yaml says what each means."""

    op: str
    activation: str = ""
    max: int = 0
    step: tuple[int, int] = (1, 1)
    cut: tuple[int, int] = (1, 1)
    group_step: int = 1
    group_min: int = 1
    whole_groups: bool = False
    groups: tuple[int, ...] | None = None
    symmetric: bool = False
    otherwise: str = "refuse"

    @property
    def ops(self) -> str:
        """The calls that run a module, in order."""
        return f"{self.activation} + {self.op}" if self.activation else self.op

    def grain(self, held: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns at which a module may be cut, given those that its bytes allow."""
        return lcm(held[0], self.step[0], self.cut[0]), lcm(held[1], self.step[1], self.cut[1])


@dataclass(frozen=True, slots=True)
class Fit:
    """How a shard runs.

    `scheme` is `float` where the weight is dequantized at load instead. `pieces` is the number of calls whose results
    are joined or added. `reason` says why it is not the op as it is; with `refused` nothing can run it.
    """

    scheme: str
    op: str
    pieces: int = 1
    reason: str = ""
    refused: bool = False


Limits = dict[tuple[str, str], Limit]


def read_limits(folder: Path) -> Limits:
    """Read `<folder>/limits.yaml`: limits by scheme and layer type."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    data = yaml.load((folder / "limits.yaml").read_text(encoding="utf-8"), Loader=loader)
    return {
        (scheme, layer_type): Limit(**{key: _tuples(value) for key, value in given.items()})
        for scheme, layers in data.items()
        for layer_type, given in layers.items()
    }


def _tuples(value: Any) -> Any:  # noqa: ANN401
    return tuple(value) if isinstance(value, list) else value


def fit(limits: Limits, scheme: str, layer_type: str, n: int, k: int, group: int, *, symmetric: bool = True) -> Fit:
    """Return how one shard [n, k] with quantization groups of `group` along k (0: one a row) runs.

    `symmetric`: the file's codes have no zero points.

    A group that spans the shard is one scale a row, which ops take apart from groups.
    """
    limit = limits[scheme, layer_type]
    reason, pieces = _beyond(limit, n, k, group if group < k else 0)
    if limit.symmetric and not symmetric:
        reason, pieces = f"{limit.op} takes codes without zero points", 1
    if not reason:
        return Fit(scheme, limit.ops)
    if limit.otherwise == "float":
        return Fit("float", limits["float", layer_type].op, reason=f"{reason}: dequantized at load")
    if limit.otherwise == "pieces" and pieces > 1:
        return Fit(scheme, limit.ops, pieces, f"{reason}: {pieces} calls")
    return Fit(scheme, limit.ops, reason=reason, refused=True)


def _beyond(limit: Limit, n: int, k: int, group: int) -> tuple[str, int]:
    """Say what of a shard the op does not take, and how many calls it would take; an empty reason if it takes it."""
    for size, step, axis in ((n, limit.step[0], "N"), (k, limit.step[1], "K")):
        if size % step:
            return f"{limit.op} takes {axis} in multiples of {step}, not {size}", 1
    rows = -(-n // limit.max) if limit.max else 1
    if limit.groups is not None and not _takes(limit.groups, group):
        taken = " or ".join("one scale a row" if g == 0 else f"groups of {g}" for g in limit.groups)
        return f"{limit.op} takes {taken}, not groups of {group}", rows * -(-k // group)
    if group and (group % limit.group_step or group < limit.group_min):
        return f"{limit.op} takes groups in multiples of {limit.group_step} from {limit.group_min}, not {group}", 1
    if group and limit.whole_groups and k % group:
        return f"{limit.op} takes whole groups, K {k} is no multiple of {group}", 1
    if limit.max and max(n, k) > limit.max:
        return f"{limit.op} takes K and N up to {limit.max}, not [{n}, {k}]", rows * -(-k // limit.max)
    return "", 1


def _takes(groups: tuple[int, ...], group: int) -> bool:
    """Whether a call takes these groups; scales are repeated where they span several of the op's groups."""
    return group in groups or any(size and group % size == 0 for size in groups)
