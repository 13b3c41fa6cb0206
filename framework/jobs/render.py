"""job=render: prompts or labels to pictures or video, with results.jsonl."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.errors import InputError, Problem
from framework.jobs import run_dir
from framework.jobs.common import open_checked, options, resolve_device
from framework.jobs.ranks import started
from framework.planning.make import make_plan
from framework.planning.runnable import require_runnable
from framework.recipe.schema import Recipe
from framework.report.pictures import save_grid, save_pictures, save_video
from framework.report.progress import transfer_progress
from framework.report.text import columns, heading, size

LOADER = "framework.diffusion.pipeline:load_pipeline"
# The recipe's words -> arguments of diffusers' pipelines.
ARGUMENTS = {
    "negative_prompt": "negative_prompt",
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "guidance_2": "guidance_scale_2",
    "height": "height",
    "width": "width",
    "frames": "num_frames",
}


@dataclass(frozen=True, slots=True)
class Wanted:
    """One output: what it is of, and its seed."""

    prompt: str | None
    label: int | None
    seed: int


def run(recipe: Recipe) -> int:
    """Render every prompt or label."""
    start = time.perf_counter()
    chosen = options(recipe)
    wanted = outputs(recipe)
    checked = open_checked(recipe)
    require_runnable(checked)
    plan = make_plan(checked, resolve_device(recipe))
    run = run_dir.create(recipe, plan)
    _note(
        "\n".join(
            heading("render", recipe.name, plan.tier, plan.tp_size, f"{plan.runtime.device} {plan.runtime.dtype}")
        )
    )
    rows, pictures = [], []
    with started(recipe, plan, log_dir=run.path, loader=LOADER) as (session, load_s):
        held = session.call("bytes_held")
        takes = session.call("takes")[0]
        settings = {ARGUMENTS[k]: v for k, v in chosen.items() if k in ARGUMENTS and v is not None}
        _known(settings, takes)
        for index, one in enumerate(wanted):
            begin = time.perf_counter()
            given = settings | ({"prompt": one.prompt} if one.label is None else {"class_labels": [one.label]})
            _known(given, takes)
            with transfer_progress() as report:
                for event in session.stream("render", given, one.seed):
                    if "step" in event:
                        report("denoise", event["step"], int(chosen["steps"]))
                    else:
                        frames = event["frames"]
            stem = run.path / f"output-{index:03d}"
            is_video = len(frames) > 1
            files = save_video(frames, stem, int(chosen["fps"])) if is_video else save_pictures(frames, stem)
            pictures += [] if is_video else [frames[0]]
            names = [file.name for file in files]
            run.append_line(
                "results.jsonl",
                {"index": index, "prompt": one.prompt, "label": one.label, "seed": one.seed, "files": names},
            )
            rows.append([str(index), str(one.seed), f"{time.perf_counter() - begin:.1f} s", names[0]])
    if len(pictures) > 1:
        save_grid(pictures, run.path / "grid.png")
    total_s = time.perf_counter() - start
    run.write_json(
        "metrics.json", {"load_s": load_s, "total_s": total_s, "outputs": len(wanted), "bytes_per_rank": held}
    )
    _note("\n".join(columns([["output", "seed", "time", "file"], *rows], "rrrl", indent=0)))
    _note(f"done      {len(wanted)} outputs, {total_s:.1f} s in all, {size(max(held))} of transformers a rank")
    _note(f"results   {run.path}")
    return 0


def outputs(recipe: Recipe) -> list[Wanted]:
    """Return what is asked for, in order.

    Raises:
        InputError: `prompts-missing`, neither prompts nor labels, or both; `prompt-file`, it cannot be read.
    """
    chosen = options(recipe)
    prompts = [*chosen["prompts"], *(_lines(Path(chosen["prompt_file"])) if chosen["prompt_file"] else [])]
    labels = list(chosen["labels"])
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


def _known(settings: dict[str, Any], takes: list[str]) -> None:
    """Refuse what the pipeline's call does not have.

    Raises:
        InputError: `setting-unknown`.
    """
    unknown = [name for name in settings if name not in takes]
    if unknown:
        words = {argument: word for word, argument in ARGUMENTS.items()}
        words |= {"prompt": "prompts", "class_labels": "labels"}
        raise InputError(
            Problem(
                "setting-unknown",
                f"this pipeline takes no {', '.join(words[name] for name in unknown)}",
                f"job.{words[unknown[0]]}",
                f"it takes {', '.join(words[name] for name in takes if name in words)}",
            )
        )


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201
