"""What `job=plan` shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, groupby
from textwrap import wrap
from typing import Any

from framework.report.fold import (
    FACTS,
    Entry,
    Fold,
    fold,
    held_as,
    joined,
    ranges,
    rank_name,
    rank_runs,
    shape,
    shard,
    split,
)
from framework.report.text import GIB, columns, count, heading, size, width

MOST = 120
WIDE = 110  # columns from which tables have all their columns
BYTES = ("weights_bytes", "kv_cache_bytes", "workspace_bytes")


def plan_text(document: dict[str, Any], facts: dict[str, Any]) -> str:
    """Render plan.json. `facts`: seconds, path (of plan.json), drawn (the picture, or None), status by row."""
    runtime = document["runtime"]
    lines = heading(
        "plan", document["recipe"], document["tier"], document["tp_size"], document["format"], runtime["device"]
    )
    lines += [*_shards(document, facts["status"]), "", *_memory(document), ""]
    if document["spec"]:
        cache = (
            f"{count(runtime['cache_pages'] * 128)} tokens in pages of 128, {runtime['cache_dtype']}, up to "
            f"{runtime['max_batch']} sequences of up to {count(runtime['context'])} tokens"
        )
        lines += wrapped("cache", [cache])
    lines += wrapped("notes", document["notes"])
    lines += [*wrapped("bound", bound(document)), *wrapped("assuming", document["roofline"]["assumptions"]), ""]
    fits = all(rank["fits"] for rank in document["ranks"])
    verdict = f"ok  {facts['seconds']:.1f} s, headers only, no device used"
    lines += [verdict if fits else "does not fit     exit status 1", f"    {facts['path']}"]
    lines.append(f"    {facts['drawn']}" if facts["drawn"] else "    draw it: job.html=plan.html")
    return "\n".join(lines)


def wrapped(name: str, texts: Iterable[str]) -> list[str]:
    """Texts below each other, the block's name in the margin of the first; further lines of a text are indented."""
    lines = [("  " if i else "") + part for text in texts for i, part in enumerate(wrap(text, width(MOST) - 12))]
    return [f"{'' if i else name:10}{line}" for i, line in enumerate(lines)]


def runs_by(entry: Entry, status: dict[str, str]) -> tuple[str, str, str, str]:
    """What a module runs by: its scheme, its row, the row's status, its op; empty where it has none."""
    row = entry["row"] or ""
    op = entry["op"] + (f" in {entry['pieces']} pieces" if entry["pieces"] > 1 else "")
    return entry["scheme"], row, status[row] if row else "", op


def is_weight(entry: Entry) -> bool:
    """Whether it is a matrix; norms and single parameters are not."""
    return entry["module"]["kind"] not in ("norm", "parameter")


def bound(document: dict[str, Any]) -> list[str]:
    """The roofline in words; what is not known is said to be unknown."""
    roofline, tier = document["roofline"], document["tier"]
    what = "decode, batch 1:" if document["spec"] else "one pass of each transformer:"
    read = f"{what} {size(max(roofline['weight_bytes_per_token']))} of weights read a rank"
    if roofline["decode_s_at_best"] is None:
        lines = [f"{read}; the bandwidth of {tier} is unknown, so no time is given"]
    else:
        speed = f", {count(round(roofline['decode_tok_s_at_best']))} tok/s" if document["spec"] else ""
        seconds = f"{roofline['decode_s_at_best'] * 1e3:.3f} ms"
        lines = [f"{read}, {seconds} at {roofline['bandwidth_tb_s']:.2f} TB/s{speed} at best"]
    if not document["spec"]:
        return lines
    lines.append(f"each token of context adds {max(roofline['kv_bytes_per_token_of_context']) / 1024:.1f} KiB to read")
    if roofline["prefill_tok_s_at_best"] is None:
        return [*lines, f"prefill: the bf16 peak of {tier} is unknown, so no speed is given"]
    speed = count(round(roofline["prefill_tok_s_at_best"]))
    return [*lines, f"prefill: {speed} tok/s at best, {roofline['peak_tflops_bf16']:.0f} TFLOPS bf16"]


def _wide() -> bool:
    return width(MOST) >= WIDE


def _shards(document: dict[str, Any], status: dict[str, str]) -> list[str]:
    """The kinds of modules below what they run by; one table, so that its columns line up."""
    wide = _wide()
    kinds = fold(document["modules"], FACTS if wide else tuple(key for key in FACTS if key not in ("label", "group")))
    groups: dict[tuple[str, ...], list[list[str]]] = {}
    weights = [kind for kind in kinds if is_weight(kind.entry)]
    for siblings in _siblings(weights):
        groups.setdefault(runs_by(siblings[0].entry, status), []).append(_cells(siblings, wide=wide))
    head = ["", "layers", "[N, K]", *(["in file"] if wide else []), "rank 0", "split"]
    rows = [head, *chain(*groups.values())]
    room = width(MOST) - 4 - sum(2 + max(len(row[i]) for row in rows) for i in range(1, len(head)))
    # a name that leaves no room for its facts has a line of its own
    first, *aligned = columns([["" if len(row[0]) > room else row[0], *row[1:]] for row in rows], indent=4)
    lines = ["shards" + first[6:]]
    for title, members in groups.items():
        lines += _title(*title)
        for name, *_ in members:
            lines += [f"    {name}"] if len(name) > room else []
            lines.append(aligned.pop(0))
    small = sum(kind.linears for kind in kinds if not is_weight(kind.entry))
    return [*lines, f"  {count(small)} norms and parameters, float, whole on every rank"] if small else lines


def _title(scheme: str, row: str, status: str, op: str) -> list[str]:
    name = f"  {scheme:<13} {f'{row}, {status}' if row else 'looked up, no product'}"
    one = f"{name}   {op}".rstrip()
    return [one] if len(one) <= width(MOST) else [name, f"{'':16}{op}"]


def _siblings(kinds: Iterable[Fold]) -> list[list[Fold]]:
    """Neighbours that are equal but for the last part of their name: gate_proj and up_proj."""
    equal = (*FACTS, "experts")

    def but_last_name(kind: Fold) -> tuple[Any, ...]:
        return kind.stack, kind.part.rpartition(".")[0], kind.layers, *(str(kind.entry.get(key)) for key in equal)

    return [list(run) for _, run in groupby(kinds, key=but_last_name)]


def _cells(siblings: Sequence[Fold], *, wide: bool) -> list[str]:
    kind, entry = siblings[0], siblings[0].entry
    name = joined(sibling.part for sibling in siblings).removeprefix("model.")
    if kind.stack != "model.layers" and kind.stack:
        name = f"{kind.stack}.*.{name}"
    elif not wide:
        name = name.removeprefix("self_attn.").removeprefix("mlp.")
    held = [held_as(entry)] if wide else []
    return [name, ranges(kind.layers), shape(entry), *held, shard(entry), split(entry)]


def _memory(document: dict[str, Any]) -> list[str]:
    """Bytes per rank; neighbours that hold the same are one line."""
    wide, spec = _wide(), document["spec"]
    rows = [
        ["", "weights", "KV cache", "workspace", "planned", "load peak", "may use", *(["heads", ""] if wide else [])]
    ]
    for run in rank_runs(document["ranks"]):
        rank = run[0]
        capacity = size(rank["capacity_bytes"]) if rank["capacity_bytes"] else "unknown"
        cells = [size(held) if held else "-" for held in (*(rank[name] for name in BYTES), planned(rank))]
        (q0, q1), (kv0, kv1) = rank["q_heads"], rank["kv_heads"]
        heads = f"{q1 - q0}/{kv1 - kv0} of {spec['heads']}/{spec['kv_heads']}" if spec else str(q1 - q0)
        cells += [size(rank["load_peak_bytes"]), capacity]
        rows.append([rank_name(run), *cells, *([heads, "fits" if rank["fits"] else "too big"] if wide else [])])
    lines = columns(rows, "lrrrrrr", indent=10 if wide else 2)
    return ["memory" + lines[0][6:], *lines[1:]]


def planned(rank: dict[str, Any]) -> int:
    """Bytes that a rank holds while it runs."""
    return int(sum(rank[name] for name in BYTES))


def plan_markdown(document: dict[str, Any]) -> str:
    """Bytes per rank as a table to paste into an issue."""
    lines = [
        f"**plan** `{document['recipe']}` tier {document['tier']}, tp {document['tp_size']}, {document['format']}",
        "",
        "| rank | weights GiB | KV cache GiB | workspace GiB | load peak GiB | may use GiB | fits |",
        "|---|---|---|---|---|---|---|",
    ]
    for rank in document["ranks"]:
        cells = [f"{rank[name] / GIB:.2f}" for name in (*BYTES, "load_peak_bytes", "capacity_bytes")]
        lines.append(f"| {rank['rank']} | " + " | ".join(cells) + f" | {'yes' if rank['fits'] else 'no'} |")
    return "\n".join(lines)
