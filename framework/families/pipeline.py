"""What a diffusers pipeline folder consists of, from its model_index.json."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from framework.checkpoint.safetensors import read_json
from framework.errors import InputError, Problem

INDEX = "model_index.json"
_TRANSFORMER = re.compile(r"transformer(_\d+)?$")


@dataclass(frozen=True, slots=True)
class Component:
    """One part of a pipeline: its name, the library and class that run it, the folder that holds it."""

    name: str
    library: str
    class_name: str
    folder: Path

    @property
    def is_transformer(self) -> bool:
        """Whether this part denoises: the one kind that is planned, sharded and quantized."""
        return bool(_TRANSFORMER.match(self.name))


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A pipeline: its class, the components that are there, and its scalar options (`boundary_ratio`, ...)."""

    class_name: str
    components: tuple[Component, ...]
    options: dict[str, Any]

    @property
    def transformers(self) -> tuple[Component, ...]:
        """The denoisers, in the order of the index; Wan 2.2 has two."""
        return tuple(component for component in self.components if component.is_transformer)


def describe_pipeline(root: Path) -> Pipeline:
    """Return what the pipeline in `root` consists of. Components that the index sets to null are left out.

    Raises:
        InputError: `file-missing`, `file-unreadable`, `file-malformed`; `config-value`, the index is not one.
    """
    index = read_json(root / INDEX)
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), str):
        raise _unusable(root, "it names no pipeline class (_class_name)")
    components, options = [], {}
    for name, value in index.items():
        if name.startswith("_"):
            continue
        # an option can be a list too; a component is a pair of words or of nulls
        if isinstance(value, list) and len(value) == 2 and all(v is None or isinstance(v, str) for v in value):
            if None in value:
                continue
            if not name.isidentifier():
                raise _unusable(root, f"{name} is no name of a component")
            components.append(Component(name, value[0], value[1], root / name))
        else:
            options[name] = value
    if not components:
        raise _unusable(root, "it lists no component")
    return Pipeline(index["_class_name"], tuple(components), options)


def _unusable(root: Path, why: str) -> InputError:
    return InputError(
        Problem("config-value", f"{INDEX} cannot be used: {why}", str(root / INDEX), fix="use the pipeline's own file")
    )
