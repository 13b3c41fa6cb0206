"""What `job=plan` shows."""

from __future__ import annotations

import re
from typing import Any

from framework.report.text import GIB, block, columns, count, heading, size, width


def plan_text(document: dict[str, Any], facts: dict[str, Any]) -> str:
    """Render plan.json. `facts`: seconds, path (of plan.json, or empty)."""
    ranks, runtime, spec = document["ranks"], document["runtime"], document["spec"]
    lines = heading(
        "plan",
        document["recipe"],
        document["tier"],
        document["tp_size"],
        document["format"],
        runtime["device"],
    )
    lines += block("shards", columns(_shards(document), "llr"))
    lines += block("memory", _memory(ranks, spec))
    lines.append(
        f"cache     {count(runtime['cache_pages'] * 128)} tokens in pages of 128, up to {runtime['max_batch']} "
        f"sequences of up to {count(runtime['context'])} tokens"
    )
    lines += [f"          {note}" for note in document["notes"]]
    lines += ["", *_bound(document["roofline"]), ""]
    where = f"     {facts['path']}" if facts["path"] else ""
    lines.append(f"ok  {facts['seconds']:.1f} s, headers only, no device used{where}")
    return "\n".join(lines)


def _shards(document: dict[str, Any]) -> list[list[str]]:
    """One line per kind of module: equal but for the layer number."""
    seen: dict[tuple[Any, ...], tuple[int, dict[str, Any]]] = {}
    for module in document["modules"]:
        if module["module"]["kind"] == "norm":
            continue
        name = re.sub(r"\.layers\.\d+\.", ".layers.*.", module["name"])
        key = (name, module["scheme"], module["split"], str(module["shards"]))
        seen[key] = (seen.get(key, (0, module))[0] + 1, module)
    rows = [["module", "scheme", "[N, K]", "layers", "split", "rank 0", "after"]]
    for (name, scheme, split, _), (times, module) in seen.items():
        n0, n1, k0, k1 = module["shards"][0]
        n, k = module["shape"]
        cut = "all" if (n1 - n0, k1 - k0) == (n, k) else f"[{n0}:{n1}, :]" if k1 - k0 == k else f"[:, {k0}:{k1}]"
        after = {"row": "all-reduce", "vocab": "gather", "rows+gather": "gather"}.get(split, "")
        if document["tp_size"] == 1:
            after = ""
        short = name.removeprefix("model.").replace("layers.*.", "")
        rows.append([short, scheme, f"[{n}, {k}]", str(times), split, cut, after])
    return rows


def _memory(ranks: list[dict[str, Any]], spec: dict[str, Any]) -> list[str]:
    rows = [["", "weights", "KV cache", "workspace", "planned", "may use", "heads", ""]]
    for rank in ranks:
        planned = rank["weights_bytes"] + rank["kv_cache_bytes"] + rank["workspace_bytes"]
        capacity = size(rank["capacity_bytes"]) if rank["capacity_bytes"] else "unknown"
        q, kv = rank["q_heads"], rank["kv_heads"]
        rows.append(
            [
                f"rank {rank['rank']}",
                size(rank["weights_bytes"]),
                size(rank["kv_cache_bytes"]),
                size(rank["workspace_bytes"]),
                size(planned),
                capacity,
                f"{q[1] - q[0]}/{kv[1] - kv[0]} of {spec['heads']}/{spec['kv_heads']}",
                "fits" if rank["fits"] else "too big",
            ]
        )
    if width() < 100:
        rows = [[*row[:2], *row[4:]] for row in rows]
    return columns(rows, "lrrrrr" if width() >= 100 else "lrrr")


def _bound(roofline: dict[str, Any]) -> list[str]:
    read = max(roofline["weight_bytes_per_token"])
    if roofline["decode_s_at_best"] is None:
        first = f"bound     decode, batch 1: {size(read)} read a token a rank; bandwidth of this tier unknown"
    else:
        first = (
            f"bound     decode, batch 1: {size(read)} read a token a rank, "
            f"{roofline['decode_s_at_best'] * 1e3:.3f} ms at {roofline['bandwidth_tb_s']:.2f} TB/s, "
            f"{roofline['decode_tok_s_at_best']:.0f} tok/s at best"
        )
    return [
        first,
        "          a bound, not a forecast: kernels reach 45 to 60 % of the bandwidth, communication not counted",
    ]


def plan_markdown(document: dict[str, Any]) -> str:
    """Bytes per rank as a table to paste into an issue."""
    lines = [
        f"**plan** `{document['recipe']}` tier {document['tier']}, tp {document['tp_size']}, {document['format']}",
        "",
        "| rank | weights GiB | KV cache GiB | workspace GiB | capacity GiB | fits |",
        "|---|---|---|---|---|---|",
    ]
    for rank in document["ranks"]:
        names = ("weights_bytes", "kv_cache_bytes", "workspace_bytes", "capacity_bytes")
        cells = [f"{rank[name] / GIB:.2f}" for name in names]
        lines.append(f"| {rank['rank']} | " + " | ".join(cells) + f" | {'yes' if rank['fits'] else 'no'} |")
    return "\n".join(lines)
