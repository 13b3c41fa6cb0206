"""job=check: the recipe against headers and support table. Loads nothing, writes nothing."""

from __future__ import annotations

import time

from framework.collector import uncollected
from framework.jobs.common import command_of, emit, emit_json, open_checked, options
from framework.planning.check import Checked
from framework.recipe.schema import Recipe
from framework.report.check import check_markdown, check_text
from framework.report.errors import format_problems


@uncollected()
def run(recipe: Recipe) -> int:
    """Check and report. Returns 0 when the recipe would run, else 1."""
    start = time.perf_counter()
    checked = open_checked(recipe, headers_only=True)
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
    indexes = [part.index for part in checked.model.parts]
    files = sum(len(index.files) for index in indexes)
    return {
        "recipe": checked.recipe.name,
        "tp_size": checked.recipe.parallel.tp_size,
        "models": _models(checked),
        "file": checked.recipe.model.path if "://" in checked.recipe.model.path else str(checked.root),
        "files": f"{files} file{'s' if files > 1 else ''}" if files else "no file: as the config says",
        "bytes": sum(index.total_bytes for index in indexes),
        "evidence": [
            f"{part.prefix[:-1]}: {part.evidence}" if part.prefix else part.evidence for part in checked.model.parts
        ],
        "origins": [use.origin for use in checked.rows],
        "notes": checked.notes,
        "seconds": seconds,
        "command": command_of(checked.recipe),
    }


def _models(checked: Checked) -> list[str]:
    """One line per part: what its config describes."""
    decoder = checked.model.decoder
    if decoder is None:
        return [
            f"{prefix[:-1]}: {spec.class_name}, {spec.layers} blocks, {spec.heads} heads of {spec.head_dim}"
            for prefix, spec in (checked.model.transformers or {}).items()
        ]
    experts = f", {decoder.moe.experts} experts a layer, {decoder.moe.top_k} a token" if decoder.moe else ""
    heads = (
        f"{decoder.heads} heads over a latent of {decoder.mla.kv_rank}"
        if decoder.mla
        else (f"{decoder.heads}/{decoder.kv_heads} heads of {decoder.head_dim}")
    )
    return [
        f"{decoder.architecture}, {decoder.layers} layers, hidden {decoder.hidden}, {heads}{experts}, "
        f"vocabulary {decoder.vocab}"
    ]
