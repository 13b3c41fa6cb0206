"""What `job=verify` shows."""

from __future__ import annotations

from typing import Any

from framework.report.text import columns, heading


def verify_text(document: dict[str, Any], plan: dict[str, Any], ok: list[bool], against: str, min_top1: float) -> str:
    """Render CLI.md's verify document, prompt by prompt."""
    runtime = plan["runtime"]
    lines = heading(
        "verify", plan["recipe"], plan["tier"], plan["tp_size"], f"{runtime['device']} {runtime['dtype']}",
        f"against {against}",
    )  # fmt: skip
    rows = [["", "tokens", "max |d|", "mean |d|", "rel l2", "cosine", "KL", "top-1", "tolerance", ""]]
    for i, (prompt, holds) in enumerate(zip(document["prompts"], ok, strict=True)):
        same = round(prompt["top1"] * prompt["tokens"])
        rows.append(
            [
                f"prompt {i}",
                str(prompt["tokens"]),
                f"{prompt['max_abs']:.3g}",
                f"{prompt['mean_abs']:.2g}",
                f"{prompt['rel_l2']:.2g}",
                f"{prompt['cosine']:.6f}",
                f"{prompt['kl']:.2g}",
                f"{same}/{prompt['tokens']}",
                f"{document['tolerance']:.3g}",
                "ok" if holds else "no",
            ]
        )
    lines += [*columns(rows, "lrrrrrrrr", indent=0), *_ties(document["prompts"]), ""]
    if "modules" in document:
        lines += [*_modules(document["modules"], 1e-3 if runtime["dtype"] == "float32" else 5e-2), ""]
    metric = document["metric"]
    worst = max(prompt[metric] for prompt in document["prompts"])
    top1 = min(prompt["top1"] for prompt in document["prompts"])
    verdict = "ok" if document["ok"] else "failed"
    lines.append(
        f"{verdict}  worst {metric} {worst:.3g} of {document['tolerance']:.3g} allowed, "
        f"top-1 {100 * top1:.1f} % of {100 * min_top1:.1f} % required"
        + ("" if document["ok"] else "     exit status 1")
    )
    return "\n".join(lines)


def _ties(prompts: list[dict[str, Any]]) -> list[str]:
    """Where a router nearly chose other experts or another group of them, the closest of each prompt."""
    lines = []
    for i, prompt in enumerate(prompts):
        ties = prompt.get("near_ties", [])
        if not ties:
            continue
        turned = [f"{tie['position']} of {tie['layer']}" for tie in prompt.get("turned", ())]
        chosen = f"; held with the other choice at position {', '.join(turned)}" if turned else ""
        closest = ties[0]
        lines.append(
            f"routers   prompt {i}: {len(ties)} near-ties, the closest at position {closest['position']} of "
            f"{closest['layer']}, margin {closest['margin']:.1e}{chosen}"
        )
    return lines


def _modules(modules: list[dict[str, Any]], tolerance: float) -> list[str]:
    first = next((i for i, module in enumerate(modules) if not module["relative"] <= tolerance), None)
    if first is None:
        worst = max(modules, key=lambda module: module["relative"])
        return [
            f"modules   all {len(modules)} within {tolerance:g} of the dequantized fp32 run; "
            f"worst {worst['name']} {worst['relative']:.2g}"
        ]
    before = f" (before it {modules[first - 1]['relative']:.2g})" if first else ""
    return [f"first     {modules[first]['name']}  {modules[first]['relative']:.3g} of {tolerance:g}{before}"]


def verify_markdown(document: dict[str, Any]) -> str:
    """The same as a table to paste into an issue."""
    lines = [
        f"**verify** {'ok' if document['ok'] else 'failed'}, {document['metric']}, "
        f"tolerance {document['tolerance']:.3g}",
        "",
        "| prompt | tokens | max abs | rel l2 | cosine | KL | top-1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for i, p in enumerate(document["prompts"]):
        lines.append(
            f"| {i} | {p['tokens']} | {p['max_abs']:.3g} | {p['rel_l2']:.2g} | {p['cosine']:.6f} | {p['kl']:.2g} "
            f"| {p['top1']:.3f} |"
        )
    return "\n".join(lines)
