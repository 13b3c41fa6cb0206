"""job=render: prompts or labels to pictures or video, with results.jsonl."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.errors import InputError, Problem
from framework.families.pipeline import describe_pipeline
from framework.jobs import run_dir
from framework.jobs.common import is_typed, open_checked, options, resolve_device
from framework.jobs.drawing import Output, arguments_of, drawers
from framework.jobs.log import note
from framework.jobs.verify_drawing import apart
from framework.planning.make import make_plan
from framework.planning.plan import Plan
from framework.planning.runnable import require_runnable
from framework.recipe.schema import Recipe
from framework.report.pictures import save_grid, save_pictures, save_video
from framework.report.progress import step_progress
from framework.report.text import columns, heading, size


@dataclass(frozen=True, slots=True)
class Wanted:
    """One output: what it is of, and its seed."""

    prompt: str | None
    label: int | None
    seed: int

    def arguments(self, shared: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of the pipeline's call for this output alone."""
        own = {"prompt": self.prompt} if self.label is None else {"class_labels": [self.label]}
        return {**shared, **own}


def run(recipe: Recipe) -> int:
    """Render every prompt or label."""
    start = time.perf_counter()
    chosen = options(recipe)
    wanted = outputs(recipe)
    checked = open_checked(recipe)
    require_runnable(checked)
    shown = {
        **chosen,
        "prompts": [w.prompt for w in wanted if w.prompt],
        "labels": [w.label for w in wanted if w.label is not None],
    }
    shared, notes = arguments_of(describe_pipeline(checked.root), shown)
    plan = make_plan(checked, resolve_device(recipe))
    run = run_dir.create(recipe, plan)
    device = f"{plan.runtime.device} {plan.runtime.dtype}"
    note("\n".join(heading("render", recipe.name, plan.tier, plan.tp_size, str(plan.layout), device)))
    for said in notes:
        note(f"note      {said}")
    asked = [Output(one.arguments(shared), one.seed) for one in wanted]
    rows: list[list[str]] = []
    pictures: list[Any] = []
    cache: dict[str, Any] = {}
    with drawers(recipe, plan, asked, log_dir=run.path) as (session, ready, load_s):
        held = session.call("bytes_held")
        copies = plan.layout.data_size
        for first in range(0, len(wanted), copies):
            begin = time.perf_counter()
            drawn = _draw(session, ready[first : first + copies], f"{first + 1}/{len(wanted)}")
            seconds = time.perf_counter() - begin
            for index, made in enumerate(drawn, first):
                story = _story(recipe, plan, asked[index], wanted[index], seconds)
                files = _save(made["frames"], run.path / f"output-{index:03d}", story, int(chosen["fps"]))
                pictures += [made["frames"][0]] if len(made["frames"]) == 1 else []
                run.write_json(f"output-{index:03d}.json", story)
                run.append_line("results.jsonl", _result(index, wanted[index], files))
                rows.append([str(index), str(wanted[index].seed), f"{seconds:.1f} s", files[0]])
            if first == 0 and chosen["cache_threshold"]:
                cache = _without_cache(session, ready[0], drawn[0], seconds)
    if len(pictures) > 1:
        save_grid(pictures, run.path / "grid.png")
    total_s = time.perf_counter() - start
    metrics = {"load_s": load_s, "total_s": total_s, "outputs": len(wanted), "bytes_per_rank": held}
    run.write_json("metrics.json", metrics | ({"cache": cache} if cache else {}))
    note("\n".join(columns([["output", "seed", "time", "file"], *rows], "rrrl", indent=0)))
    if cache:
        note(
            f"cache     {cache['reused']} predictions reused; output 0 drawn again without: latents "
            f"{cache['latents_rel_l2']:.2g} apart (relative L2), pictures {cache['psnr_db']:.1f} dB, "
            f"{cache['seconds']:.1f} s for {cache['seconds_without']:.1f} s"
        )
    note(f"done      {len(wanted)} outputs, {total_s:.1f} s in all, {size(max(held))} of transformers a rank")
    note(f"results   {run.path}")
    return 0


def _draw(session: Any, batch: list[Output], which: str) -> list[dict[str, Any]]:  # noqa: ANN401
    """Draw one output on each copy of the model."""
    drawn = []
    with step_progress(f"denoise {which}") as report:
        for event in session.stream("render", [(one.arguments, one.seed) for one in batch]):
            if "step" in event:
                report(event["step"], event["steps"])
            else:
                drawn.append(event)
    return drawn


def _without_cache(session: Any, one: Output, drawn: Mapping[str, Any], seconds: float) -> dict[str, Any]:  # noqa: ANN401
    """Draw an output with every step computed, and say how far off the reused steps took it."""
    plain = Output({name: value for name, value in one.arguments.items() if name != "cache_threshold"}, one.seed)
    begin = time.perf_counter()
    (whole,) = _draw(session, [plain], "without cache")
    _, rel_l2, _ = apart(drawn["latents"], whole["latents"], "latents")
    _, _, psnr = apart(drawn["frames"] / 255.0, whole["frames"] / 255.0, "frames")
    return {
        "reused": int(drawn["reused"]),
        "latents_rel_l2": rel_l2,
        "psnr_db": psnr,
        "seconds": seconds,
        "seconds_without": time.perf_counter() - begin,
    }


def _story(recipe: Recipe, plan: Plan, output: Output, wanted: Wanted, seconds: float) -> dict[str, Any]:
    """Return all that it takes to draw an output again, and how it was drawn."""
    settings = {name: value for name, value in output.arguments.items() if isinstance(value, str | int | float | list)}
    schemes: dict[str, dict[str, int]] = {}
    for planned in plan.modules:
        if planned.module.quantizable:
            part = schemes.setdefault(planned.name.partition(".")[0], {})
            part[planned.scheme] = part.get(planned.scheme, 0) + 1
    return {
        "prompt": wanted.prompt,
        "label": wanted.label,
        "seed": wanted.seed,
        "settings": settings,
        "scheduler": output.arguments.get("scheduler"),
        "model": recipe.model.path,
        "schemes": schemes,
        "layout": str(plan.layout),
        "dtype": plan.runtime.dtype,
        "seconds": round(seconds, 3),
        "versions": run_dir.versions(),
        "recipe": recipe.resolved,
    }


def _save(frames: Any, stem: Path, story: Mapping[str, Any], fps: int) -> list[str]:  # noqa: ANN401
    files, said = save_video(frames, stem, fps, story) if len(frames) > 1 else (save_pictures(frames, stem, story), "")
    if said:
        note(f"note      {said}")
    return [file.name for file in files]


def _result(index: int, wanted: Wanted, files: list[str]) -> dict[str, Any]:
    return {"index": index, "prompt": wanted.prompt, "label": wanted.label, "seed": wanted.seed, "files": files}


def outputs(recipe: Recipe) -> list[Wanted]:
    """Return what is asked for, in order.

    Raises:
        InputError: `prompts-missing`, neither prompts nor labels, or both; `prompt-file`, it cannot be read.
    """
    chosen = options(recipe)
    prompts = [*chosen["prompts"], *(_lines(Path(chosen["prompt_file"])) if chosen["prompt_file"] else [])]
    labels = list(chosen["labels"])
    words_typed = bool(prompts) and (is_typed(recipe, "job.prompts") or is_typed(recipe, "job.prompt_file"))
    if words_typed != (bool(labels) and is_typed(recipe, "job.labels")):
        prompts, labels = (prompts, []) if words_typed else ([], labels)  # what is typed is meant, not the recipe's
    if bool(prompts) == bool(labels):
        raise InputError(
            Problem(
                "prompts-missing",
                "there is nothing to draw" if not prompts else "prompts and labels are both given",
                "job.prompts, job.prompt_file and job.labels",
                fix="job.prompts=['a cat']   or, for a class-conditional model,   job.labels=[3,1,4]",
            )
        )
    things = [(prompt, None) for prompt in prompts] or [(None, label) for label in labels]
    count = int(chosen["num_outputs"])
    seeds = range(recipe.runtime.seed, recipe.runtime.seed + count * len(things))
    spread = [thing for thing in things for _ in range(count)]
    return [Wanted(prompt, label, seed) for (prompt, label), seed in zip(spread, seeds, strict=True)]


def _lines(path: Path) -> list[str]:
    try:
        return [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            Problem(
                "prompt-file", f"the prompt file cannot be read: {error}", str(path), fix="job.prompt_file=FILE.txt"
            )
        ) from error
