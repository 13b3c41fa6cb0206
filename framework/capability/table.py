"""The support table as data: conf/capability/<name>.yaml, one row per format, scheme and layer type."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from framework.errors import InputError, Problem, nearest

STATUSES = ("supported", "unsupported", "wip", "tbd")
TIERS = ("a2", "a3", "a5")


@dataclass(frozen=True, slots=True)
class Row:
    """One row: what may run on which tier.

    Attributes:
        diffusion: status for diffusion models; None where the published table has no such column.
        key: what in the file, or in the recipe, leads to the row.
        llm: whether the row judges language models; False for the rows of diffusion models alone.
        diffusion_schemes: schemes that the row judges in a diffusion model, if more than its own.
        cann: the oldest CANN that runs it; empty: any.
    """

    row: str
    format: str
    scheme: str
    layer_type: str  # linear | moe
    mode: str  # offline | online
    a2: str
    a3: str
    a5: str
    diffusion: str | None = None
    origin: str = "table"  # table | ours
    key: str = ""
    note: str = ""
    source: str = ""
    llm: bool = True
    diffusion_schemes: tuple[str, ...] = ()
    cann: str = ""

    def status(self, tier: str) -> str:
        """Return the status on a tier."""
        return str(getattr(self, tier))

    def judges(self, kind: str, scheme: str) -> bool:
        """Whether the row speaks of this scheme in models of this kind (`llm` or `diffusion`)."""
        if kind == "llm":
            return self.llm and scheme == self.scheme
        return self.diffusion is not None and scheme in (self.diffusion_schemes or (self.scheme,))


@dataclass(frozen=True)
class Table:
    """All rows of one version of the support table, by id."""

    name: str
    rows: dict[str, Row]

    def find(
        self, format_name: str, scheme: str, layer_type: str, mode: str = "offline", kind: str = "llm"
    ) -> Row | None:
        """Return the row that judges a module; where a diffusion model has rows of its own, those come first."""
        found = [
            row
            for row in self.rows.values()
            if (row.format, row.layer_type, row.mode) == (format_name, layer_type, mode) and row.judges(kind, scheme)
        ]
        return min(found, key=lambda row: row.llm, default=None)


def read_table(folder: Path, name: str) -> Table:
    """Read `<folder>/<name>.yaml`: its rows, over those of the table that it says is its base.

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
    return Table(name, {row["row"]: _row(row) for row in _rows(folder, name).values()})


def _rows(folder: Path, name: str) -> dict[str, dict[str, Any]]:
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    data = yaml.load((folder / f"{name}.yaml").read_text(encoding="utf-8"), Loader=loader)
    rows = _rows(folder, data["base"]) if "base" in data else {}
    for dropped in data.get("without", ()):
        del rows[dropped]
    for given in data["rows"]:
        rows[given["row"]] = rows.get(given["row"], {}) | given
    return rows


def _row(given: dict[str, Any]) -> Row:
    assert given.keys() <= {field.name for field in fields(Row)}, given
    return Row(**given | {"diffusion_schemes": tuple(given.get("diffusion_schemes", ()))})
