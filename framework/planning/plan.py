"""The Plan: all that a rank needs to know, decided before anything is loaded. Plain data, JSON both ways."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from framework.families.base import DecoderSpec
from framework.families.diffusion import DiffusionSpec
from framework.geometry import HeadShare, Kind, Module, Rect, Role, Split
from framework.planning.layout import Layout


@dataclass(frozen=True, slots=True)
class PlannedModule:
    """A module with all that was decided about it.

    Attributes:
        name: as patterns and plans say it; experts of a layer are one entry, `*` for their number.
        scheme: what it runs with; `float` also where codes are dequantized at load.
        row: the row of the support table that judged it; None for norms, embeddings and parameters.
        shards: one rectangle per rank, of each expert alike.
        label: the file's own word for how it is held.
        group: input features that share a scale in the file; 0: all of a row.
        mode: `online` if it is quantized at load.
        expert_ranges: half-open range of experts that each rank holds; empty: all of them, or none to hold.
        op: the calls that run it; `pieces` of them whose results are joined or added.
        bits: width of a code as it is held, where that is not the scheme's own; 0: the scheme's.
        max_rows: the most output features of one call; 0: any number.
        fp32: whether its float values are kept in fp32 whatever the run's dtype is.
    """

    name: str
    module: Module
    format: str
    scheme: str
    row: str | None
    split: Split
    shards: tuple[Rect, ...]
    label: str = ""
    group: int = 0
    mode: str = "offline"
    op: str = ""
    pieces: int = 1
    bits: int = 0
    max_rows: int = 0
    fp32: bool = False
    expert_ranges: tuple[tuple[int, int], ...] = ()

    def experts_on(self, rank: int) -> range:
        """Return the experts whose parts a rank holds."""
        return range(*self.expert_ranges[rank]) if self.expert_ranges else range(self.module.experts)

    def linears_on(self, rank: int) -> int:
        """Linears that a rank holds parts of: one, or one an expert."""
        return len(self.experts_on(rank)) if self.module.experts else 1


@dataclass(frozen=True, slots=True)
class RankPlan:
    """One rank: where it runs and what it holds, in bytes; its heads.

    `load_peak_bytes` is reached while the last weights are laid out: all weights, and the largest module twice.
    """

    rank: int
    node: int
    device: int
    heads: HeadShare
    weights_bytes: int
    kv_cache_bytes: int
    workspace_bytes: int
    capacity_bytes: int
    fits: bool
    load_peak_bytes: int


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
    offload: str = "none"
    vae_tiling: bool = False
    vae_slicing: bool = False


@dataclass(frozen=True)
class Plan:
    """The meeting of recipe, headers and support table.

    `options` are what the recipe says of the file; `spec` is the decoder of an LLM, `transformers` are those of a
    pipeline by the prefix of their modules. `layout` says where each rank stands; shards are those of the ranks of
    one tensor-parallel group.
    """

    recipe: str
    tier: str
    table: str
    checkpoint: str
    format: str
    options: dict[str, str]
    layout: Layout
    spec: DecoderSpec | None
    transformers: dict[str, DiffusionSpec]
    runtime: RuntimePlan
    modules: tuple[PlannedModule, ...]
    ranks: tuple[RankPlan, ...]
    roofline: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def tp_size(self) -> int:
        """Ranks that share one copy of the weights."""
        return self.layout.tp_size

    @property
    def size(self) -> int:
        """Ranks in all."""
        return self.layout.size

    def to_json(self) -> dict[str, Any]:
        """Return plan.json's content: CLI.md's keys first, then what a rank needs beyond them."""
        return {
            "ranks": [_rank_json(rank, self.layout) for rank in self.ranks],
            "modules": [_module_json(m) for m in self.modules],
            "roofline": self.roofline,
            "recipe": self.recipe,
            "tier": self.tier,
            "table": self.table,
            "checkpoint": self.checkpoint,
            "format": self.format,
            "options": self.options,
            "tp_size": self.tp_size,
            "layout": asdict(self.layout),
            "runtime": asdict(self.runtime),
            "spec": self.spec.to_json() if self.spec else None,
            "transformers": {prefix: spec.to_json() for prefix, spec in self.transformers.items()},
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """Read what `to_json` wrote."""
        names = ("recipe", "tier", "table", "checkpoint", "format", "options", "roofline")
        return cls(
            **{name: data[name] for name in names},
            layout=Layout(**data["layout"]),
            spec=DecoderSpec.from_json(data["spec"]) if data["spec"] else None,
            transformers={k: DiffusionSpec.from_json(v) for k, v in data["transformers"].items()},
            runtime=RuntimePlan(**data["runtime"]),
            modules=tuple(_module_from(entry) for entry in data["modules"]),
            ranks=tuple(_rank_from(entry) for entry in data["ranks"]),
            notes=tuple(data["notes"]),
        )


def _rank_json(rank: RankPlan, layout: Layout) -> dict[str, Any]:
    data = asdict(rank)
    share = data.pop("heads")
    return data | {
        "at": layout.at(rank.rank),
        "q_heads": [share["q0"], share["q1"]],
        "kv_heads": [share["kv0"], share["kv1"]],
    }


def _rank_from(data: dict[str, Any]) -> RankPlan:
    rest = {k: v for k, v in data.items() if k not in ("at", "q_heads", "kv_heads")}
    return RankPlan(heads=HeadShare(*data["q_heads"], *data["kv_heads"]), **rest)


def _module_json(planned: PlannedModule) -> dict[str, Any]:
    module = planned.module
    experts = {"experts": [0, module.experts - 1]} if module.experts else {}
    return {
        "name": planned.name,
        "format": planned.format,
        "scheme": planned.scheme,
        "row": planned.row,
        "split": str(planned.split),
        "shape": list(module.shape),
        "shards": [[r.n0, r.n1, r.k0, r.k1] for r in planned.shards],
        **experts,
        "label": planned.label,
        "group": planned.group,
        "mode": planned.mode,
        "op": planned.op,
        "pieces": planned.pieces,
        "bits": planned.bits,
        "max_rows": planned.max_rows,
        "fp32": planned.fp32,
        "expert_ranges": [list(share) for share in planned.expert_ranges],
        "module": _described(module),
    }


def _described(module: Module) -> dict[str, Any]:
    """What the family says of a module beyond its shape."""
    return {
        "name": module.name,
        "kind": str(module.kind),
        "split": str(module.split),
        "axis": module.axis,
        "unit": module.unit,
        "bias": module.bias,
        "tied_to": module.tied_to,
        "role": str(module.role),
        "dims": list(module.dims),
        "absorbed": module.absorbed,
        "packed": [list(part) for part in module.packed],
    }


def _module_from(data: dict[str, Any]) -> PlannedModule:
    given = data["module"]
    module = Module(
        name=given["name"],
        kind=Kind(given["kind"]),
        shape=tuple(data["shape"]),
        split=Split(given["split"]),
        axis=given["axis"],
        unit=given["unit"],
        bias=given["bias"],
        tied_to=given["tied_to"],
        experts=data["experts"][1] + 1 if "experts" in data else 0,
        role=Role(given["role"]),
        dims=tuple(given["dims"]),
        absorbed=given["absorbed"],
        packed=tuple((axis, unit) for axis, unit in given["packed"]),
    )
    same = ("name", "format", "scheme", "row", "label", "group", "mode", "op", "pieces", "bits", "max_rows", "fp32")
    shards = tuple(Rect(*rect) for rect in data["shards"])
    ranges = tuple(tuple(share) for share in data["expert_ranges"])
    return PlannedModule(
        expert_ranges=ranges,
        module=module,
        split=Split(data["split"]),
        shards=shards,
        **{key: data[key] for key in same},
    )
