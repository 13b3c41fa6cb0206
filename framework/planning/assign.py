"""Which scheme each module gets: the recipe's ordered patterns over what the file holds. First match wins."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fnmatch import translate

from framework.checkpoint.index import Index
from framework.errors import Problem, nearest
from framework.formats.base import Layout
from framework.geometry import Kind, Module


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of `quantization.layers`, with the place it was written at."""

    pattern: str
    scheme: str
    where: str


@dataclass(frozen=True, slots=True)
class Assigned:
    """A module's scheme and the rule that gave it (None: no rule matched, the file decides)."""

    module: Module
    scheme: str
    rule: Rule | None


def assign(
    modules: Sequence[Module], rules: Sequence[Rule], layout: Layout, index: Index
) -> tuple[list[Assigned], list[Problem]]:
    """Give every module a scheme; norms and embeddings are always float.

    Problems: `pattern-syntax`, `pattern-unmatched`, `pattern-shadowed`, `scheme-mismatch`.
    """
    problems: list[Problem] = []
    matchers = []
    for given in rules:
        try:
            matchers.append((given, compile_pattern(given.pattern)))
        except re.error as error:
            problems.append(
                Problem("pattern-syntax", f"{given.pattern} is not a regular expression: {error}", given.where)
            )
    used: set[Rule] = set()
    assigned = []
    mismatches: dict[tuple[Rule, tuple[str, ...]], list[str]] = {}
    for module in modules:
        rule: Rule | None = next((r for r, matches in matchers if matches(module.name)), None)
        if rule is not None:
            used.add(rule)
        if module.kind is not Kind.LINEAR:
            assigned.append(Assigned(module, "float", rule))
            continue
        served = layout.schemes_of(module, index)
        scheme = served[0] if rule is None or rule.scheme == "auto" else rule.scheme
        if rule is not None and scheme not in served:
            mismatches.setdefault((rule, served), []).append(module.name)
            scheme = served[0]
        assigned.append(Assigned(module, scheme, rule))
    for (wrong, served), names in mismatches.items():
        problems.append(_mismatch(wrong, served, names, index))
    for idle, matches in matchers:
        if idle not in used:
            problems.append(_unused(idle, [m.name for m in modules if matches(m.name)], modules))
    return assigned, problems


def compile_pattern(pattern: str) -> Callable[[str], object]:
    """Return a predicate over module names: a glob, or a regular expression after `re:` (whole name).

    Raises:
        re.error: the regular expression cannot be compiled.
    """
    return re.compile(pattern[3:] if pattern.startswith("re:") else translate(pattern)).fullmatch


def _mismatch(rule: Rule, served: tuple[str, ...], names: list[str], index: Index) -> Problem:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return Problem(
        "scheme-mismatch",
        f"the file cannot serve scheme {rule.scheme} for {names[0]}{more}",
        f"{rule.where}  pattern {rule.pattern}",
        f"{index.root.name} holds it in a form that serves: {', '.join(served)}",
        f"scheme: auto   or   scheme: {served[0]}",
    )


def _unused(rule: Rule, matched: list[str], modules: Sequence[Module]) -> Problem:
    if matched:
        return Problem(
            "pattern-shadowed",
            f"pattern {rule.pattern} never decides: earlier patterns match all of its {len(matched)} modules",
            rule.where,
            "the first matching pattern wins",
            "move it up, or delete it",
        )
    names = [m.name for m in modules]
    like = nearest(rule.pattern, names, count=3, cutoff=0.3)
    return Problem(
        "pattern-unmatched",
        f"pattern {rule.pattern} matches no module of this model",
        rule.where,
        "patterns address Hugging Face module names, as globs or re:...",
        f"nearest: {', '.join(like)}" if like else f"for example {names[1]}",
    )
