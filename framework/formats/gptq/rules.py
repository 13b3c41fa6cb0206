"""GPTQModel's `dynamic`: ordered rules by module name over the width that holds for all; in its AWQ files, too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

from framework.errors import Problem
from framework.formats.words import Width, group_of, number

_OPERATORS = set("*+?^$()[]{}|")


def overridden(name: str, base: Width, dynamic: object) -> Width | None:
    """Return the width of one module; None where a rule keeps it float. The first matching rule wins."""
    if not isinstance(dynamic, Mapping):
        return base
    for pattern, values in dynamic.items():
        text = str(pattern)
        if not _matches(text[2:] if text[:2] in ("-:", "+:") else text, name):
            continue
        if text.startswith("-:"):
            return None
        given = values if isinstance(values, Mapping) else {}
        return replace(
            base,
            bits=number(given.get("bits"), base.bits),
            group=group_of(given.get("group_size"), base.group or -1),
            symmetric=given["sym"] if isinstance(given.get("sym"), bool) else base.symmetric,
            order=given["desc_act"] if isinstance(given.get("desc_act"), bool) else base.order,
        )
    return base


def rules_for(widths: Mapping[str, Width | None], bits: int) -> dict[str, dict[str, int]]:
    """Return the rules of modules (by name, `*` for the experts' numbers) that have other than `bits`."""
    return {
        name.replace(".", r"\.").replace("*", r"\d+"): {"bits": width.bits}
        for name, width in widths.items()
        if width and width.bits != bits
    }


def _matches(pattern: str, name: str) -> bool:
    compiled = _compiled(pattern)
    return bool(compiled is not None and compiled.match(name))


def _compiled(pattern: str) -> re.Pattern[str] | None:
    """A pattern without operators is the whole name; others match from its start; None: no expression at all."""
    literal = pattern.replace("\\.", ".")
    if not _OPERATORS & set(literal) and "\\" not in literal:
        return expression(re.escape(literal) + r"\Z")
    return expression(pattern)


@lru_cache(maxsize=512)
def expression(pattern: str) -> re.Pattern[str] | None:
    """Return a compiled regular expression, None if it is none."""
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError):
        return None


def broken(rules: object, key: str, where: str) -> list[Problem]:
    """Problems `file-malformed`: patterns of `key` that are no regular expressions."""
    texts = [str(pattern) for pattern in rules] if isinstance(rules, Mapping) else []
    return [
        Problem(
            "file-malformed",
            f"the rule {text!r:.80} of {key} is no regular expression",
            where,
            "modules that it means would get the width of all others",
            "use the config that was written with these weights",
        )
        for text in texts
        if _compiled(text[2:] if text[:2] in ("-:", "+:") else text) is None
    ]
