"""JSON Schema (draft-07) of a recipe, made from the dataclasses and the strings below their fields."""

from __future__ import annotations

import ast
import inspect
import sys
import types
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from itertools import pairwise
from typing import Any, Literal, Union, get_args, get_origin

from framework.recipe.fields import is_record, typed_fields
from framework.recipe.job_options import JOBS
from framework.recipe.schema import MISSING, SECTIONS
from framework.recipe.yaml_file import group_names

_TEXT = {
    "hardware": "The tier, by name, or a mapping of `name` and figures that replace the tier's.",
    "cluster": "Where ranks are started, by name, or a mapping of `name` and options.",
    "job": "What is done, by name, or a mapping of `name` and the job's options. Default: generate.",
}


def recipe_schema() -> dict[str, Any]:
    """Return the schema of a recipe file."""
    properties: dict[str, Any] = {}
    for section, cls in SECTIONS.items():
        if section in _TEXT:
            properties[section] = _group(section, dict.fromkeys(group_names(section), cls))
        else:
            properties[section] = _object(cls)
    properties["job"] = _group("job", JOBS)
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "title": "npu-launch recipe",
        "description": "What should run: model, hardware tier, a scheme per layer pattern, ranks.",
        "type": "object",
        "additionalProperties": False,
        "required": ["model"],
        "properties": properties,
    }


def _group(group: str, options: Mapping[str, type]) -> dict[str, Any]:
    """A name, or a mapping with `name`; options of equal type share one branch."""
    branches: list[dict[str, Any]] = [{"type": "string", "enum": list(options)}]
    by_type: dict[type, list[str]] = {}
    for name, cls in options.items():
        by_type.setdefault(cls, []).append(name)
    for cls, names in by_type.items():
        branch = _object(cls)
        own = {"enum": names, "description": f"The {group}."}
        branch["properties"] = {"name": own} | {k: v for k, v in branch["properties"].items() if k != "name"}
        branch["required"] = ["name"]
        branches.append(branch)
    return {"description": _TEXT[group], "anyOf": branches}


def _object(cls: type) -> dict[str, Any]:
    properties = {}
    for f in fields(cls):
        kind, metadata = typed_fields(cls)[f.name]
        schema = _typed(kind, metadata)
        schema["description"] = field_docs(cls)[f.name]
        if f.default not in (MISSING, None) and isinstance(f.default, str | int | float | bool):
            schema["default"] = f.default
        if "examples" in metadata:
            schema["examples"] = list(metadata["examples"])
        properties[f.name] = schema
    required = [f.name for f in fields(cls) if f.default == MISSING and f.name not in ("path", "variant")]
    schema = {"type": "object", "description": inspect.getdoc(cls), "additionalProperties": False}
    return schema | ({"required": required} if required else {}) | {"properties": properties}


def _typed(kind: Any, metadata: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ANN401
    if get_origin(kind) in (Union, types.UnionType):
        parts = [_typed(part, metadata) for part in get_args(kind)]
        if metadata.get("tokens"):
            parts.append({"type": "string", "pattern": "^[0-9]+[kKmM]$"})
        return {"anyOf": parts}
    if get_origin(kind) is Literal:
        return {"type": "string", "enum": list(get_args(kind))}
    if get_origin(kind) is tuple:
        return {"type": "array", "items": _typed(get_args(kind)[0], metadata)}
    if is_record(kind):
        return _object(kind)
    if kind is types.NoneType:
        return {"type": "null"}
    if kind in (str, bool):
        return {"type": {str: "string", bool: "boolean"}[kind]}
    if kind in (int, float):
        bounds = {"minimum": "minimum", "maximum": "maximum", "above": "exclusiveMinimum"}
        limits = {bounds[name]: value for name, value in metadata.items() if name in bounds}
        return {"type": "integer" if kind is int else "number", **limits}
    return {"type": "object", "additionalProperties": _typed(get_args(kind)[1], {})}


def field_docs(cls: type) -> dict[str, str]:
    """Return the string below each field of a dataclass, inherited ones included."""
    found: dict[str, str] = {}
    for one in reversed(cls.__mro__[:-1]):
        found |= _module_docs(one.__module__)[one.__name__]
    return found


@cache
def _module_docs(module: str) -> dict[str, dict[str, str]]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: _class_docs(node.body) for node in tree.body if isinstance(node, ast.ClassDef)}


def _class_docs(body: list[ast.stmt]) -> dict[str, str]:
    docs = {}
    for statement, below in pairwise(body):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            text = below.value.value if isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant) else ""
            docs[statement.target.id] = str(text)
    return docs
