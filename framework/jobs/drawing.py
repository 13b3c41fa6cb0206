"""What jobs that draw share: settings settled before anything loads; text encoders first, then the pipeline."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from framework.cluster.session import Session
from framework.errors import InputError, Problem
from framework.families.calls import TEXT, embedded, settle
from framework.families.pipeline import Pipeline
from framework.jobs.ranks import load, started
from framework.planning.plan import Plan
from framework.recipe.job_options import Drawing
from framework.recipe.schema import Recipe
from framework.report.progress import waiting

LOADER = "framework.diffusion.pipeline:load_pipeline"
ENCODERS = "framework.diffusion.encoding:load_encoders"
WORDS = tuple(f.name for f in fields(Drawing) if f.name != "prompt_file")


@dataclass(frozen=True, slots=True)
class Output:
    """One output: arguments of the pipeline's call (see diffusion.pipeline) and a seed."""

    arguments: Mapping[str, Any]
    seed: int


def arguments_of(pipeline: Pipeline, chosen: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the arguments that all outputs share, and what was changed; prompts and labels are lists.

    Raises:
        InputError: all that `families.calls.settle` finds; `image-file`.
    """
    settled = settle(pipeline, {word: chosen[word] for word in WORDS if word in chosen})
    problems = list(settled.problems)
    arguments = dict(settled.arguments)
    if not problems and pipeline.class_name == "WanImageToVideoPipeline" and "image" not in arguments:
        problems.append(
            Problem("image-file", "this pipeline begins with a picture, and none was given", "job.image",
                    fix="job.image=PICTURE.png")
        )  # fmt: skip
    if "image" in arguments:
        arguments["image"] = _picture(Path(arguments["image"]), problems)
    if problems:
        raise InputError(problems)
    if settled.scheduler:
        arguments["scheduler"] = settled.scheduler
    return arguments, settled.notes


def _picture(path: Path, problems: list[Problem]) -> Any:  # noqa: ANN401
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(path).convert("RGB")
    except (OSError, UnidentifiedImageError) as error:
        problems.append(
            Problem("image-file", f"the picture cannot be read: {error}", str(path), fix="job.image=FILE.png")
        )
        return None


@contextmanager
def drawers(
    recipe: Recipe, plan: Plan, outputs: Sequence[Output], log_dir: Path | None = None
) -> Iterator[tuple[Session, list[Output], float]]:
    """Start ranks, turn prompts to embeddings, load the pipeline; yield the session, outputs without prompts, seconds.

    Equal prompts are encoded once. The text encoders are gone before the transformers are loaded.
    """
    texts = [{name: one.arguments[name] for name in TEXT if name in one.arguments} for one in outputs]
    asked = [text for text in texts if "prompt" in text]
    with started(recipe, plan, log_dir=log_dir, loader=ENCODERS if asked else LOADER) as (session, load_s):
        ready = list(outputs)
        if asked:
            different = [text for i, text in enumerate(asked) if text not in asked[:i]]
            with waiting(f"encoding {len(different)} prompts"):
                made = session.call("encode", different)[0]
            ready = [
                Output(embedded(one.arguments, made[different.index(text)]), one.seed)
                for one, text in zip(outputs, texts, strict=True)
            ]
            load(session, plan, loader=LOADER)
        yield session, ready, load_s
