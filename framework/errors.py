"""User errors: what is wrong, where, why, and what would work.

    UserError           printed without a traceback
    ├── InputError      exit status 2: input that is wrong, missing or unreadable
    └── Refused         exit status 1: all was read and the answer is no, or a run failed

Anything else that reaches the command line is a bug: traceback, exit status 70.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong, in the words of the person who can mend it.

    `code` is stable (docs/errors.md), the other texts may change.
    """

    code: str
    what: str
    where: str = ""
    why: str = ""
    fix: str = ""


class UserError(Exception):
    """All problems of one stage. Subclasses decide the exit status."""

    exit_status = 1

    def __init__(self, problems: Problem | Iterable[Problem]) -> None:
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        super().__init__(self.problems)

    def __str__(self) -> str:
        return "; ".join(f"{p.code}: {p.what}" for p in self.problems)


class InputError(UserError):
    """What the user gave cannot be read or understood."""

    exit_status = 2


class Refused(UserError):
    """The input was understood and the answer is no, or the run failed."""

    exit_status = 1


def nearest(name: str, known: Iterable[str], *, count: int = 1, cutoff: float = 0.6) -> list[str]:
    """Return the known names that look most like `name`, upper or lower case, best first."""
    folded = {text.casefold(): text for text in known}
    return [folded[text] for text in difflib.get_close_matches(name.casefold(), list(folded), count, cutoff)]
