"""The four drawings of a plan: A devices, B layers and parts, C one layer cut, D what a token reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from math import sqrt
from typing import Any

from markupsafe import Markup

from framework.report.fold import Entry, Fold, Rank, fold, joined, place, rank_name, rank_runs, shape, shard, split
from framework.report.html_svg import MONO, SANS, drawing, el, fill, text, ticks
from framework.report.plan import BYTES, is_weight, planned
from framework.report.text import GIB, size

BAR, GAP = 14, 6
CUT = 150.0  # the longest side of panel C
_CUT = ("split", "shape", "shards", "scheme", "experts")
WORDS = {"weights_bytes": "weights", "kv_cache_bytes": "KV cache", "workspace_bytes": "workspace"}
_READ = 11  # parts with a bar of their own
_UNFOLDED = 32  # ranks that are drawn one by one, equal or not


def whole_axis(ranks: Sequence[Rank]) -> bool:
    """Whether the axis of `devices` reaches the capacity: where much less is used, only what is used is drawn."""
    return bool(_capacity(ranks)) and _most(ranks) > _capacity(ranks) / 8


def devices(document: dict[str, Any]) -> Markup:
    """A: a bar per rank, its bytes on one axis."""
    ranks = document["ranks"]
    runs = [[rank] for rank in ranks] if len(ranks) <= _UNFOLDED else rank_runs(ranks)
    end = _capacity(ranks) * 1.02 if whole_axis(ranks) else _most(ranks) * 1.05
    left, wide, right = SANS * max(len(rank_name(run)) for run in runs) + 12, 400.0, 120
    scale = wide / end
    bars: list[Markup] = []
    y = 4.0
    for node, members in groupby(runs, key=lambda run: run[0]["node"]):
        if ranks[-1]["node"]:
            bars.append(text(0, y + 11, f"node {node}", "strong"))
            y += BAR + GAP
        for run in members:
            bars += [text(0, y + 11, rank_name(run)), *_bar(run[0], left, y, scale)]
            used, may = planned(run[0]), run[0]["capacity_bytes"]
            share = f" · {100 * used / may:.0f} %" if may else ""
            bars.append(text(left + wide + 8, y + 11, size(used) + share))
            y += BAR + GAP
    axis = [text(left + wide + 8, y + 14, "GiB", "dim")]
    for at in ticks(end / GIB):
        x = left + at * GIB * scale
        axis += [el("line", x1=x, x2=x, y1=0, y2=y, class_="grid"), text(x, y + 14, f"{at:g}", "dim", "middle")]
    if whole_axis(ranks):
        x, title = left + _capacity(ranks) * scale, f"may be used: {size(_capacity(ranks))}"
        bars.append(el("line", el("title", title), x1=x, x2=x, y1=0, y2=y, class_="limit"))
    description = "; ".join(f"{rank_name(run)} {size(planned(run[0]))}" for run in runs)
    return drawing(left + wide + right, y + 20, "Bytes of each rank", description, *axis, *bars)


def _capacity(ranks: Sequence[Rank]) -> int:
    return int(max(rank["capacity_bytes"] for rank in ranks))


def _most(ranks: Sequence[Rank]) -> int:
    return int(max(max(planned(rank), rank["load_peak_bytes"]) for rank in ranks))


def _bar(rank: dict[str, Any], x: float, y: float, scale: float) -> list[Markup]:
    parts = []
    start = x
    for name in BYTES:
        length = rank[name] * scale
        if length:
            title = el("title", f"rank {rank['rank']} {WORDS[name]}: {size(rank[name])}")
            parts.append(el("rect", title, x=x, y=y, width=length, height=BAR, class_=f"m-{name}"))
        x += length
    peak = start + rank["load_peak_bytes"] * scale
    title = el("title", f"rank {rank['rank']} load peak: {size(rank['load_peak_bytes'])}")
    parts.append(el("line", title, x1=peak, x2=peak, y1=y - 2, y2=y + BAR + 2, class_="peak"))
    return parts


def layers(document: dict[str, Any], said: Mapping[str, str]) -> Markup:
    """B: a row for each part of a model, a cell for each layer; `said` is what a cell says by its module's name."""
    rows: dict[tuple[str, str], list[tuple[int, Entry]]] = {}
    for entry in document["modules"]:
        stack, layer, part = place(entry["name"])
        rows.setdefault((stack, part), []).append((layer or 0, entry))
    last = max(layer for cells in rows.values() for layer, _ in cells)
    pitch = min(22.0, max(5.0, 720 / (last + 1)))
    left = MONO * max(len(_short(part)) for _, part in rows) + 14
    at_shape = left + (last + 1) * pitch + 10
    at_split = at_shape + MONO * max(len(_one(shape, cells)) for cells in rows.values()) + 14
    right = at_split + MONO * max(len(_one(split, cells)) for cells in rows.values())
    parts: list[Markup] = []
    y = 0.0
    for stack, members in groupby(rows.items(), key=lambda item: item[0][0]):
        if stack:
            y += 18
            parts.append(text(0, y, stack, "strong"))
            numbers = range(0, last + 1, 5 if pitch > 9 else 10)
            parts += [text(left + (i + 0.5) * pitch - 0.75, y, str(i), "dim", "middle") for i in numbers]
        y += 5
        for (_, part), cells in members:
            parts.append(text(0, y + 11, _short(part), "mono"))
            drawn = [_cell(entry, left + layer * pitch, pitch - 1.5, said[entry["name"]]) for layer, entry in cells]
            parts.append(el("g", *drawn, class_="cells", transform=f"translate(0,{y:g})"))
            parts.append(text(at_shape, y + 11, _one(shape, cells), "mono dim"))
            parts.append(text(at_split, y + 11, _one(split, cells), "mono dim"))
            y += 16
    description = "One row for each part, one cell for each layer, coloured by scheme; the table below says the same."
    return drawing(right, y + 4, "Layers and parts by scheme", description, *parts)


def _cell(entry: Entry, x: float, width: float, said: str) -> Markup:
    title = el("title", said)
    if is_weight(entry):
        return el("rect", title, x=x, width=width, height=14, class_=fill(entry["scheme"]))
    return el("rect", title, x=x, y=5, width=width, height=4, class_="small")


def _one(fact: Callable[[Entry], str], cells: Sequence[tuple[int, Entry]]) -> str:
    """What all cells of a row share."""
    found = {fact(entry) for _, entry in cells}
    return found.pop() if len(found) == 1 else "various"


def _short(part: str) -> str:
    return part.removeprefix("model.")


def cuts(document: dict[str, Any]) -> list[tuple[Markup, str, str]]:
    """C: each kind of weight of a layer once, cut as the ranks hold it: drawing, names, what is done.

    Sides are drawn as square roots of N and K, or the thin ones would vanish.
    """
    kinds: dict[str, list[Fold]] = {}
    for kind in fold(document["modules"], _CUT):
        if kind.stack and is_weight(kind.entry):
            kinds.setdefault(str([kind.entry.get(key) for key in _CUT]), []).append(kind)
    longest = max((max(found[0].entry["shape"]) for found in kinds.values()), default=1)
    return [_cut(found, CUT / sqrt(longest)) for found in kinds.values()]


def _cut(found: list[Fold], scale: float) -> tuple[Markup, str, str]:
    entry = found[0].entry
    n, k = entry["shape"]
    width, height = sqrt(k) * scale, sqrt(n) * scale
    parts = []
    for rank, (n0, n1, k0, k1) in reversed(list(enumerate(entry["shards"]))):  # rank 0 over copies of its part
        parts.append(
            el(
                "rect",
                el("title", f"rank {rank}: {shard(entry, rank)}"),
                x=k0 / k * width,
                y=n0 / n * height,
                width=(k1 - k0) / k * width,
                height=(n1 - n0) / n * height,
                class_=f"cut {fill(entry['scheme']) if rank == 0 else f'other{rank % 2}'}",
            )
        )
    how = "whole on every rank" if entry["split"] == "replicated" else split(entry)
    names = joined(kind.part for kind in found)
    return drawing(width, height, names, f"{shape(entry)} {how}", *parts), names, f"{shape(entry)} {how}"


def reads(document: dict[str, Any], read: Sequence[int]) -> Markup:
    """D: bytes of weights that a token reads on the slowest rank, by part; `read` is each module's."""
    by_part: dict[str, Counter[str]] = {}
    for entry, nbytes in zip(document["modules"], read, strict=True):
        by_part.setdefault(_short(place(entry["name"])[2]), Counter())[entry["scheme"]] += nbytes
    least = sum(read) / 200  # a smaller bar is not seen
    ordered = sorted(by_part.items(), key=lambda item: -item[1].total())
    shown = [(part, schemes) for part, schemes in ordered[:_READ] if schemes.total() >= least]
    others = Counter[str]()
    for _, schemes in ordered[len(shown) :]:
        others += schemes
    shown += [("all others", others)] if others else []
    left, wide = MONO * max(len(part) for part, _ in shown) + 12, 260
    scale = wide / max(1, *(schemes.total() for _, schemes in shown))
    parts, y = [], 4.0
    for part, schemes in shown:
        parts.append(text(0, y + 11, part, "mono"))
        x = left
        for scheme, nbytes in schemes.items():
            title = el("title", f"{part} {scheme}: {size(nbytes)}")
            parts.append(el("rect", title, x=x, y=y, width=nbytes * scale, height=BAR, class_=fill(scheme)))
            x += nbytes * scale
        parts.append(text(x + 6, y + 11, size(schemes.total())))
        y += BAR + GAP
    description = "; ".join(f"{part} {size(schemes.total())}" for part, schemes in shown)
    return drawing(left + wide + 80, y, "Bytes of weights that a token reads", description, *parts)
