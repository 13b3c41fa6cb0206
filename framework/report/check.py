"""What `job=check` shows."""

from __future__ import annotations

from textwrap import wrap
from typing import Any

from framework.report.text import block, columns, count, heading, shorten, size, width


def check_text(document: dict[str, Any], facts: dict[str, Any]) -> str:
    """Render CLI.md's check document.

    `facts`: recipe, tp_size, model, file, files, bytes, evidence, notes, seconds, command, and per row its origin.
    """
    lines = heading("check", facts["recipe"], document["tier"], facts["tp_size"], f"table {document['table']}")
    lines += [
        *_lines("model", facts["models"]),
        f"file      {shorten(facts['file'], width() - 40)}   {facts['files']}, {size(facts['bytes'])}",
        *_lines(
            "format",
            [f"{document['format']}   because {said}" if i == 0 else said for i, said in enumerate(facts["evidence"])],
        ),
        "",
    ]
    rows = [["scheme", "layer", "modules", "status", "row", "from"]]
    limit = 26 if width() < 100 else 40
    for row, origin in zip(document["rows"], facts["origins"], strict=True):
        source = f"{origin}  {row['pattern']}" if row["pattern"] else origin
        rows.append(
            [row["scheme"], row["layer_type"], count(row["modules"]), row["status"], row["row"] or "-",
             shorten(source, limit)]
        )  # fmt: skip
    lines += block("rows", columns(rows, "llr"))
    ledger = document["ledger"]
    total = ledger["consumed"] + len(ledger["ignored"]) + len(ledger["unexpected"])
    lines.append(
        f"ledger    {count(total)} tensors: {count(ledger['consumed'])} used, {len(ledger['ignored'])} ignored, "
        f"{len(ledger['missing'])} missing, {len(ledger['unexpected'])} unexpected"
    )
    lines += [f"          ignored {name}: {reason}" for name, reason in _ignored(ledger["ignored"])]
    if facts["notes"]:
        lines += ["", *_lines("notes", facts["notes"])]
    lines.append("")
    if document["ok"]:
        lines.append(f"ok  {facts['seconds']:.1f} s, headers only     next: {facts['command']} job=plan")
    else:
        many = len(document["problems"])
        lines.append(f"refused  {many} problem{'s' if many > 1 else ''}, nothing was loaded     exit status 1")
    return "\n".join(lines)


def _ignored(items: list[dict[str, str]]) -> list[tuple[str, str]]:
    """One line a reason: the first name, and how many more."""
    by_reason: dict[str, list[str]] = {}
    for item in items:
        by_reason.setdefault(item["reason"], []).append(item["name"])
    return [
        (names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else ""), reason)
        for reason, names in by_reason.items()
    ]


def _lines(label: str, said: list[str]) -> list[str]:
    wrapped = [line for text in said for line in wrap(text, width() - 10)]
    return [f"{label if i == 0 else '':10}{line}" for i, line in enumerate(wrapped)]


def check_markdown(document: dict[str, Any]) -> str:
    """The same as a table to paste into an issue."""
    lines = [
        f"**check** tier {document['tier']}, table {document['table']}, format {document['format']}: "
        f"{'ok' if document['ok'] else 'refused'}",
        "",
        "| row | status | scheme | layer | modules | pattern |",
        "|---|---|---|---|---|---|",
    ]
    for row in document["rows"]:
        cells = (row["row"], row["status"], row["scheme"], row["layer_type"], row["modules"], row["pattern"])
        lines.append("| " + " | ".join(f"`{c}`" if i in (0, 5) else str(c) for i, c in enumerate(cells)) + " |")
    for problem in document["problems"]:
        lines += ["", f"- **{problem['code']}** {problem['what']} — {problem['why']}. Fix: {problem['fix']}"]
    return "\n".join(lines)
