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
    piece_bits: int = 0
    otherwise: str = "refuse"

    @property
    def ops(self) -> str:
        """The calls that run a module, in order."""
        return f"{self.activation} + {self.op}" if self.activation else self.op

    @property
    def rows(self) -> int:
        """The most rows of a call; 0: any number."""
        step = lcm(self.step[0], self.cut[0])
        return self.max // step * step

    def grain(self, held: tuple[int, int]) -> tuple[int, int]:
        """Return rows and columns at which a module may be cut, given those that its bytes allow."""
        return lcm(held[0], self.step[0], self.cut[0]), lcm(held[1], self.step[1], self.cut[1])


@dataclass(frozen=True, slots=True)
class Fit:
    """How a shard runs.

    `scheme` is `float` where the weight is dequantized at load instead. `pieces` is the number of calls whose results
    are joined or added, `bits` the width of a code there (0: the scheme's). `reason` says why it is not the op as it
    is; with `refused` nothing can run it.
    """

    scheme: str
    op: str
    pieces: int = 1
    bits: int = 0
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
    group = group if group < k else 0
    # experts are held as one operand: its rows are not dealt to calls
    rows = -(-n // limit.rows) if limit.max and layer_type == "linear" else 1
    fault = _fault(limit, n, k, group, whole=rows == 1)
    if limit.symmetric and not symmetric:
        fault = f"{limit.op} takes codes without zero points"
    other = "" if fault or limit.groups is None else _regrouped(limit.op, limit.groups, k, group)
    if (fault or other) and limit.otherwise == "float":
        return Fit("float", limits["float", layer_type].op, reason=fault or other)
    if fault or (other and limit.otherwise != "pieces"):
        return Fit(scheme, limit.ops, reason=fault or other, refused=True)
    pieces = rows * (-(-k // group) if other and group else 1)
    reasons = [other] * bool(other) + [f"{limit.op} takes N up to {limit.max}, not {n}"] * (rows > 1)
    if not reasons:
        return Fit(scheme, limit.ops)
    bits = limit.piece_bits if other else 0
    held = f" of {bits}-bit codes" if bits else ""
    calls = f"{pieces} calls" if pieces > 1 else "one call"
    return Fit(scheme, limit.ops, pieces, bits, f"{' and '.join(reasons)}: {calls}{held}")


def _fault(limit: Limit, n: int, k: int, group: int, *, whole: bool) -> str:
    """Say what of a shard no number of calls takes; `whole`: its rows are not dealt to calls."""
    for size, step, axis in ((n, limit.step[0], "N"), (k, limit.step[1], "K")):
        if size % step:
            return f"{limit.op} takes {axis} in multiples of {step}, not {size}"
    if group and (group % limit.group_step or group < limit.group_min):
        return f"{limit.op} takes groups in multiples of {limit.group_step} from {limit.group_min}, not {group}"
    if group and limit.whole_groups and k % group:
        return f"{limit.op} takes whole groups, K {k} is no multiple of {group}"
    if limit.max and max(n if whole else 0, k) > limit.max:
        return f"{limit.op} takes K and N up to {limit.max}, not [{n}, {k}]"
    return ""


def _regrouped(op: str, groups: tuple[int, ...], k: int, group: int) -> str:
    """Say which groups a call takes, if not these; scales are repeated where they span several of the op's groups."""
    if group in groups or any(size and (group or k) % size == 0 for size in groups):
        return ""
    taken = " or ".join("one scale a row" if g == 0 else f"groups of {g}" for g in groups)
    return f"{op} takes {taken}, not {f'groups of {group}' if group else f'one scale a row of {k}'}"
