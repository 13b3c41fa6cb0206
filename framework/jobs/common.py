"""What several jobs begin with: the checkpoint of a recipe, opened and checked; the device; the exit of a check."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from framework.capability.limits import read_limits
from framework.capability.table import read_table
from framework.checkpoint.open import header_bytes
from framework.collector import uncollected
from framework.errors import InputError, Problem, Refused
from framework.jobs.cann import cann_version
from framework.planning.arrange import check_arranged
from framework.planning.assume import assumed_indexes
from framework.planning.check import Capability, Checked
from framework.planning.parts import open_indexes
from framework.recipe.compose import compose, conf_dir
from framework.recipe.overrides import quote
from framework.recipe.schema import Recipe
from framework.recipe.sources import resolve
from framework.report.progress import transfer_progress


@uncollected()
def open_checked(recipe: Recipe, *, headers_only: bool = False) -> Checked:
    """Bring the model here if it is elsewhere, open its headers, check the recipe against them.

    With `headers_only` a recipe's model that is not on this disk is taken as `model.assume` describes it, if given;
    else of what a hub has come headers, configs and other small files alone.

    Raises:
        UserError: the source cannot be had, or the headers cannot be read or understood.
    """
    assume, kind, capability = recipe.model.assume, recipe.model.kind, read_capability(recipe)
    typed = is_typed(recipe, "model.path") and not is_typed(recipe, "model.assume")  # not what the recipe assumes
    if headers_only and assume is not None and not typed and not Path(recipe.model.path).exists():
        return check_arranged(recipe, assumed_indexes(assume, kind), capability)
    with transfer_progress() as progress:
        enough = header_bytes if headers_only else None
        path = resolve(recipe.model.path, sha256=recipe.model.sha256, progress=progress, header_bytes=enough)
    return check_arranged(recipe, open_indexes(Path(path), kind), capability)


def is_typed(recipe: Recipe, key: str) -> bool:
    """Whether a key, or one below it, was given on the command line."""
    below = (origin for name, origin in recipe.origins.items() if name == key or name.startswith(f"{key}."))
    return "command line" in below


def read_capability(recipe: Recipe) -> Capability:
    """Read what a recipe is judged by."""
    table = read_table(conf_dir() / "capability", recipe.capability.table)
    return Capability(table, read_limits(conf_dir() / "ops"), cann_version())


def resolve_device(recipe: Recipe) -> str:
    """Return cpu or npu. `npu` never falls back; `auto` takes NPUs where torch_npu and device nodes are present.

    Raises:
        Refused: `device-absent`.
    """
    asked = recipe.runtime.device
    nodes = list(Path("/dev").glob("davinci[0-9]*"))
    installed = torch_npu_installed()
    if asked == "auto":
        return "npu" if nodes and installed else "cpu"
    if asked == "npu" and not (nodes and installed):
        missing = "torch_npu is not installed" if not installed else "there is no /dev/davinci* here"
        raise Refused(
            Problem(
                "device-absent",
                "this recipe asks for NPUs, none is usable",
                recipe.where("runtime.device"),
                missing,
                "run job=doctor   or   runtime.device=cpu",
            )
        )
    return str(asked)


def torch_npu_installed() -> bool:
    """Whether it could be imported here, also where operators of the CPU hid it (framework/ops/register.py)."""
    return any(finder.find_spec("torch_npu", None) for finder in sys.meta_path)


def command_of(recipe: Recipe) -> str:
    """The command that runs this recipe as it was asked for, without its job."""
    asked = [text for text in recipe.overrides if not text.startswith(("recipe=", "job=", "job."))]
    return " ".join(["python launch.py", *map(shlex.quote, (f"recipe={recipe.name}", *asked))])


def is_given(recipe: Recipe, key: str) -> bool:
    """Whether the recipe or the command line gives a key."""
    return recipe.origins.get(key, "default") != "default"


def other_recipe(name: str) -> Recipe:
    """Compose the recipe that `job.against` names: as it is written, overrides are for the first one.

    Raises:
        InputError: all that is wrong with it.
    """
    try:
        return compose([f"recipe={quote(name)}", "job=verify"])
    except InputError as error:
        ours = "job.against={}: {}".format
        fix = "a recipe file that says it: overrides of this command line are for the first recipe"
        raise InputError(
            [replace(p, what=ours(name, p.what), fix=fix if p.code == "missing-key" else p.fix) for p in error.problems]
        ) from error


def require_reference(chosen: Mapping[str, Any]) -> None:
    """Refuse to verify against nothing.

    Raises:
        InputError: `reference-missing`.
    """
    if not chosen["reference"] and not chosen["against"]:
        raise InputError(
            Problem(
                "reference-missing",
                "there is nothing to verify against",
                "job.reference and job.against are empty",
                fix="job.reference=FILE.npz   or   job.against=RECIPE",
            )
        )


def options(recipe: Recipe) -> Mapping[str, Any]:
    """The job's options."""
    return recipe.job.options


def emit(text: str) -> None:
    """Write a document to standard output."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")
    sys.stdout.flush()


def emit_json(document: Any) -> None:  # noqa: ANN401
    """Write the one JSON document of a job to standard output."""
    emit(json.dumps(document, ensure_ascii=False))
