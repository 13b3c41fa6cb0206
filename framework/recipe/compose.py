"""From overrides to a typed Recipe, without touching Hydra's global state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import yaml
from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from framework.errors import InputError, Problem, nearest
from framework.recipe.config_source import register
from framework.recipe.fields import Scalar, build, field_of, keys_below, read, with_defaults
from framework.recipe.job_options import JOBS, KIND_OF_JOB, WITHOUT_RECIPE
from framework.recipe.locate import conf_dir, find_recipe, recipe_name, recipes_dir
from framework.recipe.overrides import PROGRAM, prepare
from framework.recipe.schema import GROUPS, MISSING, SECTIONS, Chip, Hardware, JobOptions, Recipe
from framework.recipe.yaml_file import RecipeFile, anchor, read_recipe_file, shown

__all__ = ["compose", "conf_dir", "recipes_dir", "to_recipe"]


def compose(overrides: Sequence[str], *, program: str = PROGRAM) -> Recipe:
    """Compose a recipe as the command line would.

    Args:
        overrides: `recipe=NAME|PATH`, `job=JOB`, `key=value`, as typed (values quoted as Hydra wants them).
        program: how a corrected command begins.

    Raises:
        InputError: everything that is wrong with the overrides, or with the recipe.
    """
    ready = prepare(overrides, program=program)
    version.setbase("1.3")
    register()
    loader = ConfigLoaderImpl(create_config_search_path(str(conf_dir())))
    config = loader.load_configuration("config", ready, run_mode=RunMode.RUN)
    choice = config.hydra.runtime.choices.get("recipe")
    with open_dict(config):
        del config["hydra"]
    return to_recipe(config, choice, [text for text in ready if not text.startswith("hydra")])


def to_recipe(config: DictConfig, choice: str | None, overrides: Sequence[str]) -> Recipe:
    """Turn what Hydra composed (without its `hydra` node) into a Recipe.

    Args:
        config: the composed config.
        choice: the option of the group `recipe`.
        overrides: the overrides that were composed.

    Raises:
        InputError: `missing-key` (all of them), `wrong-type`, `unknown-value`, `job-kind`, `interpolation`.
    """
    file = read_recipe_file(find_recipe(choice)) if choice else None
    try:
        data: Any = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", "") or "")
        raise InputError(Problem("interpolation", str(error).splitlines()[0], key)) from error
    job = data["job"].pop("name")
    origins = _origins(data, job, file, overrides)
    data = _checked(data, job, origins)
    _complete(data, job, file, origins)
    sections = {name: build(cls, data[name]) for name, cls in SECTIONS.items()}
    sections["hardware"] = _of_chip(sections["hardware"], origins)
    resolved = {**data, "hardware": asdict(sections["hardware"]), "job": {"name": job, **data["job"]}}
    return Recipe(
        name=recipe_name(file.path) if file else "",
        **sections,
        job=JobOptions(job, data["job"]),
        origins=origins,
        overrides=tuple(overrides),
        resolved={key: _plain(resolved[key]) for key in (*SECTIONS, "job")},
    )


def _checked(data: dict[str, Any], job: str, origins: Mapping[str, str]) -> dict[str, Any]:
    """Check all values again, now that references are resolved; make local paths absolute."""
    found: list[Any] = []
    checked = {name: read(cls, _tree(data[name]), name, {}, found) for name, cls in SECTIONS.items()}
    checked["job"] = read(JOBS[job], _tree(data["job"]), "job", {}, found)
    if found:
        raise InputError(
            Problem(m.kind, f"`{m.key}` cannot be {m.text}", f"{origins.get(m.key, 'default')}  {m.key}",
                    f"it takes {m.expected}") for m in found
        )  # fmt: skip
    for name, cls in SECTIONS.items():
        checked[name] = with_defaults(cls, checked[name])
    for name, cls in (*SECTIONS.items(), ("job", JOBS[job])):
        for key in keys_below(cls):
            kind = field_of(cls, key)
            holder = checked[name]
            *above, last = key.split(".")
            for part in above:
                holder = holder.get(part) if isinstance(holder, dict) else None
            if kind and kind[1].get("path") and isinstance(holder, dict):
                holder[last] = anchor(holder[last], Path.cwd())
    return checked


def _place_of(key: str, file: RecipeFile, origins: dict[str, str]) -> str:
    place = origins.get(key, "default")
    return shown(file.path) if place == "default" else place


def _complete(data: dict[str, Any], job: str, file: RecipeFile | None, origins: dict[str, str]) -> None:
    """Refuse what is still missing, all at once, and a job for another kind of model."""
    missing = [key for key, value in _leaves(data) if value == MISSING]
    if missing and job not in WITHOUT_RECIPE:
        raise InputError(
            Problem(
                "missing-key",
                f"the recipe leaves {', '.join(missing)} open" if len(missing) > 1 else f"`{missing[0]}` is missing",
                _place_of(missing[0], file, origins) if file else "command line",
                f"{recipe_name(file.path)} leaves it open" if file else "",
                " ".join(f"{key}=..." for key in missing),
            )
        )
    for key in missing:
        section, last = key.split(".", 1)
        data[section][last] = ""
    kind = data["model"]["kind"]
    if file and KIND_OF_JOB.get(job, kind) != kind:
        raise InputError(
            Problem("job-kind", f"job {job} is for {KIND_OF_JOB[job]} models, this recipe is of kind {kind}",
                    f"{origins.get('job.name', 'default')}  job", fix="job=check   or another recipe")
        )  # fmt: skip


def _of_chip(hardware: Hardware, origins: Mapping[str, str]) -> Hardware:
    """Fill in the figures of the chosen chip where the recipe gives none."""
    text = (conf_dir() / "chips" / f"{hardware.name}.yaml").read_text(encoding="utf-8")
    known = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    if f"Ascend{hardware.variant}" in known:
        hardware = replace(hardware, variant=f"Ascend{hardware.variant}")
    if hardware.variant not in known:
        near = nearest(hardware.variant, known)
        raise InputError(
            Problem("unknown-value", f"no figures for the chip {hardware.variant} of tier {hardware.name}",
                    f"{origins.get('hardware.variant', 'default')}  hardware.variant",
                    f"known: {', '.join(known)}", f"hardware.variant={(near or list(known))[0]}")
        )  # fmt: skip
    chip = build(Chip, read(Chip, _tree(known[hardware.variant]), "", {}, []))
    own = {f.name: getattr(hardware, f.name) or getattr(chip, f.name) for f in fields(chip)}
    return replace(hardware, **own)


def _origins(data: dict[str, Any], job: str, file: RecipeFile | None, overrides: Sequence[str]) -> dict[str, str]:
    origins = {key: "default" for key, _ in _leaves(data)}
    origins |= {"job.name": "default", "hardware.name": "default", "cluster.name": "default"}
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    if file:
        chosen = {
            "hardware": data["hardware"].get("name"),
            "cluster": data["cluster"].get("name"),
            "job": job,
        }
        for key, place in file.origins.items():
            section = key.split(".")[0].split("[")[0]
            if section not in GROUPS or file.choices.get(section) == chosen[section]:
                origins[key] = place
                if key in GROUPS:
                    origins[f"{key}.name"] = place
    for override in parsed:
        key = override.key_or_group
        for inner in [k for k in origins if k.startswith((f"{key}.", f"{key}["))]:
            if key not in GROUPS:
                del origins[inner]
        origins[f"{key}.name" if key in GROUPS else key] = "command line"
    return origins


def _leaves(data: Any, prefix: str = "") -> list[tuple[str, Any]]:  # noqa: ANN401
    if not isinstance(data, dict):
        return [(prefix, data)]
    return [leaf for key, value in data.items() for leaf in _leaves(value, f"{prefix}.{key}" if prefix else str(key))]


def _tree(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, dict):
        return {key: _tree(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_tree(item) for item in value]
    return Scalar(value, str(value), bare=False)


def _plain(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
