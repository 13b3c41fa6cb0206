"""What `job=check` shows."""

from __future__ import annotations

from textwrap import wrap
from typing import Any

from framework.report.text import block, columns, count, heading, shorten, size, width

MOST = 120
WIDE = 110  # columns from which the table of rows has all its columns


def check_text(document: dict[str, Any], facts: dict[str, Any]) -> str:
    """Render CLI.md's check document.

    `facts`: recipe, tp_size, model, file, files, bytes, evidence, notes, seconds, command, and per row its origin.
    """
    lines = heading("check", facts["recipe"], document["tier"], facts["tp_size"], f"table {document['table']}")
    held = f"{facts['files']}, {size(facts['bytes'])}"
    lines += [
        *_lines("model", facts["models"]),
        f"file      {shorten(facts['file'], width() - 13 - len(held))}   {held}",
        *_lines(
            "format",
            [f"{document['format']}   because {said}" if i == 0 else said for i, said in enumerate(facts["evidence"])],
        ),
        "",
    ]
    lines += block("rows", _rows(document["rows"], facts["origins"]))
    ledger = document["ledger"]
    total = ledger["consumed"] + len(ledger["ignored"]) + len(ledger["unexpected"])
    lines.append(
        f"ledger    {count(total)} tensors: {count(ledger['consumed'])} used, {len(ledger['ignored'])} ignored, "
        f"{len(ledger['missing'])} missing, {len(ledger['unexpected'])} unexpected"
    )
    lines += _lines("", [f"ignored {name}: {reason}" for name, reason in _ignored(ledger["ignored"])])
    if facts["notes"]:
        lines += ["", *_lines("notes", facts["notes"])]
    lines.append("")
    if document["ok"]:
        verdict, after = f"ok  {facts['seconds']:.1f} s, headers only", f"next: {facts['command']} job=plan"
        line = f"{verdict}     {after}"
        lines += [line] if len(line) <= width() else [verdict, after]
    else:
        many = len(document["problems"])
        lines.append(f"refused  {many} problem{'s' if many > 1 else ''}, nothing was loaded     exit status 1")
    return "\n".join(lines)


def _rows(rows: list[dict[str, Any]], origins: list[str]) -> list[str]:
    """The table of rows. Narrow ones leave out what a row's name says; who decided has the room that is left."""
    if wide := width(MOST) >= WIDE:
        cells = [["scheme", "layer", "modules", "status", "row"]]
        cells += [[r["scheme"], r["layer_type"], count(r["modules"]), r["status"], r["row"] or "-"] for r in rows]
    else:
        names = [row["row"] or f"none for {row['scheme']} {row['layer_type']}" for row in rows]
        cells = [["row", "modules", "status"]]
        cells += [[name, count(row["modules"]), row["status"]] for name, row in zip(names, rows, strict=True)]
    room = width(MOST) - max(map(len, columns(cells))) - 2
    sources = [f"{origin}  {row['pattern']}".rstrip() for row, origin in zip(rows, origins, strict=True)]
    table = [[*row, shorten(source, room)] for row, source in zip(cells, ["from", *sources], strict=True)]
    return columns(table, "llr" if wide else "lr")


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
