"""The Plan: all that a rank needs to know, decided before anything is loaded. Plain data, JSON both ways."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from framework.families.base import DecoderSpec
from framework.geometry import HeadShare, Kind, Module, Rect, Split


@dataclass(frozen=True, slots=True)
class PlannedModule:
    """A module with its scheme, judging row (None for norms and embeddings) and one rectangle per rank."""

    module: Module
    format: str
    scheme: str
    row: str | None
    split: Split
    shards: tuple[Rect, ...]


@dataclass(frozen=True, slots=True)
class RankPlan:
    """One rank: where it runs and what it holds, in bytes; its heads."""

    rank: int
    node: int
    device: int
    heads: HeadShare
    weights_bytes: int
    kv_cache_bytes: int
    workspace_bytes: int
    capacity_bytes: int
    fits: bool


@dataclass(frozen=True, slots=True)
class RuntimePlan:
    """How the ranks run: all `auto`s of the recipe resolved."""

    device: str
    dtype: str
    cache_dtype: str
    threads: int
    context: int
    max_batch: int
    cache_pages: int
    chunk_tokens: int
    seed: int


@dataclass(frozen=True)
class Plan:
    """The meeting of recipe, headers and support table."""

    recipe: str
    tier: str
    table: str
    checkpoint: str
    format: str
    tp_size: int
    spec: DecoderSpec
    runtime: RuntimePlan
    modules: tuple[PlannedModule, ...]
    ranks: tuple[RankPlan, ...]
    roofline: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plan.json's content: CLI.md's keys first, then what a rank needs beyond them."""
        return {
            "ranks": [_rank_json(rank) for rank in self.ranks],
            "modules": [_module_json(m) for m in self.modules],
            "roofline": self.roofline,
            "recipe": self.recipe,
            "tier": self.tier,
            "table": self.table,
            "checkpoint": self.checkpoint,
            "format": self.format,
            "tp_size": self.tp_size,
            "runtime": asdict(self.runtime),
            "spec": self.spec.to_json(),
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """Read what `to_json` wrote."""
        names = ("recipe", "tier", "table", "checkpoint", "format", "tp_size", "roofline")
        return cls(
            **{name: data[name] for name in names},
            spec=DecoderSpec.from_json(data["spec"]),
            runtime=RuntimePlan(**data["runtime"]),
            modules=tuple(_module_from(entry) for entry in data["modules"]),
            ranks=tuple(_rank_from(entry) for entry in data["ranks"]),
            notes=tuple(data["notes"]),
        )


def _rank_json(rank: RankPlan) -> dict[str, Any]:
    data = asdict(rank)
    share = data.pop("heads")
    return data | {"q_heads": [share["q0"], share["q1"]], "kv_heads": [share["kv0"], share["kv1"]]}


def _rank_from(data: dict[str, Any]) -> RankPlan:
    rest = {k: v for k, v in data.items() if k not in ("q_heads", "kv_heads")}
    return RankPlan(heads=HeadShare(*data["q_heads"], *data["kv_heads"]), **rest)


def _module_json(planned: PlannedModule) -> dict[str, Any]:
    module = planned.module
    return {
        "name": module.name,
        "format": planned.format,
        "scheme": planned.scheme,
        "row": planned.row,
        "split": str(planned.split),
        "shape": list(module.shape),
        "shards": [[r.n0, r.n1, r.k0, r.k1] for r in planned.shards],
        "kind": str(module.kind),
        "axis": module.axis,
        "unit": module.unit,
        "bias": module.bias,
        "tied_to": module.tied_to,
        "described_split": str(module.split),
    }


def _module_from(data: dict[str, Any]) -> PlannedModule:
    module = Module(
        data["name"],
        Kind(data["kind"]),
        tuple(data["shape"]),
        Split(data["described_split"]),
        data["axis"],
        data["unit"],
        data["bias"],
        data["tied_to"],
    )
    shards = tuple(Rect(*rect) for rect in data["shards"])
    return PlannedModule(module, data["format"], data["scheme"], data["row"], Split(data["split"]), shards)
