"""A plan's modules folded over layers: one entry for all that are equal but for the number of their layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

Entry = dict[str, Any]  # one entry of plan.json's `modules`
Rank = dict[str, Any]  # one entry of its `ranks`

_LAYER = re.compile(r"\.(\d+)\.")
FACTS = ("scheme", "row", "mode", "op", "pieces", "split", "shape", "shards", "label", "group")
# what every rank's product needs before the next layer: the group's call by how the weight is split
_AFTER = {"row": "all-reduce", "rows+gather": "gather"}


@dataclass(frozen=True, slots=True)
class Fold:
    """Modules of one kind that share all facts.

    Attributes:
        stack: what comes before the layer number (`model.layers`); empty outside of layers.
        part: what comes after it (`self_attn.q_proj`); outside of layers the whole name.
        layers: the layer numbers, ascending; empty outside of layers.
        entry: the first of them, as plan.json has it.
    """

    stack: str
    part: str
    layers: tuple[int, ...]
    entry: Entry

    @property
    def linears(self) -> int:
        """How many weights it stands for, experts counted one by one."""
        return max(1, len(self.layers)) * experts(self.entry)


def experts(entry: Entry) -> int:
    """Weights that one entry stands for."""
    return entry["experts"][1] - entry["experts"][0] + 1 if "experts" in entry else 1


def place(name: str) -> tuple[str, int | None, str]:
    """Split a module's name into stack, layer and part; outside of layers (``, None, name)."""
    found = _LAYER.search(name)
    return (name[: found.start()], int(found[1]), name[found.end() :]) if found else ("", None, name)


def fold(modules: Iterable[Entry], keys: Sequence[str] = FACTS) -> list[Fold]:
    """Return the kinds of modules in the order in which they first appear; those differ that differ in a key."""
    found: dict[tuple[str, ...], tuple[list[int], Entry]] = {}
    for entry in modules:
        stack, layer, part = place(entry["name"])
        facts = (str(entry.get(key)) for key in (*keys, "experts"))
        layers, _ = found.setdefault((stack, part, *facts), ([], entry))
        if layer is not None:
            layers.append(layer)
    return [Fold(key[0], key[1], tuple(sorted(layers)), entry) for key, (layers, entry) in found.items()]


def ranges(numbers: Sequence[int], most: int = 3) -> str:
    """Return ascending numbers as ranges (`0-27, 30`); scattered over more ranges than `most`: `12 of 0-47`."""
    if not numbers:
        return ""
    runs = [[n for _, n in run] for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    if len(runs) > most:
        return f"{len(numbers)} of {numbers[0]}-{numbers[-1]}"
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def joined(parts: Iterable[str]) -> str:
    """Return names with what they share said once: `mlp.gate_proj, up_proj`."""
    below = groupby(dict.fromkeys(parts), key=lambda part: part.rpartition(".")[0])
    return ", ".join(", ".join([first, *(part.rpartition(".")[2] for part in more)]) for _, (first, *more) in below)


def after(entry: Entry) -> str:
    """What the ranks do together once their parts are computed; empty: nothing, or one rank."""
    if len(entry["shards"]) == 1:
        return ""
    if entry["split"] == "vocab":
        return "all-reduce" if entry["module"]["kind"] == "embedding" else "gather"
    return _AFTER.get(entry["split"], "")


def split(entry: Entry) -> str:
    """How it is split, and what the ranks do after it."""
    then = after(entry)
    return f"{entry['split']} + {then}" if then else str(entry["split"])


def shard(entry: Entry, rank: int = 0) -> str:
    """One rank's part of the weight: `[0:1024, :]`, or `all`."""
    n0, n1, k0, k1 = entry["shards"][rank]
    n, k = entry["shape"]
    rows, columns = (":" if span == whole else f"{at}:{end}" for at, end, span, whole in
                     ((n0, n1, n1 - n0, n), (k0, k1, k1 - k0, k)))  # fmt: skip
    return "all" if (rows, columns) == (":", ":") else f"[{rows}, {columns}]"


def shape(entry: Entry) -> str:
    """`[N, K]`, with the number of experts before it; a parameter's own shape."""
    dims = entry["module"]["dims"] or entry["shape"]
    many = experts(entry)
    return (f"{many} x " if many > 1 else "") + f"[{', '.join(map(str, dims))}]"


def held_as(entry: Entry) -> str:
    """The file's word for the weight, with the features that share a scale."""
    word = str(entry["label"])
    return word + (f" g{entry['group']}" if entry["group"] else "") + (" online" if entry["mode"] == "online" else "")


def rank_runs(ranks: Sequence[Rank]) -> list[list[Rank]]:
    """Return neighbouring ranks that hold as many bytes and heads, together."""

    def held(rank: Rank) -> list[Any]:
        heads = [rank[name][1] - rank[name][0] for name in ("q_heads", "kv_heads")]
        return [rank["node"], *heads, *(rank[name] for name in rank if name.endswith("_bytes"))]

    return [list(run) for _, run in groupby(ranks, key=held)]


def rank_name(run: Sequence[Rank]) -> str:
    """`rank 0`, or `ranks 0-3`."""
    first, last = run[0]["rank"], run[-1]["rank"]
    return f"rank {first}" if first == last else f"ranks {first}-{last}"
