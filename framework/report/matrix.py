"""What `job=matrix` shows."""

from __future__ import annotations

from typing import Any

from framework.report.text import columns, shorten, width

SHORT = {"supported": "yes", "unsupported": "no", None: "-"}
HEADS = ("format", "scheme", "layer", "mode", "a2", "a3", "a5", "diffusion", "origin", "note")


def _cells(row: dict[str, Any]) -> list[str]:
    status = [SHORT.get(row[name], row[name]) for name in ("a2", "a3", "a5", "diffusion")]
    return [row["format"], row["scheme"], row["layer_type"], row["mode"], *status, row["origin"], row["note"]]


def matrix_text(document: dict[str, Any]) -> str:
    """Render the table, a row a line; the note goes where the terminal is narrow."""
    rows = [list(HEADS), *(_cells(row) for row in document["rows"])]
    used = sum(max(len(row[i]) for row in rows) + 2 for i in range(len(HEADS) - 1))
    room = width() - used
    rows = [[*row[:-1], shorten(row[-1], room)] if room >= 12 else row[:-1] for row in rows]
    lines = [f"matrix  table {document['table']}    yes   no   wip   tbd", "", *columns(rows, indent=0), ""]
    lines.append("wip and tbd rows run only when the recipe allows them: capability.allow=[tbd]")
    lines.append("paste into an issue: job.format=markdown")
    return "\n".join(lines)


def matrix_markdown(document: dict[str, Any]) -> str:
    """Render the table with row ids."""
    heads = ("row", *HEADS[1:])
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    lines += ["| " + " | ".join([f"`{row['row']}`", *_cells(row)[1:]]) + " |" for row in document["rows"]]
    return "\n".join(lines)
