"""The verdict: may these modules, so quantized, run on this tier? One row of the table says."""

from __future__ import annotations

from dataclasses import dataclass

from framework.capability.table import TIERS, Row, Table
from framework.errors import Problem

KINDS = {"llm": "language models", "diffusion": "diffusion models"}


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of the table: modules that are alike in all that it tells apart."""

    format: str
    scheme: str
    layer_type: str  # linear | moe
    kind: str = "llm"  # llm | diffusion
    mode: str = "offline"  # offline | online


@dataclass(frozen=True, slots=True)
class Policy:
    """Under which the table is read: the tier, statuses that are allowed, the CANN that was found (None: none)."""

    tier: str
    allow: tuple[str, ...] = ()
    cann: str | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judging row, its status on the tier, the problem it makes, if any, and what should be said besides."""

    row: str
    status: str
    problem: Problem | None = None
    note: str = ""


def judge(table: Table, asked: Question, policy: Policy, *, modules: int = 1, where: str = "") -> Verdict:
    """Judge `modules` equal modules.

    A float module is judged by `none.float.*` whatever its file's format, but for GGUF, whose tensors of any type
    are dequantized at load under `gguf.all.*`.

    Problems: `row-unknown`, `row-unsupported`, `row-wip`, `row-tbd`, `cann-version`.
    """
    judged_as = _judged_as(asked)
    row = table.find(judged_as, asked.scheme, asked.layer_type, asked.mode, asked.kind)
    if row is None:
        return Verdict("", "unsupported", _no_row(table, asked, policy, modules, where))
    status = status_of(row, policy.tier, asked.kind)
    if status != "supported" and status not in policy.allow:
        return Verdict(row.row, status, _refusal(table, asked, row, policy, status, modules, where))
    return Verdict(row.row, status, *_cann(row, policy, where))


def status_of(row: Row, tier: str, kind: str) -> str:
    """Return a row's status on a tier; for diffusion models no better than its diffusion column."""
    status = row.status(tier)
    if kind == "diffusion" and status == "supported" and row.diffusion is not None:
        return row.diffusion
    if kind == "diffusion" and row.diffusion == "unsupported":
        return "unsupported"
    return status


def _judged_as(asked: Question) -> str:
    return asked.format if asked.scheme != "float" or asked.format == "gguf" else "none"


def _cann(row: Row, policy: Policy, where: str) -> tuple[Problem | None, str]:
    if not row.cann:
        return None, ""
    if policy.cann is None:
        return None, f"{row.row} needs CANN {row.cann} or newer; there is none here to read the version of"
    if _version(policy.cann) >= _version(row.cann):
        return None, ""
    problem = Problem(
        "cann-version",
        f"{row.scheme} of {row.row} needs CANN {row.cann} or newer, this machine has {policy.cann}",
        where,
        "older versions lack npu_dynamic_mx_quant",
        f"install CANN {row.cann} or newer",
    )
    return problem, ""


def _version(text: str) -> tuple[int, int, int, int]:
    """`8.0.RC3` before `8.0.0` before `8.0.1`; further parts (`.alpha001`) are left out."""
    parts = (*text.upper().split("."), "0", "0")
    major, minor = (int(part) if part.isdigit() else 0 for part in parts[:2])
    third = parts[2]
    if third.startswith("RC"):
        number = "".join(c for c in third[2:] if c.isdigit())
        return major, minor, -1, int(number or 0)
    return major, minor, int(third) if third.isdigit() else 0, 0


def _alternatives(table: Table, asked: Question, tier: str) -> list[str]:
    """Schemes that run on the tier for the same layers of the same kind of file."""
    found = [
        row.scheme
        for row in table.rows.values()
        if (row.format, row.layer_type, row.mode) == (_judged_as(asked), asked.layer_type, asked.mode)
        and row.judges(asked.kind, row.scheme)
        and status_of(row, tier, asked.kind) == "supported"
        and row.scheme != asked.scheme
    ]
    return list(dict.fromkeys(found))


def _elsewhere(table: Table, asked: Question, tier: str) -> list[str]:
    """Other formats whose files run the same scheme of the same layers on the tier."""
    found = [
        row.format
        for row in table.rows.values()
        if (row.scheme, row.layer_type, row.mode) == (asked.scheme, asked.layer_type, asked.mode)
        and row.format != _judged_as(asked)
        and row.judges(asked.kind, asked.scheme)
        and status_of(row, tier, asked.kind) == "supported"
    ]
    return list(dict.fromkeys("float" if name == "none" else name for name in found))


def _ways(table: Table, asked: Question, tier: str) -> list[str]:
    """What runs on the tier instead: of a file that is quantized already, another scheme is another file."""
    others, formats = _alternatives(table, asked, tier), _elsewhere(table, asked, tier)
    if asked.mode == "online":
        return [f"schemes that run on {tier}: {', '.join(others)}"] if others else []
    ways = []
    plain = table.find("none", "float", asked.layer_type, "offline", asked.kind)
    if asked.scheme != "float" and plain and status_of(plain, tier, asked.kind) == "supported":
        ways.append("scheme: float  (dequantized at load)")
    if others:
        ways.append(f"a checkpoint in a scheme that runs on {tier}: {', '.join(others)}")
    if formats:
        ways.append(f"a checkpoint in a format that runs on {tier}: {', '.join(formats)}")
    return ways


def _no_row(table: Table, asked: Question, policy: Policy, modules: int, where: str) -> Problem:
    elsewhere = "llm" if asked.kind == "diffusion" else "diffusion"
    other = table.find(_judged_as(asked), asked.scheme, asked.layer_type, asked.mode, elsewhere)
    ways = _ways(table, asked, policy.tier)
    only = f"; row {other.row} is for {KINDS[elsewhere]} only" if other else ""
    file = "quantized at load" if asked.mode == "online" else f"of a {asked.format} checkpoint"
    return Problem(
        "row-unknown",
        f"{asked.scheme} on {modules} {asked.layer_type} modules {file} has no row in the support table",
        where,
        f"table {table.name} has no row for format {asked.format}, scheme {asked.scheme}, layer type "
        f"{asked.layer_type}, mode {asked.mode}, {KINDS[asked.kind]}{only}",
        "   or   ".join(ways) or f"schemes that run on {policy.tier}: none",
    )


def _refusal(table: Table, asked: Question, row: Row, policy: Policy, status: str, modules: int, where: str) -> Problem:
    tier = policy.tier
    per_tier = ", ".join(f"{name} {status_of(row, name, asked.kind)}" for name in TIERS)
    fixes = []
    if status in ("tbd", "wip"):
        allowed = ",".join(dict.fromkeys((*policy.allow, status)))
        fixes.append(f"capability.allow=[{allowed}]  (runs at your own risk: nobody has confirmed it on {tier})")
    fixes += _ways(table, asked, tier)
    tiers = [name for name in TIERS if status_of(row, name, asked.kind) == "supported"]
    if tiers:
        fixes.append(" or ".join(f"hardware={name}" for name in tiers))
    verb = "do not run on" if status == "unsupported" else f"are {status} on"
    whose = " of diffusion models" if asked.kind == "diffusion" else ""
    return Problem(
        f"row-{status}",
        f"{asked.scheme} {asked.layer_type} layers{whose} {verb} {tier} ({modules} modules)",
        where,
        f"table {table.name}, row {row.row}: {per_tier}",
        "   or   ".join(fixes) or "no tier runs it: use another scheme",
    )
