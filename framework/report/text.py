"""Plain aligned text: columns, bytes, numbers. Two spaces of indent, no frames, readable at 80 columns."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

GIB = 1 << 30
MIB = 1 << 20


def width(most: int = 100) -> int:
    """Columns of the terminal, at most `most`; 100 where there is no terminal."""
    return min(most, shutil.get_terminal_size((100, 24)).columns)


def size(nbytes: float) -> str:
    """Bytes as GiB with two decimals, or MiB with one below a tenth of a GiB."""
    return f"{nbytes / GIB:.2f} GiB" if nbytes >= GIB / 10 else f"{nbytes / MIB:.1f} MiB"


def count(number: int) -> str:
    """A whole number with thin gaps between thousands."""
    return f"{number:,}".replace(",", " ")


def shorten(text: str, limit: int) -> str:
    """Cut a long name in its middle."""
    if len(text) <= limit:
        return text
    keep = max(limit - 3, 2)
    return f"{text[: keep - keep // 2]}...{text[len(text) - keep // 2 :]}"


def columns(rows: Sequence[Sequence[str]], right: str = "", indent: int = 10) -> list[str]:
    """Align cells in columns two spaces apart; `right` has an r for each right-aligned column."""
    if not rows:
        return []
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(widths[i]) if i < len(right) and right[i] == "r" else cell.ljust(widths[i])
            for i, cell in enumerate(row)
        ]
        lines.append((" " * indent + "  ".join(cells)).rstrip())
    return lines


def block(name: str, lines: Sequence[str]) -> list[str]:
    """Put a block's name in the left margin of its first line; a blank line goes after it."""
    if not lines:
        return []
    return [
        name.ljust(10) + lines[0][10:] if lines[0].startswith(" " * 10) else f"{name:<10}{lines[0]}",
        *lines[1:],
        "",
    ]


def heading(job: str, recipe: str, tier: str, tp_size: int, *more: str) -> list[str]:
    """The first line: what was understood; the gaps between its parts are as wide as there is room for."""
    parts = [f"{job}  {recipe}", tier, f"tp {tp_size}", *more]
    line = "   ".join(parts)
    return [line if len(line) <= width() else "  ".join(parts), ""]
