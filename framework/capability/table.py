"""The support table as data: conf/capability/<name>.yaml, one row per format, scheme and layer type."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

from framework.errors import InputError, Problem, nearest

STATUSES = ("supported", "unsupported", "wip", "tbd")
TIERS = ("a2", "a3", "a5")


@dataclass(frozen=True, slots=True)
class Row:
    """One row: what may run on which tier. `diffusion` is None where the published table has no such column."""

    row: str
    format: str
    scheme: str
    layer_type: str  # linear | moe
    mode: str  # offline | online
    a2: str
    a3: str
    a5: str
    diffusion: str | None
    origin: str  # table | ours
    note: str
    source: str

    def status(self, tier: str) -> str:
        """Return the status on a tier."""
        return str(getattr(self, tier))


@dataclass(frozen=True)
class Table:
    """All rows of one version of the support table, by id."""

    name: str
    rows: dict[str, Row]

    def find(self, format_name: str, scheme: str, layer_type: str, mode: str = "offline") -> Row | None:
        """Return the row that judges an LLM module of this format, scheme and layer type."""
        for row in self.rows.values():
            if row.row.startswith("diffusion."):
                continue
            if (row.format, row.scheme, row.layer_type, row.mode) == (format_name, scheme, layer_type, mode):
                return row
        return None


def read_table(folder: Path, name: str) -> Table:
    """Read `<folder>/<name>.yaml`.

    Raises:
        InputError: `unknown-table`, there is no table of that name.
    """
    path = folder / f"{name}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        like = nearest(name, known) or known
        raise InputError(
            Problem(
                "unknown-table",
                f"there is no support table named {name}",
                "capability.table",
                f"known: {', '.join(known)}",
                f"capability.table={like[0]}",
            )
        )
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    data = yaml.load(path.read_text(encoding="utf-8"), Loader=loader)
    rows = [Row(**{"diffusion": None, "note": "", "origin": "table", **row}) for row in data["rows"]]
    return Table(name, {row.row: row for row in rows})
