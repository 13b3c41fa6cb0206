"""The run directory: what a run leaves behind, written as it goes, complete once metrics.json is there."""

from __future__ import annotations

import json
import logging
import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from framework.errors import InputError, Problem, Refused
from framework.jobs.log import open_log
from framework.planning.plan import Plan
from framework.recipe.schema import Recipe
from framework.recipe.secrets import mask_secrets

_LOG = logging.getLogger(__name__)

PACKAGES = (
    "npu-launch",
    "torch",
    "torch_npu",
    "ray",
    "hydra-core",
    "omegaconf",
    "tokenizers",
    "transformers",
    "diffusers",
    "gguf",
)


class RunDirectory:
    """One run's folder. Texts pass through `mask_secrets`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, text: str) -> Path:
        """Write a text file.

        Raises:
            Refused: `disk-full` or another failure of the file system.
        """
        target = self.path / name
        try:
            target.write_text(mask_secrets(text), encoding="utf-8")
        except OSError as error:
            raise _unwritable(target, error) from error
        return target

    def write_json(self, name: str, data: Mapping[str, Any]) -> Path:
        """Write a JSON object: an entry a line, of lists of objects an object a line."""
        return self.write(name, _lines(data))

    def append_line(self, name: str, data: Any) -> None:  # noqa: ANN401
        """Append one JSON line, on disk when this returns."""
        target = self.path / name
        try:
            with target.open("a", encoding="utf-8") as file:
                file.write(mask_secrets(json.dumps(data, ensure_ascii=False)) + "\n")
        except OSError as error:
            raise _unwritable(target, error) from error


def create(recipe: Recipe, plan: Plan | None) -> RunDirectory:
    """Make the folder of `run.dir` and write what is known before anything runs.

    Raises:
        InputError: `run-dir`, the folder cannot be made.
    """
    path = _path(recipe)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            Problem(
                "run-dir",
                f"the run directory cannot be made: {error.strerror}",
                str(path),
                recipe.origins.get("run.dir", ""),
                "run.dir=/a/folder/you/can/write",
            )
        ) from error
    for stale in ("metrics.json", "results.jsonl"):
        (path / stale).unlink(missing_ok=True)  # of an earlier run in the same folder
    run = RunDirectory(path)
    # the folder is not part of what is to be repeated: run again, it would write over this run
    again = {**recipe.resolved, "run": {"dir": "auto"}}
    run.write("recipe.yaml", yaml.safe_dump(again, sort_keys=False, allow_unicode=True))
    run.write("overrides.txt", "\n".join(recipe.overrides) + "\n")
    run.write_json("versions.json", versions())
    if plan is not None:
        run.write_json("plan.json", plan.to_json())
    open_log(path / "log.txt")
    _LOG.info("job %s of recipe %s", recipe.job.name, recipe.name)
    return run


def _lines(data: Mapping[str, Any]) -> str:
    # json's own indent gives each number a line, and takes ten times as long
    def text(value: Any) -> str:  # noqa: ANN401
        return json.dumps(value, ensure_ascii=False)

    def entry(value: Any) -> str:  # noqa: ANN401
        apart = isinstance(value, list) and value and isinstance(value[0], Mapping)
        return "[\n  " + ",\n  ".join(map(text, value)) + "\n ]" if apart else text(value)

    return "{\n " + ",\n ".join(f"{text(key)}: {entry(value)}" for key, value in data.items()) + "\n}\n"


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide results."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _path(recipe: Recipe) -> Path:
    asked = recipe.run.dir
    if asked not in (None, "auto"):
        return Path(asked).expanduser().absolute()
    stamp = time.strftime("%Y%m%d-%H%M%S")
    base = Path.cwd() / "runs" / (Path(recipe.name).stem if Path(recipe.name).is_absolute() else recipe.name)
    path, number = base / stamp, 1
    while path.exists():
        number += 1
        path = base / f"{stamp}-{number}"
    return path


def _unwritable(path: Path, error: OSError) -> Refused:
    full = error.errno == 28
    return Refused(
        Problem(
            "disk-full" if full else "run-dir",
            f"{path.name} cannot be written: {error.strerror}",
            str(path),
            fix="free some space, or run.dir=/another/disk" if full else "run.dir=/a/folder/you/can/write",
        )
    )
