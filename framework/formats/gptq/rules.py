"""GPTQModel's `dynamic`: ordered rules by module name over the width that holds for all; in its AWQ files, too."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache

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
            group=group_of(given["group_size"]) if "group_size" in given else base.group,
            symmetric=given["sym"] if isinstance(given.get("sym"), bool) else base.symmetric,
            order=given["desc_act"] if isinstance(given.get("desc_act"), bool) else base.order,
        )
    return base


def _matches(pattern: str, name: str) -> bool:
    compiled = _compiled(pattern)
    return bool(compiled is not None and compiled.match(name))


@lru_cache(maxsize=512)
def _compiled(pattern: str) -> re.Pattern[str] | None:
    """A pattern without operators is the whole name; others match from its start; None: no expression at all."""
    literal = pattern.replace("\\.", ".")
    if not _OPERATORS & set(literal) and "\\" not in literal:
        return re.compile(re.escape(literal) + r"\Z")
    try:
        return re.compile(pattern)
    except re.error:
        return None


def broken(dynamic: object) -> list[str]:
    """Return the patterns that are no regular expressions."""
    if not isinstance(dynamic, Mapping):
        return []
    texts = [str(pattern) for pattern in dynamic]
    return [text for text in texts if _compiled(text[2:] if text[:2] in ("-:", "+:") else text) is None]
