"""What can be checked and planned, but not run yet: asked by the jobs that load weights."""

from __future__ import annotations

from framework.capability.storage import STORAGE
from framework.errors import Problem, Refused
from framework.formats.registry import can_run
from framework.planning.check import Checked

SCHEMES = frozenset(STORAGE)


def require_runnable(checked: Checked) -> None:
    """Refuse what has no running half.

    Raises:
        Refused: the check's problems; `not-yet`, all that is missing to run it.
    """
    if checked.problems:
        raise Refused(checked.problems)
    missing = []
    formats = [part.format for part in checked.model.parts if not can_run(part.format)]
    if formats:
        missing.append(f"weights of format {', '.join(dict.fromkeys(formats))}")
    schemes = {placed.assigned.scheme for placed in checked.placed} - SCHEMES
    if schemes:
        missing.append(f"scheme {', '.join(sorted(schemes))}")
    if missing:
        raise Refused(
            Problem(
                "not-yet",
                f"this recipe checks and plans, but cannot be run yet: {'; '.join(missing)}",
                checked.recipe.name,
                "what is described can be checked and planned before it can be run",
                "job=check   or   job=plan",
            )
        )
