"""Where conf/ and recipes/ lie, and which file a recipe's name means."""

from __future__ import annotations

import os
from pathlib import Path

from framework.errors import InputError, Problem, nearest
from framework.recipe.yaml_file import shown

_PACKAGE = Path(__file__).resolve().parent.parent


def conf_dir() -> Path:
    """Return the folder of the config groups: in the installed package, or beside it in a checkout."""
    return _data("conf")


def recipes_dir() -> Path:
    """Return the folder of the shipped recipes."""
    return _data("recipes")


def shipped_recipes() -> list[str]:
    """Return the names of all shipped recipes, sorted."""
    root = recipes_dir()
    return sorted(str(path.relative_to(root).with_suffix("").as_posix()) for path in root.rglob("*.yaml"))


def find_recipe(given: str) -> Path:
    """Return the file that `recipe=` means: a shipped name, or a path, both with or without `.yaml`.

    Raises:
        InputError: `recipe-not-found`, with the nearest names.
    """
    bare = given.removesuffix(".yaml")
    inside = recipes_dir() / f"{bare}.yaml"
    outside = [Path(given).expanduser(), Path(f"{given}.yaml").expanduser()]
    candidates = [*outside, inside] if given.endswith((".yaml", ".yml")) else [inside, *outside]
    if Path(bare).is_absolute() or bare.startswith(("./", "../", "~")):
        candidates.remove(inside)
    for path in candidates:
        if path.is_file():
            # not resolve(): the paths of a recipe belong beside its link, not beside the link's target
            return Path(os.path.abspath(path))  # noqa: PTH100
    known = shipped_recipes()
    near = nearest(bare, known, count=3, cutoff=0.5)
    raise InputError(
        Problem(
            "recipe-not-found",
            f"there is no recipe {given}",
            "command line  recipe",
            f"neither a file below {Path.cwd()} nor one of the shipped recipes: {', '.join(known)}",
            "   or   ".join(f"recipe={name}" for name in near) or "recipe=PATH.yaml",
        )
    )


def recipe_name(path: Path) -> str:
    """Return what `recipe=` takes to name a file again."""
    path = path.absolute()
    try:
        return str(path.relative_to(recipes_dir()).with_suffix("").as_posix())
    except ValueError:
        return shown(path).removesuffix(".yaml")


def _data(name: str) -> Path:
    installed = _PACKAGE / "_data" / name
    return installed if installed.is_dir() else _PACKAGE.parent / name
