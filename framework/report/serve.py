"""What `job=serve` shows."""

from __future__ import annotations

from typing import Any

from framework.report.text import count, heading, size


def first_line(plan: dict[str, Any], replicas: int) -> str:
    """What was understood."""
    runtime = plan["runtime"]
    total = len(plan["ranks"])
    ranks = f"{total} rank{'s' if total > 1 else ''} on {runtime['device']}"
    many = f"{replicas} replicas of {ranks}" if replicas > 1 else ranks
    return heading("serve", plan["recipe"], plan["tier"], plan["tp_size"], many, runtime["dtype"])[0]


def ready_line(seconds: float, plan: dict[str, Any], replicas: int) -> str:
    """Ranks are up and loaded."""
    held = max(rank["weights_bytes"] for rank in plan["ranks"])
    pages, each = plan["runtime"]["cache_pages"], " each" if replicas > 1 else ""
    cache = f"   cache {count(pages * 128)} tokens{each}" if pages else ""
    return f"ready     {seconds:.1f} s   weights {size(held)} a rank{cache}"


def serving_line(host: str, port: int, model_id: str) -> str:
    """Where to ask, and for what."""
    shown = f"[{host}]" if ":" in host else host
    return f"serving   http://{shown}:{port}/v1   model id {model_id}   Ctrl-C ends it"
