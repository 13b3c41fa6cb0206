"""Plans of shipped recipes and of small files, with what their picture needs."""

from functools import cache
from pathlib import Path

from framework.jobs.common import open_checked
from framework.planning.make import make_plan
from framework.planning.memory import rank_weights, read_share
from framework.recipe.compose import compose
from framework.report.html import plan_html

TINY = Path(__file__).parents[1] / "golden" / "tiny-qwen3" / "gguf-q4_k_m" / "model.gguf"


@cache
def planned(*overrides):
    checked = open_checked(compose([*overrides, "job=plan"]), headers_only=True)
    return make_plan(checked, "npu"), {use.row: use.status for use in checked.rows}


def tiny(*overrides):
    return planned("recipe=llm/local", f"model.path={TINY}", *overrides)


def page(plan, status, **changed):
    held = zip(*(rank_weights(plan.modules, rank.rank, plan.runtime.dtype) for rank in plan.ranks), strict=True)
    shares = [read_share(module.module, plan.spec) for module in plan.modules]
    return plan_html(plan.to_json() | changed, [list(each) for each in held], shares, status)
