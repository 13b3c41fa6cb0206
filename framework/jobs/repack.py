"""job=repack: msModelSlim's output for an original Wan model, into the diffusers layout. Needs no recipe."""

from __future__ import annotations

import time
from pathlib import Path

from framework.diffusion.repack import repack
from framework.errors import InputError, Problem
from framework.jobs.common import emit, options
from framework.recipe.schema import Recipe
from framework.report.progress import transfer_progress


def run(recipe: Recipe) -> int:
    """Repack and say what was written.

    Raises:
        InputError: `repack-folders`, a folder that is not named or not there; what `repack` raises.
    """
    start = time.perf_counter()
    chosen = options(recipe)
    problems = []
    for name in ("original", "quantized", "output"):
        given = chosen[name]
        if not given:
            problems.append(
                Problem("repack-folders", f"job.{name} is missing", f"job.{name}", fix=f"job.{name}=/a/folder")
            )
        elif name != "output" and not Path(given).is_dir():
            problems.append(
                Problem("repack-folders", f"job.{name} is no folder", str(given), fix=f"job.{name}=/a/folder")
            )
    if problems:
        raise InputError(problems)
    with transfer_progress() as progress:
        found = repack(Path(chosen["original"]), Path(chosen["quantized"]), Path(chosen["output"]), progress)
    for component, kinds in found.items():
        said = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items(), key=lambda item: -item[1]))
        emit(f"{component:14} {said}")
    output, seconds = chosen["output"], time.perf_counter() - start
    emit(f"repacked  {output}   {seconds:.1f} s     next: model.path={output} job=check")
    return 0
