"""The plan of a recipe, if its ranks fit their devices."""

from __future__ import annotations

from framework.errors import Refused
from framework.planning.check import Checked
from framework.planning.draft import draft_plan
from framework.planning.fitting import too_big
from framework.planning.plan import Plan


def make_plan(checked: Checked, device: str) -> Plan:
    """Return the plan of a recipe that passed its check. `device` is cpu or npu.

    Raises:
        Refused: the check's problems; `memory`, a rank does not fit; `dtype-device`.
    """
    plan = draft_plan(checked, device)
    if problem := too_big(checked, plan):
        raise Refused(problem)
    return plan
