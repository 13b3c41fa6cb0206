"""Recipe against headers and table: everything that `job=check` says, and what a plan is made from."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from framework.capability.judge import judge
from framework.capability.table import Table
from framework.checkpoint.index import Index
from framework.checkpoint.ledger import Ledger, settle
from framework.checkpoint.safetensors import read_json
from framework.errors import InputError, Problem
from framework.families.base import DecoderSpec, modules
from framework.families.config import describe
from framework.families.gguf import describe_gguf
from framework.formats.base import Layout
from framework.formats.registry import LAYOUTS, detect
from framework.geometry import Kind
from framework.planning.assign import Assigned, Rule, assign
from framework.planning.shard import Cuts, cut
from framework.recipe.schema import Recipe


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


@dataclass(frozen=True)
class Checked:
    """The outcome of a check. A plan can be made when there are no problems."""

    recipe: Recipe
    index: Index
    table: Table
    format: str
    evidence: str
    spec: DecoderSpec
    layout: Layout
    assigned: tuple[Assigned, ...]
    rows: tuple[RowUse, ...]
    row_of: dict[str, str | None]
    ledger: Ledger
    cuts: Cuts | None
    problems: tuple[Problem, ...]
    notes: tuple[str, ...] = field(default=())

    @property
    def ok(self) -> bool:
        """True when nothing stands against running."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Return CLI.md's document of `check`."""
        return {
            "ok": self.ok,
            "tier": self.recipe.hardware.name,
            "table": self.table.name,
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


def check(recipe: Recipe, index: Index, table: Table) -> Checked:
    """Check a recipe against a checkpoint's headers.

    Raises:
        UserError: where nothing further can be checked (unknown format or architecture, unreadable config).
    """
    format_name, evidence = detect(index, recipe.quantization.format)
    layout = LAYOUTS[format_name]
    spec = describe_checkpoint(index)
    all_modules = list(modules(spec))
    assigned, problems = assign(all_modules, _rules(recipe), layout, index)
    rows, row_of, row_problems = _judge_all(recipe, table, format_name, assigned)
    expected = {m.name: layout.tensors_of(m, index) for m in all_modules}
    expected |= layout.extras(index)
    ledger = settle(index, expected, layout.ignorable)
    grains = {a.module.name: layout.grain(a.module, a.scheme, index) for a in assigned}
    cuts = cut(all_modules, grains, spec.heads, spec.kv_heads, recipe.parallel.tp_size)
    problems += row_problems + list(ledger.problems) + _other_problems(recipe, spec)
    if isinstance(cuts, Problem):
        where = recipe.origins.get("parallel.tp_size", "")
        problems.append(replace(cuts, where=f"parallel.tp_size={recipe.parallel.tp_size}  ({where})"))
    return Checked(
        recipe, index, table, format_name, evidence, spec, layout, tuple(assigned), rows, row_of, ledger,
        None if isinstance(cuts, Problem) else cuts,
        tuple(problems), index.notes,
    )  # fmt: skip


def describe_checkpoint(index: Index) -> DecoderSpec:
    """Return the decoder that a checkpoint holds."""
    if index.container == "gguf":
        return describe_gguf(index)
    if index.config is None:
        raise InputError(
            Problem(
                "config-missing",
                "the checkpoint has no config.json",
                str(index.root),
                "the architecture and its shapes are in it",
                "put the config.json that was published with the weights beside them",
            )
        )
    spec = describe(index.config)
    path = Path(index.root) / "generation_config.json"
    given = read_json(path) if path.is_file() else None
    if isinstance(given, dict):
        eos = given.get("eos_token_id")
        more = eos if isinstance(eos, list) else [] if eos is None else [eos]
        spec = replace(spec, eos_ids=tuple(dict.fromkeys((*spec.eos_ids, *more))))
    return spec


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


def _judge_all(
    recipe: Recipe, table: Table, format_name: str, assigned: list[Assigned]
) -> tuple[tuple[RowUse, ...], dict[str, str | None], list[Problem]]:
    groups = Counter((a.scheme, a.rule) for a in assigned if a.module.kind is Kind.LINEAR)
    uses, problems, verdicts = [], [], {}
    for (scheme, rule), count in groups.items():
        verdict = judge(
            table,
            format_name,
            scheme,
            "linear",
            tier=recipe.hardware.name,
            allow=tuple(recipe.capability.allow),
            modules=count,
            where=f"{rule.where}  pattern {rule.pattern}" if rule else "quantization.layers",
        )
        verdicts[scheme] = verdict.row
        uses.append(
            RowUse(
                verdict.row,
                verdict.status,
                scheme,
                "linear",
                count,
                rule.pattern if rule else "",
                rule.where if rule and rule.scheme != "auto" else "file",
            )
        )
        if verdict.problem:
            problems.append(verdict.problem)
    row_of = {a.module.name: verdicts[a.scheme] if a.module.kind is Kind.LINEAR else None for a in assigned}
    return tuple(uses), row_of, problems


def _other_problems(recipe: Recipe, spec: DecoderSpec) -> list[Problem]:
    problems = []
    if recipe.runtime.dtype == "float32" and recipe.runtime.device == "npu":
        problems.append(
            Problem(
                "dtype-device",
                "float32 is the reference mode of the CPU, this recipe asks for NPUs",
                recipe.origins.get("runtime.dtype", "runtime.dtype"),
                "the NPU ops of the quantized layers take float16 and bfloat16",
                "runtime.dtype=bfloat16   or   runtime.device=cpu",
            )
        )
    context = recipe.runtime.context
    if context not in (None, "auto") and int(context) > spec.context:
        problems.append(
            Problem(
                "context",
                f"a context of {int(context)} tokens was asked, the model has {spec.context}",
                recipe.origins.get("runtime.context", "runtime.context"),
                "positions beyond the model's context give garbage",
                f"runtime.context={spec.context}",
            )
        )
    if recipe.model.assume is not None:
        problems.append(
            Problem(
                "assume-not-yet",
                "model.assume cannot be used yet",
                recipe.origins.get("model.assume", "model.assume"),
                "recipes are checked against the headers of a real checkpoint",
                "leave model.assume out and give model.path",
            )
        )
    if recipe.quantization.online:
        problems.append(
            Problem(
                "online-not-yet",
                "online quantization cannot be run yet",
                recipe.origins.get("quantization.online", "quantization.online"),
                "checkpoints are run as they are, or dequantized at load",
                "quantization.online=false",
            )
        )
    for name in ("ep_size", "cfg_size", "ulysses_size", "data_size"):
        if getattr(recipe.parallel, name) != 1:
            problems.append(
                Problem(
                    "parallel-unused",
                    f"parallel.{name} has no meaning for a dense language model",
                    recipe.origins.get(f"parallel.{name}", f"parallel.{name}"),
                    "dense decoders are split by tensor parallelism alone",
                    f"parallel.{name}=1",
                )
            )
    return problems
