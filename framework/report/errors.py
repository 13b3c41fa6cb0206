"""How problems look: code, what, where, why, what would work. 100 columns; commands are never wrapped."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from framework.errors import Problem
from framework.recipe.secrets import mask_secrets

COLUMNS = 100
_INDENT = " " * 9


def format_problems(problems: Iterable[Problem], *, colour: bool = False) -> str:
    """Write problems as text, a blank line between them; secrets are masked."""
    return "\n".join(_one(problem, colour=colour) for problem in problems)


def _one(problem: Problem, *, colour: bool) -> str:
    code = f"error[{problem.code}]"
    head = f"\033[31m{code}\033[0m" if colour else code
    first, *more = _wrap(mask_secrets(problem.what), COLUMNS - len(code) - 2)
    lines = [f"{head}  {first}", *(_INDENT + text for text in more)]
    for name, text, wraps in (
        ("where", problem.where, False),
        ("why", problem.why, True),
        ("fix", problem.fix, False),
    ):
        if text:
            parts = [p for line in mask_secrets(text).splitlines() for p in (_wrap(line, 91) if wraps else _ways(line))]
            lines.append(f"  {name:<5}  {parts[0]}")
            lines += [_INDENT + part for part in parts[1:]]
    return "\n".join(lines) + "\n"


def _ways(text: str) -> list[str]:
    """Ways out that do not fit on one line, each on its own."""
    if len(text) <= COLUMNS - len(_INDENT):
        return [text]
    first, *others = text.split("   or   ")
    return [first, *(f"or  {other}" for other in others)]


def _wrap(text: str, width: int) -> list[str]:
    if len(text) <= width:
        return [text]
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or [""]
