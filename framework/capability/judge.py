"""The verdict: may this module, so quantized, run on this tier? One row of the table says."""

from __future__ import annotations

from dataclasses import dataclass

from framework.capability.table import TIERS, Row, Table
from framework.errors import Problem


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judging row of a group of modules, its status on the tier, and the problem it makes, if any."""

    row: str
    status: str
    problem: Problem | None = None


def judge(
    table: Table,
    format_name: str,
    scheme: str,
    layer_type: str,
    *,
    tier: str,
    allow: tuple[str, ...],
    mode: str = "offline",
    modules: int = 1,
    where: str = "",
) -> Verdict:
    """Judge `modules` equal modules.

    A float module is judged by `none.float.*` whatever its file's format, but for GGUF, whose tensors of any type
    are dequantized at load under `gguf.all.*`.
    """
    judged_as = format_name if scheme != "float" or format_name == "gguf" else "none"
    row = table.find(judged_as, scheme, layer_type, mode)
    if row is None:
        return Verdict("", "unsupported", _no_row(table, judged_as, scheme, layer_type, tier, modules, where))
    status = row.status(tier)
    if status == "supported" or status in allow:
        return Verdict(row.row, status)
    return Verdict(row.row, status, _refusal(table, row, tier, status, modules, where))


def _alternatives(table: Table, format_name: str, layer_type: str, tier: str) -> list[str]:
    return [
        row.scheme
        for row in table.rows.values()
        if row.format == format_name
        and row.layer_type == layer_type
        and row.status(tier) == "supported"
        and not row.row.startswith("diffusion.")
    ]


def _no_row(
    table: Table, format_name: str, scheme: str, layer_type: str, tier: str, modules: int, where: str
) -> Problem:
    runs = _alternatives(table, format_name, layer_type, tier)
    return Problem(
        "row-unknown",
        f"{scheme} on {modules} {layer_type} modules of a {format_name} checkpoint has no row in the support table",
        where,
        f"table {table.name} has no row for format {format_name}, scheme {scheme}, layer type {layer_type}",
        f"schemes that run on {tier}: {', '.join(runs) or 'none'}",
    )


def _refusal(table: Table, row: Row, tier: str, status: str, modules: int, where: str) -> Problem:
    per_tier = ", ".join(f"{name} {row.status(name)}" for name in TIERS)
    fixes = []
    if status in ("tbd", "wip"):
        fixes.append(f"capability.allow=[{status}]  (runs at your own risk: nobody has confirmed it on {tier})")
    others = [s for s in _alternatives(table, row.format, row.layer_type, tier) if s != row.scheme]
    if others:
        fixes.append(f"scheme: {' or '.join(dict.fromkeys(others))}")
    tiers = [name for name in TIERS if row.status(name) == "supported"]
    if tiers:
        fixes.append(f"hardware={tiers[0]}")
    verb = "do not run on" if status == "unsupported" else f"are {status} on"
    return Problem(
        f"row-{status}",
        f"{row.scheme} {row.layer_type} layers {verb} {tier} ({modules} modules)",
        where,
        f"table {table.name}, row {row.row}: {per_tier}",
        "   or   ".join(fixes),
    )
