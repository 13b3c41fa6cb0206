"""job=quantize: a float checkpoint to one in ModelSlim's layout, by the schemes of the recipe's patterns."""

from __future__ import annotations

import time
from pathlib import Path

from framework.errors import InputError, Problem, Refused
from framework.jobs import run_dir
from framework.jobs.common import emit, open_checked, options
from framework.planning.make import make_plan
from framework.recipe.schema import Recipe
from framework.report.progress import transfer_progress
from framework.report.text import GIB


def run(recipe: Recipe) -> int:
    """Quantize and write.

    Raises:
        InputError: `output-missing`, `output-exists`, `output-folder`.
        Refused: the check's problems; `online-off`, the recipe does not ask for online quantization.
    """
    from framework.loading.quantize import write_quantized

    start = time.perf_counter()
    output = options(recipe)["output"]
    if not output:
        raise InputError(
            Problem(
                "output-missing",
                "job=quantize needs a folder to write into",
                "job.output",
                fix="job.output=/a/new/folder",
            )
        )
    if not recipe.quantization.online:
        raise Refused(
            Problem(
                "online-off",
                "the recipe does not ask to quantize",
                recipe.where("quantization.online"),
                "job=quantize writes what quantization.online makes at load",
                "quantization.online=true, and a scheme for a pattern of quantization.layers",
            )
        )
    checked = open_checked(recipe)
    plan = make_plan(checked, "cpu")
    run = run_dir.create(recipe, plan)
    part = checked.model.parts[0]
    with transfer_progress() as progress:
        written = write_quantized(
            part.index,
            part.format,
            plan.modules,
            Path(output),
            lambda done, total: progress("quantize", done, total),
        )
    seconds = time.perf_counter() - start
    run.write_json("metrics.json", {"quantize_s": seconds, "bytes": written})
    emit(f"quantized  {output}   {written / GIB:.2f} GiB in {seconds:.1f} s     next: model.path={output} job=check")
    return 0
