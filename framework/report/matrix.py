"""What `job=matrix` shows."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from framework.report.text import columns

SHORT = {"supported": "yes", "unsupported": "no", None: "-"}
STATUS = ("a2", "a3", "a5", "diffusion")
_NOTE_MIN = 24  # columns below which a note is unreadable
_NOTE_MAX = 60

HEAD = """\
# Support matrix

What may run where: a row is one file format, one scheme and one layer type. `job=check` finds the row of every module
of a checkpoint and refuses, before any weight is read, what its row does not allow on the recipe's `hardware`. This
page is written by `python launch.py job=matrix job.format=markdown`.

| status | the check |
|---|---|
| yes | runs |
| tbd | refused unless the recipe says `capability: {allow: [tbd]}`: nobody has confirmed it |
| wip | refused unless the recipe says `capability: {allow: [wip]}`: it is being worked on |
| no | always refused |

- **a2, a3, a5** are the hardware tiers: Atlas A2 (Ascend 910B), Atlas A3 (Ascend 910_93), Ascend 950. The status
  counts on the CPU too: a plan made on a laptop is the plan that the hardware runs.
- **diffusion** says what a diffusion model gets where the tier says yes; `-`: the published table has no such column,
  the row speaks of language models only. Rows `diffusion.*` speak of diffusion models only and come before the others;
  experts of a diffusion model have no row that says yes.
- **key** is what leads to the row: the type in `quant_model_description.json`, the config of the other formats, or
  `quantization.online` for a float checkpoint that is quantized at load. Float modules of any format but GGUF are
  judged by `none.float.*`.
- **origin** `table`: SGLang's published table. `ours`: what real files hold or the ops allow besides; never better than
  `tbd`, for nobody has run it on a device, but plain float.

`capability.table` picks the table: `default` is the published one with our rows, the others say what a version of
SGLang does and are given below as differences. A table of your own is a file beside them in `conf/capability/`, with
`base: default` and the rows that differ.
"""


def matrix_text(document: dict[str, Any]) -> str:
    """Render the table, a row a line; notes are wrapped beside them, or left out where the terminal is narrow."""
    rows = [["row", *STATUS, "origin"], *([row["row"], *_status(row), row["origin"]] for row in document["rows"])]
    lines = columns(rows, indent=0)
    left = max(len(line) for line in lines) + 2
    room = min(_terminal() - left, _NOTE_MAX)
    if room >= _NOTE_MIN:
        notes = ["note", *(row["note"] for row in document["rows"])]
        lines = [text for line, note in zip(lines, notes, strict=True) for text in _beside(line, note, left, room)]
    return "\n".join(
        [
            f"matrix  table {document['table']}    yes   no   wip   tbd   - no such column",
            "",
            *lines,
            "",
            "wip and tbd rows run only when the recipe allows them: capability.allow=[tbd]",
            "formats, keys and the other tables: job.format=markdown",
        ]
    )


def matrix_markdown(document: dict[str, Any], others: Sequence[dict[str, Any]] = ()) -> str:
    """Render the page docs/support-matrix.md: how to read it, the table, how the other tables differ from it."""
    lines = [HEAD, f"## Table `{document['table']}`", "", *_table(document["rows"])]
    for other in others:
        changed, gone = _differences(document["rows"], other["rows"])
        lines += ["", f"## Table `{other['table']}`: differences", "", *_table(changed)]
        if gone:
            lines += ["", f"Not in it: {', '.join(f'`{row}`' for row in gone)}."]
    return "\n".join(lines)


def _terminal() -> int:
    return shutil.get_terminal_size((100, 24)).columns


def _status(row: dict[str, Any]) -> list[str]:
    return [SHORT.get(row[name], row[name]) for name in STATUS]


def _beside(line: str, note: str, left: int, room: int) -> list[str]:
    first, *more = textwrap.wrap(note, room) or [""]
    return [f"{line.ljust(left)}{first}".rstrip(), *(" " * left + text for text in more)]


def _table(rows: Sequence[dict[str, Any]]) -> list[str]:
    heads = ("row", "format", "scheme", "layer", "mode", *STATUS, "origin", "key", "note")
    cells = [
        [f"`{row['row']}`", row["format"], row["scheme"], row["layer_type"], row["mode"], *_status(row),
         row["origin"], row["key"], row["note"]]
        for row in rows
    ]  # fmt: skip
    return [_line(heads), "|" + "---|" * len(heads), *(_line([cell.replace("|", "\\|") for cell in c]) for c in cells)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _differences(
    rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return the rows of another table that are new or changed, and the ids that it does not have."""
    known = {row["row"]: row for row in rows}
    gone = known.keys() - {row["row"] for row in others}
    return [row for row in others if known.get(row["row"]) != row], sorted(gone)
