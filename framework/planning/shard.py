"""Where tensor parallelism cuts: every axis of the model is dealt to ranks once, all its modules follow."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

from framework.errors import Problem
from framework.geometry import HeadShare, Kind, Module, Rect, Split


def deal(count: int, ranks: int) -> list[tuple[int, int]]:
    """Deal `count` things to ranks in order, as evenly as possible; the first ranks get the remainder."""
    size, extra = divmod(count, ranks)
    ends = [size * (r + 1) + min(r + 1, extra) for r in range(ranks)]
    return [(ends[r - 1] if r else 0, ends[r]) for r in range(ranks)]


def deal_heads(heads: int, kv_heads: int, ranks: int) -> list[HeadShare]:
    """Deal whole KV groups to ranks; with more ranks than KV heads, deal ranks to KV heads.

    In the second case each rank holds one (copied) KV head and a contiguous share of its query heads.
    `ranks` may not exceed `heads`.
    """
    group = heads // kv_heads
    if ranks <= kv_heads:
        return [HeadShare(a * group, b * group, a, b) for a, b in deal(kv_heads, ranks)]
    shares = []
    for kv, (first, last) in enumerate(deal(ranks, kv_heads)):
        for a, b in deal(group, last - first):
            shares.append(HeadShare(kv * group + a, kv * group + b, kv, kv + 1))
    return shares


def deal_axis(length: int, ranks: int, grain: int) -> list[tuple[int, int]]:
    """Deal an axis of `length` elements in multiples of `grain` (the last piece may be shorter)."""
    blocks = -(-length // grain)
    return [(min(a * grain, length), min(b * grain, length)) for a, b in deal(blocks, ranks)]


# Rows of embeddings and heads are dealt in multiples of 16, the row tile of NZ layouts and of int4 kernels.
VOCAB_GRAIN = 16


@dataclass(frozen=True)
class Cuts:
    """The dealing of every axis: `axes[name][rank]` is a half-open range of that axis's elements."""

    axes: dict[str, list[tuple[int, int]]]
    heads: list[HeadShare]


def cut(
    modules: list[Module], grains: dict[str, tuple[int, int]], heads: int, kv_heads: int, tp_size: int
) -> Cuts | Problem:
    """Deal all axes, respecting each module's grain (rows, columns), or say why it is impossible."""
    if tp_size > heads:
        return Problem(
            "tp-heads",
            f"{heads} attention heads cannot be split over {tp_size} ranks",
            "parallel.tp_size",
            "every rank needs at least one whole query head",
            f"parallel.tp_size={heads}   (any size from 1 to {heads})",
        )
    shares = deal_heads(heads, kv_heads, tp_size)
    axes = {"q_heads": [(s.q0, s.q1) for s in shares], "kv_heads": [(s.kv0, s.kv1) for s in shares]}
    lengths: dict[str, int] = {}
    row_steps: dict[str, int] = {"vocab": VOCAB_GRAIN}
    column_steps: dict[str, int] = {}
    for module in modules:
        if not module.axis or module.axis in axes:
            continue
        by_rows = module.split in (Split.COLUMN, Split.VOCAB)
        lengths[module.axis] = module.shape[0 if by_rows else 1] // module.unit
        grain = grains.get(module.name, (1, 1))[0 if by_rows else 1]
        steps = row_steps if by_rows else column_steps
        steps[module.axis] = lcm(steps.get(module.axis, 1), max(1, grain // module.unit))
    for axis, length in lengths.items():
        # too few whole groups for every rank: cut anywhere, and let `place` keep the rows of the row-split modules
        wishes = (lcm(row_steps.get(axis, 1), column_steps.get(axis, 1)), row_steps.get(axis, 1), 1)
        step = next((wish for wish in wishes if -(-length // wish) >= tp_size), 0)
        if not step:
            return Problem(
                "tp-size",
                f"{length} {axis} features cannot be split over {tp_size} ranks",
                "parallel.tp_size",
                "every rank needs at least one",
                f"parallel.tp_size={length}",
            )
        axes[axis] = deal_axis(length, tp_size, step)
    return Cuts(axes, shares)


def place(module: Module, cuts: Cuts, grain: tuple[int, int], tp_size: int) -> tuple[Split, tuple[Rect, ...]]:
    """Return how a module is split and each rank's rectangle.

    A row split whose columns cannot be cut at the grain keeps whole rows instead: its rows are dealt and its
    inputs gathered (`rows+gather`).
    """
    n, k = module.shape
    if module.kind is Kind.NORM or not module.axis:
        return Split.REPLICATED, (module.full,) * tp_size
    ranges = [(a * module.unit, b * module.unit) for a, b in cuts.axes[module.axis]]
    if module.split is Split.ROW:
        if all(a % grain[1] == 0 and (b % grain[1] == 0 or b == k) for a, b in ranges):
            return Split.ROW, tuple(Rect(0, n, a, b) for a, b in ranges)
        if tp_size == 1:
            return Split.ROW, (module.full,)
        step = VOCAB_GRAIN if n >= VOCAB_GRAIN * tp_size else 1
        return Split.ROWS_GATHER, tuple(Rect(a, b, 0, k) for a, b in deal_axis(n, tp_size, step))
    return module.split, tuple(Rect(a, b, 0, k) for a, b in ranges)
