"""job=verify of a diffusion pipeline: final latents and pictures against a reference file or another recipe."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framework.errors import InputError, Problem, Refused
from framework.families.calls import CALLS
from framework.families.pipeline import Pipeline, describe_pipeline
from framework.jobs import run_dir
from framework.jobs.common import (
    emit,
    emit_json,
    is_given,
    open_checked,
    options,
    other_recipe,
    require_reference,
    resolve_device,
)
from framework.jobs.drawing import WORDS, Output, arguments_of, drawers
from framework.jobs.log import note
from framework.jobs.reference import read_arrays
from framework.planning.axes import axes
from framework.planning.make import make_plan
from framework.planning.plan import Plan
from framework.planning.runnable import require_runnable
from framework.recipe.schema import JobOptions, Recipe
from framework.report.progress import step_progress
from framework.report.verify_drawing import drawing_markdown, drawing_text

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, Any]

DEFAULT_TOLERANCE = {"float32": 1e-3}  # of the largest absolute latent of the reference; else 5e-2
# the names of what is compared, and of arguments of the pipeline's call, in reference files
COMPARED = {"latents": ("final_latents", "final_latents_packed"), "frames": ("frames", "images")}
NOISE = ("initial_latents", "initial_latents_packed")
# what is drawn where neither a reference nor the recipe says it
PROMPT, LABELS = "a red boat on a lake at night", (0, 1, 2, 3)


def run(recipe: Recipe) -> int:
    """Verify and report. Returns 0 when latents and pictures hold, else 1.

    Raises:
        InputError: `reference-missing`, `reference-file`, `reference-key`, `reference-mismatch`; wrong settings.
    """
    start = time.perf_counter()
    chosen = options(recipe)
    require_reference(chosen)
    given = read_arrays(Path(chosen["reference"])) if chosen["reference"] else {}
    reference = {} if chosen["against"] else _reference(Path(chosen["reference"]), given)
    plan, output, notes = _planned(recipe, given)
    run = run_dir.create(recipe, plan)
    for said in notes:
        note(f"note      {said}")
    ours = _drawn(recipe, plan, output)
    if chosen["against"]:
        other = other_recipe(str(chosen["against"]))
        other = replace(other, job=JobOptions("verify", chosen))
        reference = _drawn(other, *_planned(other, given)[:2])
    document = _compared(recipe, ours, reference)
    run.write_json("verify.json", document)
    run.write_json("metrics.json", {"total_s": time.perf_counter() - start, "ok": document["ok"]})
    against = str(chosen["reference"] or chosen["against"])
    match chosen["format"]:
        case "json":
            emit_json(document)
        case "markdown":
            emit(drawing_markdown(document))
        case _:
            emit(drawing_text(document, plan.to_json(), str(plan.layout), against))
            emit(f"results   {run.path / 'verify.json'}")
    return 0 if document["ok"] else 1


def _planned(recipe: Recipe, given: Mapping[str, Any]) -> tuple[Plan, Output, tuple[str, ...]]:
    """Return the plan of a recipe, the output to draw by the reference's settings, and what was changed of them."""
    checked = open_checked(recipe)
    require_runnable(checked)
    pipeline = describe_pipeline(checked.root)
    words, more = _settings(recipe, pipeline, given)
    drawing = replace(recipe, job=JobOptions("render", {**options(recipe), **words}))
    if problems := axes(drawing, checked.model):  # guidance is known now
        raise Refused(problems)
    arguments, notes = arguments_of(pipeline, words)
    seed = int(given["seed"]) if "seed" in given and not is_given(recipe, "runtime.seed") else recipe.runtime.seed
    plan = make_plan(checked, resolve_device(recipe))
    return plan, Output({**arguments, **more}, seed), notes


def _settings(recipe: Recipe, pipeline: Pipeline, given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return settings in a recipe's words: the job's, else the reference's; and other arguments of the call."""
    import torch

    call = CALLS.get(pipeline.class_name)
    words = {word: options(recipe)[word] for word in WORDS}
    names = {argument: word for word, argument in call.words.items()} if call else {}
    names["labels"] = "labels"
    for name, word in names.items():
        if name in given and words.get(word) in (None, (), []):
            words[word] = given[name].tolist()
    more = {"max_sequence_length": int(given["max_sequence_length"])} if "max_sequence_length" in given else {}
    noise = [given[name] for name in NOISE if name in given]
    if noise and pipeline.class_name != "DiTPipeline":  # whose call takes none: it draws them from the seed
        more["latents"] = torch.from_numpy(noise[0])
    if words["prompts"] or "prompts" not in names.values():
        words["labels"] = words["labels"] or (LABELS if "labels" in (call.words if call else ()) else ())
    else:
        embeddings = {name: torch.from_numpy(array) for name, array in given.items() if "prompt_embeds" in name}
        more |= embeddings
        words["prompts"] = () if embeddings else (PROMPT,)
    return words, more


def _drawn(recipe: Recipe, plan: Plan, output: Output) -> dict[str, Array]:
    """Return the latents and pictures [.., H, W, 3] of 0 to 1 that a plan draws."""
    with drawers(recipe, plan, [output]) as (session, (ready,), _), step_progress("denoise") as report:
        for event in session.stream("render", [(ready.arguments, ready.seed)], True):
            if "step" in event:
                report(event["step"], event["steps"])
            else:
                drawn = event
    return drawn


def _reference(path: Path, given: Mapping[str, Any]) -> dict[str, Array]:
    found = {what: given[name] for what, names in COMPARED.items() for name in reversed(names) if name in given}
    if not found:
        raise InputError(
            Problem(
                "reference-key",
                "the reference holds no final latents and no pictures",
                str(path),
                f"it holds {', '.join(sorted(given)[:12])}",
                f"arrays named {', '.join(name for names in COMPARED.values() for name in names)}",
            )
        )
    return found


def _compared(recipe: Recipe, ours: Mapping[str, Array], reference: Mapping[str, Array]) -> dict[str, Any]:
    """Return CLI.md's document."""
    chosen = options(recipe)
    metric, tolerance = chosen["metric"], chosen["tolerance"]
    if tolerance is None:
        scale = float(abs(reference["latents"]).max()) if metric == "max_abs" and "latents" in reference else 1.0
        tolerance = DEFAULT_TOLERANCE.get(recipe.runtime.dtype, 5e-2) * scale
    document: dict[str, Any] = {"ok": True, "metric": metric, "tolerance": float(tolerance)}
    if "latents" in reference:
        max_abs, rel_l2, _ = apart(ours["latents"], reference["latents"], "latents")
        document["latents"] = {"max_abs": max_abs, "rel_l2": rel_l2}
        document["ok"] &= document["latents"][metric] <= tolerance
    if "frames" in reference:
        max_abs, _, psnr = apart(ours["frames"], reference["frames"], "frames")
        document["frames"] = {"max_abs": max_abs, "psnr_db": psnr, "tolerance": float(chosen["frames_tolerance"])}
        document["ok"] &= max_abs <= chosen["frames_tolerance"]
    return document


def apart(ours: Array, reference: Array, what: str) -> tuple[float, float, float]:
    """Return the largest distance, the relative L2 distance and the PSNR in dB of a peak of 1 (200: equal).

    What is not finite is as far as can be.
    """
    import numpy as np

    if ours.size != reference.size:
        raise InputError(
            Problem(
                "reference-mismatch",
                f"the reference has {what} of shape {list(reference.shape)}, the pipeline {list(ours.shape)}",
                "job.reference",
                "they are of different settings",
                "a reference of this pipeline, with its settings beside it",
            )
        )
    a, b = ours.astype(np.float64).ravel(), reference.astype(np.float64).ravel()
    if not np.isfinite(a).all():
        return sys.float_info.max, sys.float_info.max, 0.0
    mean = float(np.square(a - b).mean())
    distance = float(np.linalg.norm(a - b) / max(np.linalg.norm(b), 1e-300))
    return float(np.abs(a - b).max()), distance, float(-10 * np.log10(max(mean, 1e-20)))
