"""What `job=verify` shows of a diffusion pipeline."""

from __future__ import annotations

from typing import Any

from framework.report.text import columns, heading


def drawing_text(document: dict[str, Any], plan: dict[str, Any], layout: str, against: str) -> str:
    """Render CLI.md's document for latents and pictures."""
    runtime = plan["runtime"]
    lines = heading(
        "verify", plan["recipe"], plan["tier"], plan["tp_size"], layout,
        f"{runtime['device']} {runtime['dtype']}", f"against {against}",
    )  # fmt: skip
    rows = [["", "max |d|", "rel l2", "PSNR", "tolerance", ""], *_rows(document)]
    lines += [*columns(rows, "lrrrr", indent=0), ""]
    lines.append("ok" if document["ok"] else "failed     exit status 1")
    return "\n".join(lines)


def drawing_markdown(document: dict[str, Any]) -> str:
    """The same as a table to paste into an issue."""
    lines = [
        f"**verify** {'ok' if document['ok'] else 'failed'}, {document['metric']}",
        "",
        "| | max abs | rel l2 | PSNR | tolerance | |",
        "|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in _rows(document))])


def _rows(document: dict[str, Any]) -> list[list[str]]:
    rows = []
    if latents := document.get("latents"):
        holds = latents[document["metric"]] <= document["tolerance"]
        figures = [f"{latents['max_abs']:.3g}", f"{latents['rel_l2']:.2g}", "", f"{document['tolerance']:.3g}"]
        rows.append(["latents", *figures, "ok" if holds else "no"])
    if frames := document.get("frames"):
        holds = frames["max_abs"] <= frames["tolerance"]
        figures = [f"{frames['max_abs']:.3g}", "", f"{frames['psnr_db']:.1f} dB", f"{frames['tolerance']:.3g}"]
        rows.append(["frames", *figures, "ok" if holds else "no"])
    return rows
