"""What `job=plan job.against=PLAN.json` shows: how this plan differs from an earlier one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from framework.errors import InputError, Problem
from framework.report.fold import FACTS, joined, place, ranges
from framework.report.plan import BYTES, wrapped
from framework.report.text import columns, heading, size

HEADS: dict[str, type] = {"recipe": str, "tier": str, "table": str, "format": str, "checkpoint": str, "tp_size": int}
RANK: dict[str, type] = dict.fromkeys((*BYTES, "load_peak_bytes", "capacity_bytes"), int)
MODULE: dict[str, type] = {"name": str, "scheme": str, "split": str, "shape": list, "shards": list}
_WORDS = {str: "text", int: "whole number", list: "list", dict: "object"}
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
    notes = {
        "gone": [note for note in was["notes"] if note not in now["notes"]],
        "new": [note for note in now["notes"] if note not in was["notes"]],
    }
    found = {
        "facts": {key: [a, b] for key, a, b in facts if a != b},
        "ranks": _ranks(was["ranks"], now["ranks"]),
        "modules": _modules(was["modules"], now["modules"]),
        "notes": notes,
    }
    same = not any((found["facts"], found["ranks"], found["modules"], *notes.values()))
    return {"same": same, **found}


def against_text(document: dict[str, Any], now: dict[str, Any], files: tuple[str, str]) -> str:
    """Render `difference`; `now` is this plan, `files` are the two plan.json."""
    lines = heading("plan", now["recipe"], now["tier"], now["tp_size"], now["format"], "what differs")
    lines += [*(f"{name:10}{file}" for name, file in zip(("was", "now"), files, strict=True)), ""]
    lines += wrapped("facts", (f"{key}  {_was_now(*pair)}" for key, pair in document["facts"].items()))
    rows = []
    for rank in document["ranks"]:
        name = f"rank {rank['rank']}"
        rows += [[name, rank["only"], "", "", "", ""]] if rank["only"] else []
        for key, (was, is_now) in rank["bytes"].items():
            change = f"{'-' if is_now < was else '+'}{size(abs(is_now - was))}"
            rows.append([name, key.removesuffix("_bytes").replace("_", " "), size(was), "->", size(is_now), change])
    lines += [f"{'' if i else 'ranks':10}{line}" for i, line in enumerate(columns(rows, "llrlrr", indent=0))]
    alike: dict[tuple[tuple[str, ...], str], list[str]] = {}
    for module in document["modules"]:
        changes = tuple(f"{key}  {_was_now(*_shown(key, pair))}" for key, pair in module["changes"].items())
        alike.setdefault((changes, ranges(module["layers"])), []).append(module["name"].removeprefix("model."))
    for i, ((changes, layers), names) in enumerate(alike.items()):
        lines += wrapped("" if i else "modules", [joined(names) + (f"   layers {layers}" if layers else "")])
        lines += [f"    {line}" for change in changes for line in wrapped("", [change])]
    notes = document["notes"]
    lines += wrapped("notes", [f"{what}: {note}" for what in ("gone", "new") for note in notes[what]])
    return "\n".join([*lines, *(["no difference"] if document["same"] else [])])


def against_markdown(document: dict[str, Any]) -> str:
    """The same as lists to paste into an issue."""
    lines = [f"- {key}: {_was_now(*pair)}" for key, pair in document["facts"].items()]
    for rank in document["ranks"]:
        pairs = [f"{key} {_was_now(*pair)}" for key, pair in rank["bytes"].items()]
        lines.append(f"- rank {rank['rank']}: {rank['only'] or ', '.join(pairs)}")
    for module in document["modules"]:
        pairs = [f"{key} {_was_now(*_shown(key, pair))}" for key, pair in module["changes"].items()]
        layers = f" (layers {ranges(module['layers'])})" if module["layers"] else ""
        lines.append(f"- `{module['name']}`{layers}: {', '.join(pairs)}")
    lines += [f"- note {what}: {note}" for what in ("gone", "new") for note in document["notes"][what]]
    return "\n".join(lines or ["no difference"])


def _was_now(was: Any, now: Any) -> str:  # noqa: ANN401
    return " -> ".join("none" if value in (None, "") else str(value) for value in (was, now))


def _shown(key: str, pair: list[Any]) -> list[Any]:
    """Shards as those of the first rank that differs, or as how many there are."""
    if key != "shards" or None in pair:
        return pair
    for rank, rects in enumerate(zip(*pair, strict=False)):
        if rects[0] != rects[1]:
            return [f"rank {rank} " * (not i) + "[{}:{}, {}:{}]".format(*rect) for i, rect in enumerate(rects)]
    return [f"{len(shards)} ranks" for shards in pair]


def _fault(data: Any) -> str:  # noqa: ANN401
    """The first thing that a plan has and this has not; empty: none."""

    def faults() -> Iterator[str]:
        yield from _lacks("", data, HEADS | {"runtime": dict, "ranks": list, "modules": list, "notes": list})
        for name, keys in (("ranks", RANK), ("modules", MODULE)):
            for i, entry in enumerate(data[name]):
                yield from _lacks(f"{name}[{i}]", entry, keys)
        for entry in data["modules"]:
            if not all(isinstance(rect, list) and len(rect) == 4 for rect in entry["shards"]):
                yield f"the shards of {entry['name']} are not lists of [n0, n1, k0, k1]"

    return next(faults(), "")


def _lacks(where: str, found: Any, keys: Mapping[str, type]) -> Iterator[str]:  # noqa: ANN401
    if not isinstance(found, dict):
        yield f"{where or 'it'} is no JSON object"
        return
    for key, kind in keys.items():
        if not isinstance(found.get(key), kind):
            yield f"{where}{'.' if where else ''}{key} is not there, or is no {_WORDS[kind]}"


def _not_a_plan(path: Path, why: str) -> InputError:
    return InputError(
        Problem(
            "plan-file", "job.against is not a plan", str(path), why, "job.against=FOLDER/plan.json of a job=plan run"
        )
    )


def _ranks(was: list[dict[str, Any]], now: list[dict[str, Any]]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
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
