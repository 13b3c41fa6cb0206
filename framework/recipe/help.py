"""The text of --help."""

from __future__ import annotations

import inspect

from framework.recipe.job_options import JOBS, WITHOUT_RECIPE
from framework.recipe.locate import shipped_recipes
from framework.recipe.yaml_file import group_names


def help_text(program: str) -> str:
    """Say what the program does, what can be chosen, and where to read on."""
    lines = [
        f"{program} recipe=NAME|PATH.yaml [job=JOB] [key=value ...]",
        "",
        "Checks, plans and runs a quantized model on Ascend NPUs, or on this CPU, from a recipe.",
        "",
        "jobs",
    ]
    for name, cls in JOBS.items():
        alone = "   (needs no recipe)" if name in WITHOUT_RECIPE else ""
        lines.append(f"  job={name:<10}{(inspect.getdoc(cls) or '').splitlines()[0]}{alone}")
    lines += ["", "recipes", *(f"  recipe={name}" for name in shipped_recipes()), "  recipe=PATH.yaml", ""]
    lines += [f"{group:<10}{group}={'|'.join(group_names(group))}" for group in ("hardware", "cluster")]
    lines += [
        "",
        "flags",
        "  -m            sweep: commas in values are runs, one after the other",
        "  --cfg job     show what the recipe has become, run nothing",
        "  --info        show how it was put together (defaults, searchpath, ...)",
        "  --version     show the version",
        "",
        f"All keys, with what they mean: {program} job=schema",
        "Quote values that hold = , # ( ) [ ] { } or letters beyond ASCII:  'model.path=\"/a=b.gguf\"'",
        "Exit status: 0 done and right, 1 refused or failed, 2 wrong input, 70 a bug, 130 interrupted.",
    ]
    return "\n".join(lines) + "\n"
