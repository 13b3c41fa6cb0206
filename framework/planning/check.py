"""Recipe against headers and table: everything that `job=check` says, and what a plan is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from framework.capability.judge import Policy, Question, judge
from framework.capability.limits import Fit, Limits, fit
from framework.capability.table import Table
from framework.checkpoint.index import Index
from framework.checkpoint.ledger import Ledger, settle
from framework.errors import Problem
from framework.formats.base import TensorSpec
from framework.geometry import Rect, Split
from framework.planning.assign import Assigned, Rule, assign
from framework.planning.demands import demands
from framework.planning.parts import Described, describe_model
from framework.planning.shard import Cuts, cut, deal_experts, place, sizes_that_split
from framework.recipe.schema import Recipe


@dataclass(frozen=True)
class Capability:
    """What a recipe is judged by: the support table, the limits of the ops, the CANN of this machine (None: none)."""

    table: Table
    limits: Limits
    cann: str | None = None


@dataclass(frozen=True, slots=True)
class RowUse:
    """Modules that one row judges, grouped by scheme and by the rule that chose it."""

    row: str
    status: str
    scheme: str
    layer_type: str
    modules: int
    pattern: str
    origin: str


@dataclass(frozen=True, slots=True)
class Placed:
    """A module with all that was decided: its scheme and row, its split and shards, how its op runs it."""

    assigned: Assigned
    row: str | None
    split: Split
    shards: tuple[Rect, ...]
    fit: Fit | None
    expert_ranges: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Checked:
    """The outcome of a check. A plan can be made when there are no problems."""

    recipe: Recipe
    capability: Capability
    model: Described
    rows: tuple[RowUse, ...]
    placed: tuple[Placed, ...]
    cuts: Mapping[str, Cuts]
    ledger: Ledger
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """True when nothing stands against running."""
        return not self.problems

    @property
    def index(self) -> Index:
        """The headers of the first part: of an LLM, all."""
        return self.model.parts[0].index

    @property
    def root(self) -> Path:
        """Where the model is: a file, or the folder of it or of its parts."""
        return self.index.root if self.model.decoder else self.index.root.parent

    @property
    def format(self) -> str:
        """The format, of all parts if they differ."""
        return ", ".join(dict.fromkeys(part.format for part in self.model.parts))

    def to_json(self) -> dict[str, Any]:
        """Return CLI.md's document of `check`."""
        return {
            "ok": self.ok,
            "tier": self.recipe.hardware.name,
            "table": self.capability.table.name,
            "format": self.format,
            "rows": [
                {
                    "row": use.row,
                    "status": use.status,
                    "scheme": use.scheme,
                    "layer_type": use.layer_type,
                    "modules": use.modules,
                    "pattern": use.pattern,
                }
                for use in self.rows
            ],
            "problems": [
                {"code": p.code, "what": p.what, "where": p.where, "why": p.why, "fix": p.fix} for p in self.problems
            ],
            "ledger": {
                "consumed": len(self.ledger.consumed),
                "ignored": [{"name": name, "reason": reason} for name, reason in self.ledger.ignored],
                "missing": list(self.ledger.missing),
                "unexpected": list(self.ledger.unexpected),
            },
        }


def check(recipe: Recipe, indexes: Mapping[str, Index], capability: Capability) -> Checked:
    """Check a recipe against the headers of a model's parts (an LLM has one, under the empty prefix).

    Raises:
        UserError: where nothing further can be checked (unknown format or architecture, unreadable config).
    """
    options = file_options(recipe)
    indexes = {prefix: replace(index, options=options) for prefix, index in indexes.items()}
    model = describe_model(indexes, recipe.quantization.format)
    assigned, problems = assign(model.parts, _rules(recipe), online=recipe.quantization.online)
    for part in model.parts:
        problems += part.layout.faults(part.modules, part.index)
    rows, row_of, row_problems, notes = _judge_all(recipe, capability, assigned)
    ledger = _settle_all(model, assigned)
    placed, cuts, cut_problems, fit_notes = _place_all(recipe, capability.limits, model, assigned, row_of)
    problems += [*row_problems, *ledger.problems, *cut_problems, *demands(recipe, model)]
    said = [note for part in model.parts for note in part.index.notes]
    said += [*_dequantized(assigned), *_kept_float(recipe, assigned), *notes, *fit_notes]
    return Checked(
        recipe, capability, model, rows, tuple(placed), cuts, ledger,
        tuple(dict.fromkeys(problems)), tuple(dict.fromkeys(said)),
    )  # fmt: skip


def file_options(recipe: Recipe) -> dict[str, str]:
    """Return what the recipe says of the file that the file may not say itself."""
    order = recipe.quantization.awq_byte_order
    return {"awq_byte_order": order} if order else {}


def _rules(recipe: Recipe) -> list[Rule]:
    origin = recipe.origins
    return [
        Rule(
            rule.pattern,
            rule.scheme,
            origin.get(f"quantization.layers[{i}]", origin.get("quantization.layers", "quantization.layers")),
        )
        for i, rule in enumerate(recipe.quantization.layers)
    ]


def _question(entry: Assigned, kind: str) -> Question:
    return Question(entry.part.format, entry.scheme, entry.module.layer_type, kind, entry.mode)


def _judge_all(
    recipe: Recipe, capability: Capability, assigned: list[Assigned]
) -> tuple[tuple[RowUse, ...], dict[str, str], list[Problem], list[str]]:
    policy = Policy(recipe.hardware.name, tuple(recipe.capability.allow), capability.cann)
    groups: dict[tuple[Question, Rule | None], list[Assigned]] = {}
    for entry in assigned:
        if entry.module.quantizable:
            groups.setdefault((_question(entry, recipe.model.kind), entry.rule), []).append(entry)
    uses, problems, notes = [], [], []
    row_of: dict[str, str] = {}
    for (asked, rule), entries in groups.items():
        count = sum(entry.module.linears for entry in entries)
        where = f"{rule.where}  pattern {rule.pattern}" if rule else "quantization.layers"
        verdict = judge(capability.table, asked, policy, modules=count, where=where)
        origin = rule.where if rule and rule.scheme != "auto" else "file"
        pattern = rule.pattern if rule else ""
        uses.append(RowUse(verdict.row, verdict.status, asked.scheme, asked.layer_type, count, pattern, origin))
        row_of |= {entry.name: verdict.row for entry in entries}
        problems += [verdict.problem] if verdict.problem else []
        notes += [verdict.note] if verdict.note else []
    return tuple(uses), row_of, problems, notes


def _settle_all(model: Described, assigned: list[Assigned]) -> Ledger:
    ledgers = []
    for part in model.parts:
        expected: dict[str, Sequence[TensorSpec]] = {
            entry.name: entry.held.tensors for entry in assigned if entry.part is part
        }
        expected |= {part.prefix + user: specs for user, specs in part.layout.extras(part.index).items()}
        ledgers.append((part.prefix, settle(part.index, expected, model.ignorable(part))))
    return Ledger(
        {prefix + name: module for prefix, one in ledgers for name, module in one.consumed.items()},
        tuple((prefix + name, reason) for prefix, one in ledgers for name, reason in one.ignored),
        tuple(prefix + name for prefix, one in ledgers for name in one.missing),
        tuple(prefix + name for prefix, one in ledgers for name in one.unexpected),
        tuple(problem for _, one in ledgers for problem in one.problems),
    )


def _place_all(
    recipe: Recipe, limits: Limits, model: Described, assigned: list[Assigned], row_of: dict[str, str]
) -> tuple[list[Placed], dict[str, Cuts], list[Problem], list[str]]:
    tp_size = recipe.parallel.tp_size
    # sizes that do not go together are refused by `demands`
    ep_size = recipe.parallel.ep_size if tp_size % recipe.parallel.ep_size == 0 else 1
    where = f"parallel.tp_size={tp_size}  ({recipe.origins.get('parallel.tp_size', 'default')})"
    placed: list[Placed] = []
    all_cuts: dict[str, Cuts] = {}
    problems: list[Problem] = []
    for part, group in groupby(assigned, key=lambda entry: entry.part):
        entries = list(group)
        grains = {entry.module.name: _grain(entry, limits) for entry in entries}
        heads = (model.decoder.heads, model.decoder.kv_heads) if model.decoder else None
        cuts = cut(part.modules, grains, tp_size, heads, ep_size)
        if isinstance(cuts, Problem):
            sizes = sizes_that_split(part.modules, grains, heads, ep_size)
            problems.append(replace(cuts, where=where, fix=_offer(sizes)))
            continue
        all_cuts[part.prefix] = cuts
        uncut = []
        for entry in entries:
            at = place(entry.module, cuts, grains[entry.module.name], tp_size)
            if at is None:
                uncut.append(entry)
                continue
            made = _fit(entry, limits, at[1]) if entry.module.quantizable and entry.scheme != "float" else None
            split, shards = at
            ranges: tuple[tuple[int, int], ...] = ()
            if entry.module.experts and ep_size > 1:
                split, ranges = Split.EXPERT, deal_experts(entry.module.experts, tp_size, ep_size)
            placed.append(Placed(entry, row_of.get(entry.name), split, shards, made, ranges))
        if uncut:
            sizes = sizes_that_split(part.modules, grains, heads, ep_size)
            problems.append(_unaligned(uncut, grains[uncut[0].module.name], sizes, where))
    return placed, all_cuts, problems + _refused(placed), _fit_notes(placed)


def _grain(entry: Assigned, limits: Limits) -> tuple[int, int]:
    """Rows and columns at which a module may be cut: dequantized at load it can be cut anywhere."""
    if entry.scheme == "float" or not entry.module.quantizable:
        return (1, 1)
    limit = limits.get((entry.scheme, entry.module.layer_type))
    return limit.grain(entry.held.grain) if limit else entry.held.grain


def _fit(entry: Assigned, limits: Limits, shards: tuple[Rect, ...]) -> Fit | None:
    """Return how the op takes the worst of a module's shards."""
    if (entry.scheme, entry.module.layer_type) not in limits:
        return None  # no row either, which is said by the verdict
    shapes = dict.fromkeys(rect.shape for rect in shards)
    held = entry.held
    fits = [
        fit(limits, entry.scheme, entry.module.layer_type, n, k, held.group, symmetric=held.symmetric)
        for n, k in shapes
    ]
    return max(fits, key=lambda one: (one.refused, one.scheme == "float", one.pieces))


def _unaligned(uncut: list[Assigned], grain: tuple[int, int], sizes: list[int], where: str) -> Problem:
    first = uncut[0]
    along, step = ("columns", grain[1]) if first.module.split is Split.ROW else ("rows", grain[0])
    return Problem(
        "tp-align",
        f"{first.name}{f' and {len(uncut) - 1} more' if len(uncut) > 1 else ''} cannot be cut at this size",
        where,
        f"{first.held.label or first.scheme}: {along} can be cut at multiples of {step} only",
        _offer(sizes),
    )


def _offer(sizes: list[int]) -> str:
    if not sizes:
        return "no size splits this model: another parallel.ep_size   or   scheme: float"
    listed = ", ".join(map(str, sizes))
    all_of_them = f"any size from 1 to {sizes[-1]}" if len(sizes) == sizes[-1] else f"sizes that split: {listed}"
    return f"parallel.tp_size={sizes[-1]}   ({all_of_them})"


def _by_reason(placed: list[Placed], *, refused: bool) -> dict[tuple[str, str], list[Placed]]:
    found: dict[tuple[str, str], list[Placed]] = {}
    for one in placed:
        if one.fit is not None and one.fit.reason and one.fit.refused == refused:
            found.setdefault((one.assigned.scheme, one.fit.reason), []).append(one)
    return found


def _refused(placed: list[Placed]) -> list[Problem]:
    return [
        Problem(
            "op-limit",
            f"{scheme} of {group[0].assigned.name}{f' and {len(group) - 1} more' if len(group) > 1 else ''} "
            "does not fit its op",
            f"shape {list(group[0].assigned.module.shape)}, shard {list(group[0].shards[0].shape)}",
            reason,
            "scheme: float (dequantized at load)   or   another parallel.tp_size",
        )
        for (scheme, reason), group in _by_reason(placed, refused=True).items()
    ]


def _fit_notes(placed: list[Placed]) -> list[str]:
    return [
        f"{sum(one.assigned.module.linears for one in group)} {scheme} modules ({group[0].assigned.name}): {reason}"
        f"{_instead(group[0])}"
        for (scheme, reason), group in _by_reason(placed, refused=False).items()
    ]


def _instead(placed: Placed) -> str:
    if placed.fit is None or placed.fit.scheme != "float":
        return ""
    return ": left float" if placed.assigned.mode == "online" else ": dequantized at load"


def _dequantized(assigned: list[Assigned]) -> list[str]:
    """Say what the file holds quantized and runs as float."""
    found = [e for e in assigned if e.module.quantizable and e.scheme == "float" and e.held.scheme != "float"]
    absorbed = [entry for entry in found if entry.module.absorbed]
    count = sum(entry.module.linears for entry in found) - len(absorbed)
    notes = [f"{count} quantized modules are declared float: dequantized at load"] if count else []
    if absorbed:
        notes.append(
            f"{len(absorbed)} quantized modules are dequantized at load ({absorbed[0].name}): latent attention "
            "multiplies them into queries and outputs"
        )
    return notes


def _kept_float(recipe: Recipe, assigned: list[Assigned]) -> list[str]:
    if not recipe.quantization.online:
        return []
    kept = [e for e in assigned if e.module.role and e.rule is not None and e.rule.scheme not in ("auto", "float")]
    names = list(dict.fromkeys(entry.module.role.value for entry in kept))
    return [f"{' and '.join(names)} stay float: online quantization leaves them alone"] if kept else []
