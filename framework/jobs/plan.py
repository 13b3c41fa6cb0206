"""job=plan: scheme per layer, shard per rank, bytes per device, roofline. No torch, no Ray, no device."""

from __future__ import annotations

import time

from framework.errors import Problem, Refused
from framework.jobs import run_dir
from framework.jobs.common import emit, emit_json, open_checked, options
from framework.planning.make import make_plan
from framework.recipe.schema import Recipe
from framework.report.plan import plan_markdown, plan_text


def run(recipe: Recipe) -> int:
    """Plan, write plan.json into the run directory, report.

    Raises:
        Refused: the check's problems; `memory`; `job-option`, an option that is not there yet.
    """
    start = time.perf_counter()
    chosen = options(recipe)
    for name in ("html", "against"):
        if chosen.get(name):
            raise Refused(
                Problem("job-option", f"job.{name} is not there yet", f"job.{name}", fix=f"leave job.{name} out")
            )
    # a plan is made for the recipe's tier, whatever machine makes it; only the reference mode is the CPU's own
    device = recipe.runtime.device
    on_cpu = device == "cpu" or (recipe.runtime.dtype == "float32" and device != "npu")
    plan = make_plan(open_checked(recipe, headers_only=True), "cpu" if on_cpu else "npu")
    run = run_dir.create(recipe, plan)
    document = plan.to_json()
    match chosen["format"]:
        case "json":
            emit_json(document)
        case "markdown":
            emit(plan_markdown(document))
        case _:
            path = str(run.path / "plan.json")
            emit(plan_text(document, {"seconds": time.perf_counter() - start, "path": path}))
    run.write_json("metrics.json", {"plan_s": time.perf_counter() - start})
    return 0
