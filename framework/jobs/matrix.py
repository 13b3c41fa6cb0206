"""job=matrix: the whole support table."""

from __future__ import annotations

from dataclasses import asdict

from framework.capability.table import read_table
from framework.jobs.common import emit, emit_json, options
from framework.recipe.compose import conf_dir
from framework.recipe.schema import Recipe
from framework.report.matrix import matrix_markdown, matrix_text


def run(recipe: Recipe) -> int:
    """Print the table named by capability.table."""
    table = read_table(conf_dir() / "capability", recipe.capability.table)
    document = {"table": table.name, "rows": [asdict(row) for row in table.rows.values()]}
    match options(recipe)["format"]:
        case "json":
            emit_json(document)
        case "markdown":
            emit(matrix_markdown(document))
        case _:
            emit(matrix_text(document))
    return 0
