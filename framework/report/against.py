"""What `job=plan job.against=PLAN.json` shows: how this plan differs from an earlier one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from framework.errors import InputError, Problem
from framework.report.fold import FACTS, place, ranges, shard
from framework.report.plan import BYTES, MOST, wrapped
from framework.report.text import columns, heading, size, width

HEADS = {"recipe": str, "tier": str, "table": str, "format": str, "checkpoint": str, "tp_size": int}
RANK = dict.fromkeys((*BYTES, "load_peak_bytes", "capacity_bytes"), int)
MODULE = {"name": str, "scheme": str, "split": str, "shape": list, "shards": list}
_COMPARED = ("format", *FACTS, "experts")


def read_plan(path: Path) -> dict[str, Any]:
    """Read a plan.json, as far as it is compared.

    Raises:
        InputError: `plan-file`, it is missing, or not what job=plan writes.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _not_a_plan(path, f"it cannot be read: {error.strerror}") from error
    except ValueError as error:  # of JSON, or of UTF-8
        raise _not_a_plan(path, f"it is not JSON: {error}") from error
    if fault := _fault(data):
        raise _not_a_plan(path, fault)
    return dict(data)


def difference(was: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """Return what differs, each as [was, now]: `facts` by key, `ranks`, `modules` folded over layers, `notes`.

    A rank or module that only one of the plans has differs in `rank` or `name`.
    """
    facts = [(key, was[key], now[key]) for key in HEADS]
    facts += [(f"runtime.{key}", was["runtime"].get(key), value) for key, value in now["runtime"].items()]
    found = {
        "facts": {key: [a, b] for key, a, b in facts if a != b},
        "ranks": _ranks(was["ranks"], now["ranks"]),
        "modules": _modules(was["modules"], now["modules"]),
        "notes": {
            "gone": [note for note in was["notes"] if note not in now["notes"]],
            "new": [note for note in now["notes"] if note not in was["notes"]],
        },
    }
    same = not any((found["facts"], found["ranks"], found["modules"], *found["notes"].values()))
    return {"same": same, **found}


def against_text(document: dict[str, Any], now: dict[str, Any], facts: dict[str, Any]) -> str:
    """Render `difference`. `facts`: against and path, of the two files."""
    lines = heading("plan", now["recipe"], now["tier"], now["tp_size"], now["format"], "what differs")
    lines += [f"was       {facts['against']}", f"now       {facts['path']}", ""]
    lines += wrapped("facts", [f"{key}  {_pair(*pair)}" for key, pair in document["facts"].items()])
    rows = [
        [f"rank {rank['rank']}", name.removesuffix("_bytes").replace("_", " "), size(a), "->", size(b), _change(b - a)]
        for rank in document["ranks"] for name, (a, b) in rank["bytes"].items()
    ]  # fmt: skip
    rows += [[f"rank {r['rank']}", r["only"], "", "", "", ""] for r in document["ranks"] if r["only"]]
    ranks = columns(rows, "llrlrr")
    lines += ["ranks" + ranks[0][5:], *ranks[1:]] if ranks else []
    for i, (changes, names) in enumerate(_by_change(document["modules"]).items()):
        lines += wrapped("" if i else "modules", [", ".join(names)])
        lines += [f"{'':12}{line}" for change in changes for line in _fitting(change)]
    notes = document["notes"]
    lines += wrapped("notes", [*(f"gone: {note}" for note in notes["gone"]), *(f"new: {note}" for note in notes["new"])])
    return "\n".join([*lines, *(["no difference"] if document["same"] else [])])


def _fault(data: Any) -> str:  # noqa: ANN401
    """The first thing that a plan has and this has not; empty: none."""
    if not isinstance(data, dict):
        return "it is no JSON object"
    top = HEADS | {"runtime": dict, "ranks": list, "modules": list, "notes": list}
    checks = [("", data, top)] if _lacks(data, top) else []
    if not checks:
        checks = [(f"ranks[{i}].", rank, RANK) for i, rank in enumerate(data["ranks"])]
        checks += [(f"modules[{i}].", module, MODULE) for i, module in enumerate(data["modules"])]
    for where, found, keys in checks:
        if lacking := _lacks(found, keys):
            return f"{where}{lacking} is not there, or not of type {keys[lacking].__name__}"
    odd = next((m["name"] for m in data["modules"] if not all(map(_is_rect, m["shards"])) or len(m["shape"]) != 2), "")
    return f"shape or shards of {odd} are not [N, K] and [n0, n1, k0, k1]" if odd else ""


def _lacks(found: Any, keys: dict[str, type]) -> str:  # noqa: ANN401
    if not isinstance(found, dict):
        return next(iter(keys))
    return next((key for key, kind in keys.items() if not isinstance(found.get(key), kind)), "")


def _is_rect(shard: Any) -> bool:  # noqa: ANN401
    return isinstance(shard, list) and len(shard) == 4 and all(isinstance(edge, int) for edge in shard)


def _not_a_plan(path: Path, why: str) -> InputError:
    problem = Problem("plan-file", "job.against is not a plan", str(path), why, "job.against=RUN/plan.json of a job=plan")
    return InputError(problem)


def _ranks(was: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for number in range(max(len(was), len(now))):
        if number >= min(len(was), len(now)):
            found.append({"rank": number, "only": "new" if number < len(now) else "gone", "bytes": {}})
            continue
        pairs = {key: [was[number][key], now[number][key]] for key in RANK}
        if changed := {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}:
            found.append({"rank": number, "only": "", "bytes": changed})
    return found


def _modules(was: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    before, after = ({entry["name"]: entry for entry in plan} for plan in (was, now))
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for name in {**after, **before}:
        old, new = before.get(name), after.get(name)
        if old is None or new is None:
            changed: dict[str, Any] = {"name": [old and name, new and name]}
        else:
            pairs = {key: [old.get(key), new.get(key)] for key in _COMPARED}
            changed = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
        if not changed:
            continue
        stack, layer, part = place(name)
        kind = name if layer is None else f"{stack}.*.{part}"
        if "name" in changed:
            changed["name"] = [old and kind, new and kind]
        entry = found.setdefault((kind, str(changed)), {"name": kind, "layers": [], "changes": changed})
        entry["layers"] += [] if layer is None else [layer]
    return list(found.values())
