"""job=matrix: the whole support table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from framework.capability.table import read_table
from framework.jobs.common import emit, emit_json, options
from framework.recipe.compose import conf_dir
from framework.recipe.schema import Recipe
from framework.report.matrix import matrix_markdown, matrix_text

KEYS = ("row", "format", "scheme", "layer_type", "mode", "a2", "a3", "a5", "diffusion", "origin", "note", "source")
"""The keys that scripts rely on, in this order; what else a row has comes after them."""


def run(recipe: Recipe) -> int:
    """Print the table named by capability.table; as markdown, also how the other tables differ from it."""
    folder = conf_dir() / "capability"
    document = _document(folder, recipe.capability.table)
    match options(recipe)["format"]:
        case "json":
            emit_json(document)
        case "markdown":
            others = sorted(path.stem for path in folder.glob("*.yaml") if path.stem != document["table"])
            emit(matrix_markdown(document, [_document(folder, name) for name in others]))
        case _:
            emit(matrix_text(document))
    return 0


def _document(folder: Path, name: str) -> dict[str, Any]:
    table = read_table(folder, name)
    rows = [asdict(row) for row in table.rows.values()]
    return {"table": table.name, "rows": [{key: row[key] for key in KEYS} | row for row in rows]}
