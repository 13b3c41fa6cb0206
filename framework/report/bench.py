"""What `job=bench` shows."""

from __future__ import annotations

from typing import Any

from framework.report.text import columns, heading, size


def bench_text(document: dict[str, Any], plan: dict[str, Any], facts: dict[str, Any]) -> str:
    """Render CLI.md's bench document with the plan's decode bound beside it."""
    runtime = plan["runtime"]
    lines = heading(
        "bench", plan["recipe"], plan["tier"], plan["tp_size"],
        f"{facts['device']} {runtime['dtype']}, {runtime['threads']} threads a rank",
    )  # fmt: skip
    rows = [
        [
            "time to first token",
            f"{document['ttft_s'] * 1e3:.0f} ms",
            f"{facts['prompt_tokens']} prompt tokens",
        ],
        ["prefill", f"{document['prefill_tok_s']:.0f} tok/s", ""],
        ["decode", f"{document['decode_tok_s']:.1f} tok/s", f"batch 1, {facts['new_tokens']} tokens"],
    ]
    rows += [
        [f"batch {batch}", f"{speed:.1f} tok/s", "new tokens of all requests, prefill included"]
        for batch, speed in document["aggregate"].items()
    ]
    rows += [["load", f"{document['load_s']:.2f} s", ""]]
    rows += [["held", size(held), f"rank {rank}"] for rank, held in enumerate(document["bytes_per_rank"])]
    lines += columns(rows, "lr", indent=0)
    read = max(plan["roofline"]["weight_bytes_per_token"])
    moved = read * document["decode_tok_s"] / 1e9
    lines += [
        "",
        f"floor     decode reads {size(read)} of weights a token a rank: {moved:.1f} GB/s at this speed",
        "          figures of this machine in this minute: compare only within one run",
        f"results   {facts['path']}",
    ]
    return "\n".join(lines)


def bench_markdown(document: dict[str, Any], facts: dict[str, Any]) -> str:
    """The same as a table to paste into an issue."""
    lines = ["| figure | value |", "|---|---|"]
    lines += [f"| {name} | {document[name]:.4g} |" for name in ("ttft_s", "prefill_tok_s", "decode_tok_s", "load_s")]
    lines += [f"| aggregate, batch {b} | {v:.4g} tok/s |" for b, v in document["aggregate"].items()]
    lines += [f"| bytes, rank {r} | {b} |" for r, b in enumerate(document["bytes_per_rank"])]
    return "\n".join(lines)
