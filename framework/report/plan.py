"""What `job=plan` shows."""

from __future__ import annotations

from itertools import groupby
from textwrap import wrap
from typing import Any

from framework.report.fold import FACTS, Fold, after, fold, held_as, rank_name, rank_runs, shape, shard
from framework.report.text import GIB, block, columns, count, heading, shorten, size, width

WIDE = 110  # columns from which a table is shown with all it has
MOST = 120
BYTES = ("weights_bytes", "kv_cache_bytes", "workspace_bytes")
_HOW = ("scheme", "row", "mode", "op", "pieces")


def plan_text(document: dict[str, Any], facts: dict[str, Any]) -> str:
    """Render plan.json. `facts`: seconds, path (of plan.json), drawn (the picture, or None), statuses of rows."""
    runtime = document["runtime"]
    lines = heading(
        "plan", document["recipe"], document["tier"], document["tp_size"], document["format"], runtime["device"]
    )
    lines += _shards(document, facts["statuses"])
    lines += _memory(document)
    if document["spec"]:
        lines += _wrapped(
            "cache",
            [f"{count(runtime['cache_pages'] * 128)} tokens in pages of 128, {runtime['cache_dtype']}, up to "
             f"{runtime['max_batch']} sequences of up to {count(runtime['context'])} tokens"],
        )  # fmt: skip
    lines += _wrapped("notes", document["notes"])
    lines += [*_wrapped("bound", bound(document)), *_wrapped("assuming", document["roofline"]["assumptions"]), ""]
    lines.append(f"ok  {facts['seconds']:.1f} s, headers only, no device used")
    lines.append(f"    {facts['path']}")
    lines.append(f"    {facts['drawn']}" if facts["drawn"] else "    draw it: job.html=plan.html")
    return "\n".join(lines)


def how(entry: dict[str, Any], statuses: dict[str, str]) -> tuple[str, str, str]:
    """What a module runs by: scheme, row with its status, op."""
    row = f"{entry['row']}, {statuses.get(entry['row'], 'unknown')}" if entry["row"] else "no matrix product"
    return entry["scheme"], row, entry["op"] + (f", {entry['pieces']} pieces" if entry["pieces"] > 1 else "")


def _wide() -> bool:
    return width(MOST) >= WIDE


def _wrapped(name: str, texts: list[str]) -> list[str]:
    lines = [f"{'  ' if i else ''}{line}" for text in texts for i, line in enumerate(wrap(text, width(MOST) - 12))]
    return [f"{'' if i else name:10}{line}" for i, line in enumerate(lines)]


def _shards(document: dict[str, Any], statuses: dict[str, str]) -> list[str]:
    """The kinds of modules below what they run by: scheme, row, op. One table, so that its columns line up."""
    wide = _wide()
    products, rest = [], []
    for kind in fold(document["modules"], FACTS if wide else [key for key in FACTS if key not in ("label", "group")]):
        (rest if kind.entry["module"]["kind"] in ("norm", "parameter") else products).append(kind)
    groups: dict[tuple[str, ...], list[Fold]] = {}
    for kind in products:
        groups.setdefault(tuple(str(kind.entry[key]) for key in _HOW), []).append(kind)
    table = [_cells(run, wide) for kinds in groups.values() for run in (_siblings(kinds) if wide else [[k] for k in kinds])]
    head = ["module", "layers", "[N, K]", *(["in the file"] if wide else []), "rank 0", "split" + (", then" if document["tp_size"] > 1 else "")]
    room = width(MOST) - 4 - sum(2 + max(len(row[i]) for row in [head, *table]) for i in range(1, len(head)))
    for row in table:
        row[0] = shorten(row[0], max(room, 12))
    aligned = iter(columns([head, *table], "l", indent=4))
    lines = ["shards", next(aligned)]
    for kinds in groups.values():
        scheme, row, op = how(kinds[0].entry, statuses)
        title = f"  {scheme:<14}  {row}"
        lines += [f"{title}   {op}"] if len(title) + len(op) + 3 <= width(MOST) else [title, f"{'':18}{op}"]
        lines += [next(aligned) for _ in (_siblings(kinds) if wide else kinds)]
    if rest:
        lines.append(f"  {'float':<14}  {count(sum(kind.linears for kind in rest))} norms and parameters, on every rank")
    return [line.rstrip() for line in lines] + [""]
