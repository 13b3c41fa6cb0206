"""What `job=doctor` shows."""

from __future__ import annotations

import textwrap
from typing import Any

from framework.report.text import width


def doctor_text(document: dict[str, Any], *, has_npu: bool) -> str:
    """Render the findings, each fix below its line."""
    broken = [f for f in document["findings"] if f["verdict"] == "no"]
    lines = [
        f"doctor  {len(broken)} thing{'s' if len(broken) != 1 else ''} to fix" if broken else "doctor",
        "",
    ]
    for finding in document["findings"]:
        text = finding["found"] + (f"   {finding['why']}" if finding["why"] else "")
        first, *rest = textwrap.wrap(text, width() - 18) or [""]
        lines.append(f"{finding['name']:<12}{first:<{width() - 18}}  {finding['verdict']}")
        lines += [" " * 12 + line for line in rest]
        if finding["fix"]:
            lines.append(f"{'':14}fix  {finding['fix']}")
    lines.append("")
    if broken:
        lines.append("broken  check, plan and CPU runs may work meanwhile     exit status 1")
    else:
        here = "NPUs are usable" if has_npu else "no NPU here: check, plan and CPU runs work"
        lines.append(f"ok  {here}")
    return "\n".join(lines)


def doctor_markdown(document: dict[str, Any]) -> str:
    """The same as a table to paste into an issue."""
    lines = ["| what | found | | fix |", "|---|---|---|---|"]
    for f in document["findings"]:
        found = f"{f['found']} {f['why']}".strip()
        lines.append(f"| {f['name']} | {found} | {f['verdict']} | {f['fix']} |")
    return "\n".join(lines)
