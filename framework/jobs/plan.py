"""job=plan: scheme per layer, shard per rank, bytes per device, roofline. No torch, no Ray, no device."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from framework.collector import uncollected
from framework.errors import InputError, Problem, Refused
from framework.jobs import run_dir
from framework.jobs.common import emit, emit_json, open_checked, options
from framework.planning.draft import draft_plan
from framework.planning.fitting import too_big
from framework.planning.memory import rank_weights, read_share
from framework.planning.plan import Plan
from framework.recipe.schema import Recipe
from framework.recipe.secrets import mask_secrets
from framework.report.against import against_markdown, against_text, difference, read_plan
from framework.report.plan import plan_markdown, plan_text


@uncollected()
def run(recipe: Recipe) -> int:
    """Plan, write plan.json into the run directory, draw it, report it or what differs from another.

    Raises:
        Refused: the check's problems; `memory`.
        InputError: `plan-file`, `html-file`.
    """
    start = time.perf_counter()
    chosen = options(recipe)
    was = read_plan(Path(chosen["against"])) if chosen["against"] else None
    # a plan is made for the recipe's tier, whatever machine makes it; only the reference mode is the CPU's own
    device = recipe.runtime.device
    on_cpu = device == "cpu" or (recipe.runtime.dtype == "float32" and device != "npu")
    checked = open_checked(recipe, headers_only=True)
    plan = draft_plan(checked, "cpu" if on_cpu else "npu")
    document = plan.to_json()
    status = {use.row: use.status for use in checked.rows}
    if chosen["html"]:
        _draw(Path(chosen["html"]), plan, status)
    run = run_dir.create(recipe, plan)
    seconds = time.perf_counter() - start
    path = str(run.path / "plan.json")
    found = None if was is None else difference(was, document)
    match chosen["format"]:
        case "json":
            emit_json(document if found is None else found)
        case "markdown":
            emit(plan_markdown(document) if found is None else against_markdown(found))
        case _ if found is None:
            emit(plan_text(document, {"seconds": seconds, "path": path, "drawn": chosen["html"], "status": status}))
        case _:
            emit(against_text(found, document, (chosen["against"], path)))
    run.write_json("metrics.json", {"plan_s": seconds})
    if problem := too_big(checked, plan):
        raise Refused(problem)  # once the plan is shown: it says where the bytes are
    return 0


def _draw(path: Path, plan: Plan, status: dict[str, str]) -> None:
    """Write the picture; an earlier one stays until this one is whole.

    Raises:
        InputError: `html-file`, it cannot be written there.
    """
    from framework.report.html import plan_html

    by_rank = [rank_weights(plan.modules, rank, plan.runtime.dtype) for rank in range(plan.tp_size)]
    held = [list(of_module) for of_module in zip(*by_rank, strict=True)]
    shares = [read_share(planned.module, plan.spec) for planned in plan.modules]
    page = mask_secrets(plan_html(plan.to_json(), held, shares, status))
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise InputError(
            Problem(
                "html-file",
                f"the plan cannot be drawn into this file: {error.strerror}",
                str(path),
                "" if path.parent.is_dir() else f"there is no folder {path.parent}",
                "job.html=/a/folder/that/exists/plan.html",
            )
        ) from error
