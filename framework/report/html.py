"""The plan as one HTML file: no script, no network, light and dark, printable. The drawings are inline SVG."""

from __future__ import annotations

from collections import Counter
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from framework.report.fold import Entry, experts, fold, held_as, ranges, shape, shard, split
from framework.report.html_panels import WORDS, cuts, devices, layers, reads, whole_axis
from framework.report.html_svg import fill, fills, hatches
from framework.report.plan import bound, is_weight, planned, runs_by
from framework.report.text import count, size


def plan_html(document: dict[str, Any], held: list[list[int]], shares: list[float], status: dict[str, str]) -> str:
    """Draw plan.json.

    Args:
        document: plan.json's content.
        held: bytes of each module on each rank.
        shares: the share of each module's bytes that a token reads.
        status: of each row of the support table that is in the plan.
    """
    slowest = max(range(document["tp_size"]), key=lambda rank: document["roofline"]["weight_bytes_per_token"][rank])
    read = [round(nbytes[slowest] * share) for nbytes, share in zip(held, shares, strict=True)]
    said = {
        entry["name"]: _said(entry, nbytes, status)
        for entry, nbytes in zip(document["modules"], held, strict=True)
    }  # fmt: skip
    schemes = sorted({entry["scheme"] for entry in document["modules"]})
    environment = Environment(
        loader=PackageLoader("framework.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"size": size, "count": count}
    return environment.get_template("plan.html.j2").render(
        plan=document,
        words=WORDS,
        fits=all(rank["fits"] for rank in document["ranks"]),
        planned=planned,
        fills=fills(schemes),
        hatches=hatches(schemes),
        devices=devices(document),
        capacity=max(rank["capacity_bytes"] for rank in document["ranks"]),
        whole_axis=whole_axis(document["ranks"]),
        layers=layers(document, said),
        legend=_legend(document, status),
        cuts=cuts(document),
        reads=reads(document, read),
        bound=bound(document),
        kinds=_kinds(document, held, status),
    )


def _said(entry: Entry, nbytes: list[int], status: dict[str, str]) -> str:
    """What a cell says when it is pointed at."""
    scheme, row, of_row, _ = runs_by(entry, status)
    lines = [entry["name"], f"{shape(entry)} {split(entry)}"]
    if not is_weight(entry):
        return "\n".join(lines)
    lines += [f"rank 0: {shard(entry)}, {size(nbytes[0])}", f"{row}, {of_row}" if row else scheme]
    return "\n".join([*lines, f"in the file: {held_as(entry)}"] if entry["label"] else lines)


def _legend(document: dict[str, Any], status: dict[str, str]) -> list[dict[str, Any]]:
    """Schemes with what they run by, in the order in which they appear, and how many weights."""
    found: Counter[tuple[str, ...]] = Counter()
    for entry in filter(is_weight, document["modules"]):
        found[runs_by(entry, status)[:3]] += experts(entry)
    return [
        {"fill": fill(scheme), "scheme": scheme, "row": row, "status": of_row, "weights": weights}
        for (scheme, row, of_row), weights in found.items()
    ]


def _kinds(document: dict[str, Any], held: list[list[int]], status: dict[str, str]) -> list[dict[str, Any]]:
    """Rows of the table of modules; `bytes` are those of rank 0 over all layers."""
    nbytes = {entry["name"]: each[0] for entry, each in zip(document["modules"], held, strict=True)}
    rows = []
    for kind in fold(document["modules"]):
        entry = kind.entry
        scheme, row, of_row, op = runs_by(entry, status)
        rows.append(
            {
                "name": f"{kind.stack}.*.{kind.part}" if kind.stack else kind.part,
                "layers": ranges(kind.layers),
                "fill": fill(scheme) if is_weight(entry) else "small",
                "scheme": scheme,
                "row": row,
                "status": of_row,
                "op": op,
                "shape": shape(entry),
                "held": held_as(entry),
                "split": split(entry),
                "shard": shard(entry),
                "bytes": nbytes[entry["name"]] * max(1, len(kind.layers)),
            }
        )
    return rows
