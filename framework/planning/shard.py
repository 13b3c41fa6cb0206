"""Where tensor parallelism cuts: every axis of the model is dealt to ranks once, all its modules follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import gcd, lcm

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
_MAX_SIZES = 64  # tensor-parallel sizes of models without heads of their own that are tried


@dataclass(frozen=True)
class Cuts:
    """The dealing of every axis: `axes[name][rank]` is a half-open range of that axis's elements.

    `heads` is empty for a model without heads of its own kind of dealing (a diffusion transformer).
    """

    axes: dict[str, list[tuple[int, int]]]
    heads: list[HeadShare]


def cut(
    modules: Iterable[Module],
    grains: Mapping[str, tuple[int, int]],
    tp_size: int,
    heads: tuple[int, int] | None = None,
    ep_size: int = 1,
) -> Cuts | Problem:
    """Deal all axes, respecting each module's grain (rows, columns), or say why it is impossible.

    With `ep_size` groups of ranks that hold different experts, each expert is dealt to the ranks of one group.
    `heads` are the query and KV heads of a decoder, whose axes `q_heads` and `kv_heads` are dealt by whole KV groups.
    """
    axes: dict[str, list[tuple[int, int]]] = {}
    shares: list[HeadShare] = []
    if heads is not None:
        if tp_size > heads[0]:
            return Problem(
                "tp-heads",
                f"{heads[0]} attention heads cannot be split over {tp_size} ranks",
                "parallel.tp_size",
                "every rank needs at least one whole query head",
                f"parallel.tp_size={heads[0]}   (any size from 1 to {heads[0]})",
            )
        shares = deal_heads(*heads, tp_size)
        axes = {"q_heads": [(s.q0, s.q1) for s in shares], "kv_heads": [(s.kv0, s.kv1) for s in shares]}
    lengths: dict[str, int] = {}
    row_steps: dict[str, int] = {"vocab": VOCAB_GRAIN}
    column_steps: dict[str, int] = {}
    of_experts: set[str] = set()
    for module in modules:
        if not module.axis or module.axis in axes:
            continue
        if module.kind is Kind.EXPERTS:
            of_experts.add(module.axis)
        by_rows = module.split in (Split.COLUMN, Split.VOCAB)
        lengths[module.axis] = module.shape[0 if by_rows else 1] // module.unit
        grain = grains.get(module.name, (1, 1))[0 if by_rows else 1]
        steps = row_steps if by_rows else column_steps
        steps[module.axis] = lcm(steps.get(module.axis, 1), grain // gcd(grain, module.unit))
    for axis, length in lengths.items():
        # too few whole groups for every rank: cut anywhere, and let `place` keep the rows of the row-split modules
        ranks = tp_size // ep_size if axis in of_experts else tp_size
        wishes = (lcm(row_steps.get(axis, 1), column_steps.get(axis, 1)), row_steps.get(axis, 1), 1)
        step = next((wish for wish in wishes if -(-length // wish) >= ranks), 0)
        if not step:
            return Problem(
                "tp-size",
                f"{length} {axis} features cannot be split over {ranks} ranks",
                "parallel.tp_size",
                "every rank needs at least one",
                f"parallel.tp_size={length}",
            )
        axes[axis] = deal_axis(length, ranks, step) * (tp_size // ranks)
    return Cuts(axes, shares)


def place(module: Module, cuts: Cuts, grain: tuple[int, int], tp_size: int) -> tuple[Split, tuple[Rect, ...]] | None:
    """Return how a module is split and each rank's rectangle; None if its bytes cannot be cut there.

    A row split whose columns cannot be cut at the grain keeps whole rows instead: its rows are dealt and its
    inputs gathered (`rows+gather`).
    """
    n, k = module.shape
    if module.split is Split.ROWS_GATHER:
        return _whole_rows(module, grain[0], tp_size)
    if not module.axis:
        return Split.REPLICATED, (module.full,) * tp_size
    ranges = [(a * module.unit, b * module.unit) for a, b in cuts.axes[module.axis]]
    if module.split is Split.ROW:
        if _aligned(ranges, grain[1], k):
            return Split.ROW, tuple(Rect(0, n, a, b) for a, b in ranges)
        if len(set(ranges)) < tp_size:
            return None  # the ranks of an expert's group cannot gather among themselves
        return _whole_rows(module, grain[0], tp_size)
    if not _aligned(ranges, grain[0], n):
        return None
    return module.split, tuple(Rect(a, b, 0, k) for a, b in ranges)


def _whole_rows(module: Module, grain: int, tp_size: int) -> tuple[Split, tuple[Rect, ...]] | None:
    n, k = module.shape
    step = next((wish for wish in (lcm(VOCAB_GRAIN, grain), grain) if -(-n // wish) >= tp_size), 0)
    return (Split.ROWS_GATHER, tuple(Rect(a, b, 0, k) for a, b in deal_axis(n, tp_size, step))) if step else None


def sizes_that_split(
    modules: Iterable[Module], grains: Mapping[str, tuple[int, int]], heads: tuple[int, int] | None, ep_size: int
) -> list[int]:
    """Return the tensor-parallel sizes that `cut` and `place` accept for all modules."""
    # layers repeat: of modules that are cut alike, one is tried
    kinds = {
        (m.kind, m.shape, m.split, m.axis, m.unit, grain): (m, grain)
        for m in modules
        for grain in [grains.get(m.name, (1, 1))]
    }
    tried, grains = [m for m, _ in kinds.values()], {m.name: grain for m, grain in kinds.values()}
    sizes = []
    for size in range(ep_size, (heads[0] if heads else _MAX_SIZES) + 1, ep_size):
        cuts = cut(tried, grains, size, heads, ep_size)
        if isinstance(cuts, Cuts) and all(place(m, cuts, grains[m.name], size) for m in tried):
            sizes.append(size)
    return sizes


def _aligned(ranges: list[tuple[int, int]], grain: int, end: int) -> bool:
    return all(a % grain == 0 and (b % grain == 0 or b == end) for a, b in ranges)


def deal_experts(experts: int, tp_size: int, ep_size: int) -> tuple[tuple[int, int], ...]:
    """Return each rank's half-open range of experts: neighbouring ranks share a group."""
    per_group = tp_size // ep_size
    return tuple(share for share in deal(experts, ep_size) for _ in range(per_group))
