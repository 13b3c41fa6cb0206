"""What `job=generate` shows around the generated text."""

from __future__ import annotations

from typing import Any

from framework.report.text import columns, count, heading, size


def first_line(plan: dict[str, Any]) -> str:
    """What was understood."""
    runtime = plan["runtime"]
    ranks = f"{plan['tp_size']} rank{'s' if plan['tp_size'] > 1 else ''} on {runtime['device']}"
    return heading("generate", plan["recipe"], plan["tier"], plan["tp_size"], ranks, runtime["dtype"])[0]


def ready_line(load_s: float, held: list[int], plan: dict[str, Any]) -> str:
    """Ranks are up and loaded."""
    cache = plan["runtime"]["cache_pages"] * 128
    return f"ready     {load_s:.1f} s   weights {size(max(held))} a rank   cache {count(cache)} tokens\n"


def closing(results: list[dict[str, Any]], metrics: dict[str, Any], plan: dict[str, Any], path: str) -> str:
    """The short table at the end."""
    rows = [["prompt", "tokens", "ended by", "first token", "tok/s"]]
    for r in results[:8]:
        reason = {"stop": "end of text", "length": "length"}[r["finish_reason"]]
        speed = f"{r['tok_s']:.1f}"
        rows.append([str(r["index"]), str(len(r["token_ids"])), reason, f"{r['ttft_s']:.2f} s", speed])
    lines = ["", *columns(rows, "rrlrr", indent=0)]
    if len(results) > 8:
        lines.append(f"... and {len(results) - 8} more prompts")
    many = len(results)
    held = " + ".join(size(b) for b in metrics["bytes_per_rank"])
    lines += [
        "",
        f"done      {many} prompt{'s' if many > 1 else ''}, {metrics['tokens']} tokens, {metrics['total_s']:.1f} s "
        f"in all, {metrics['aggregate_tok_s']:.1f} tok/s together",
        f"held      {held}" + (f"   (ranks 0 to {plan['tp_size'] - 1})" if plan["tp_size"] > 1 else ""),
    ]
    lines += [f"          {note}" for note in plan["notes"]]
    if plan["runtime"]["device"] == "cpu" and plan["tp_size"] > 1:
        lines.append("          on a CPU tensor parallelism shows that the shards are exact, not speed")
    lines.append(f"results   {path}")
    return "\n".join(lines)
