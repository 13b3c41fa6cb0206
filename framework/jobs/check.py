"""job=check: the recipe against headers and support table. Loads nothing, writes nothing."""

from __future__ import annotations

import time

from framework.jobs.common import command_of, emit, emit_json, open_checked, options
from framework.planning.check import Checked
from framework.recipe.schema import Recipe
from framework.report.check import check_markdown, check_text
from framework.report.errors import format_problems


def run(recipe: Recipe) -> int:
    """Check and report. Returns 0 when the recipe would run, else 1."""
    start = time.perf_counter()
    checked = open_checked(recipe)
    document = checked.to_json()
    match options(recipe)["format"]:
        case "json":
            emit_json(document)
        case "markdown":
            emit(check_markdown(document))
        case _:
            emit(check_text(document, facts(checked, time.perf_counter() - start)))
            if checked.problems:
                emit("\n" + format_problems(checked.problems))
    return 0 if checked.ok else 1


def facts(checked: Checked, seconds: float) -> dict[str, object]:
    """What the text shows beside the document."""
    spec, index = checked.spec, checked.index
    files = len(index.files) or 1
    return {
        "recipe": checked.recipe.name,
        "tp_size": checked.recipe.parallel.tp_size,
        "model": f"{spec.architecture}, {spec.layers} layers, hidden {spec.hidden}, "
        f"{spec.heads}/{spec.kv_heads} heads of {spec.head_dim}, vocabulary {spec.vocab}",
        "file": str(index.root),
        "files": f"{files} file{'s' if files > 1 else ''}",
        "bytes": index.total_bytes,
        "evidence": checked.evidence,
        "origins": [use.origin for use in checked.rows],
        "notes": checked.notes,
        "seconds": seconds,
        "command": command_of(checked.recipe),
    }
