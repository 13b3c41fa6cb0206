"""Read a recipe file: safe YAML with the line of every key, types checked, nothing but data let through."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from framework.errors import InputError, Problem, nearest
from framework.recipe.fields import PLAIN_REFERENCE, Mismatch, Scalar, field_of, keys_below, read
from framework.recipe.job_options import DEFAULT_JOB, JOBS
from framework.recipe.schema import GROUPS, MISSING, SECTIONS

REFUSED_KEYS = ("hydra", "defaults", "_target_")
MAX_BYTES = 1 << 20
MAX_NODES = 100_000
MAX_DEPTH = 32
_SCALARS = yaml.constructor.SafeConstructor()


@dataclass(frozen=True)
class RecipeFile:
    """One recipe file, checked.

    Attributes:
        values: sections as plain data, without the groups; local paths are absolute.
        choices: option chosen for each group that the file names (job always).
        options: the other keys of each group.
        origins: dotted key to `file:line`.
    """

    path: Path
    values: Mapping[str, Any]
    choices: Mapping[str, str]
    options: Mapping[str, Mapping[str, Any]]
    origins: Mapping[str, str]


def read_recipe_file(path: Path) -> RecipeFile:
    """Read and check a recipe file.

    Raises:
        InputError: all problems of the file: `yaml-syntax`, `unknown-key`, `yaml-type`, `wrong-type`,
            `unknown-value`, `missing-key`, `recipe-key`, `interpolation`, `duplicate-key`.
    """
    state = path.stat()
    return _read_recipe_file(path, str(Path.cwd()), state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=32)
def _read_recipe_file(path: Path, cwd: str, mtime_ns: int, size: int) -> RecipeFile:
    """One composition asks several times; the other arguments tell whether the answer still holds."""
    del cwd, mtime_ns
    walk = _Walk(shown(path))
    tree = walk.document(_text(path, size))
    choices, options, values = {}, {}, {}
    found: list[Mismatch] = []
    for key, node in tree.items():
        if key in GROUPS:
            choices[key], options[key] = _group(key, node, walk)
        elif key in SECTIONS:
            values[key] = read(SECTIONS[key], node, key, {}, found)
        elif key not in REFUSED_KEYS:
            near = nearest(key, [*SECTIONS, "job"])
            found.append(Mismatch(key, "unknown-key", key, ", ".join([*SECTIONS, "job"]), near[0] if near else ""))
    kind = values["model"].get("kind", "llm") if isinstance(values.get("model"), dict) else "llm"
    choices.setdefault("job", DEFAULT_JOB.get(kind, "generate"))
    for group, given in options.items():
        cls = JOBS.get(choices[group]) if group == "job" else SECTIONS[group]
        if cls is not None:
            options[group] = read(cls, given, group, {}, found)
    problems = walk.problems + [_problem(m, walk) for m in found]
    if problems:
        raise InputError(problems)
    folder = path.absolute().parent
    for section, data in values.items():
        _anchor(SECTIONS[section], data, folder)
    for group, data in options.items():
        if group == "job" and choices[group] in JOBS:
            _anchor(JOBS[choices[group]], data, folder)
    return RecipeFile(path, values, choices, options, walk.origins)


def shown(path: Path) -> str:
    """A path as a user would write it: relative where it lies below the working directory."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def anchor(value: Any, folder: Path) -> Any:  # noqa: ANN401
    """Make a local path absolute; sources (`hf://`), references and special words stay."""
    if not isinstance(value, str) or value in ("", "auto", MISSING) or "://" in value or value.startswith("${"):
        return value
    return str((folder / Path(value).expanduser()).absolute())


def _text(path: Path, size: int) -> str:
    try:
        if size > MAX_BYTES:
            problem = Problem("yaml-syntax", "this is no recipe: it is larger than 1 MiB", shown(path))
            raise InputError(problem)
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(Problem("recipe-unreadable", f"the recipe cannot be read: {error}", shown(path))) from error


class _Walk:
    """Turns YAML nodes into dicts, lists and Scalars; remembers lines; collects problems."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.origins: dict[str, str] = {}
        self.problems: list[Problem] = []
        self.nodes = 0

    def document(self, text: str) -> dict[str, Any]:
        try:
            root = yaml.compose(text, Loader=yaml.SafeLoader)
        except yaml.YAMLError as error:
            raise InputError(self._syntax(error)) from error
        if root is None:
            return {}
        if not isinstance(root, yaml.MappingNode):
            raise InputError(Problem("yaml-syntax", "a recipe is a mapping of keys", f"{self.name}:1"))
        tree = self._mapping(root, "", 0)
        if self.nodes > MAX_NODES:
            raise InputError(Problem("yaml-syntax", "the aliases of this file expand without end", self.name))
        return tree

    def where(self, key: str) -> str:
        """Where a key, or the nearest one above it, was written."""
        while key not in self.origins and key:
            key = key[:-1] if key.endswith("]") and "[" not in key else re.split(r"(?:\.[^.\[]*|\[\d+\])$", key)[0]
        return self.origins.get(key, self.name)

    def _any(self, node: yaml.Node, key: str, depth: int) -> Any:  # noqa: ANN401
        self.nodes += 1
        if self.nodes > MAX_NODES:
            return Scalar(None, "")
        if depth > MAX_DEPTH:
            raise InputError(Problem("yaml-syntax", "nested too deeply", self._place(node)))
        self.origins[key] = self._place(node) if key not in self.origins else self.origins[key]
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, key, depth)
        if isinstance(node, yaml.SequenceNode):
            return [self._item(item, f"{key}[{i}]", depth) for i, item in enumerate(node.value)]
        return self._scalar(node, key)

    def _item(self, node: yaml.Node, key: str, depth: int) -> Any:  # noqa: ANN401
        self.origins[key] = self._place(node)
        return self._any(node, key, depth + 1)

    def _mapping(self, node: yaml.MappingNode, prefix: str, depth: int) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        for key_node, value in node.value:
            name = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "?"
            key = f"{prefix}.{name}" if prefix else name
            if name in REFUSED_KEYS:
                self._add(
                    "recipe-key",
                    f"`{name}` has no place in a recipe",
                    key_node,
                    "a recipe is data, not Hydra config",
                    f"leave `{name}` out; `hardware`, `cluster` and `job` choose by name",
                )
            if name in tree:
                first = f"first at {self.origins[key]}"
                self._add("duplicate-key", f"`{key}` is written twice", key_node, first, "keep one of them")
                continue
            self.origins[key] = self._place(key_node)
            tree[name] = self._any(value, key, depth + 1)
        return tree

    def _scalar(self, node: yaml.Node, key: str) -> Scalar:
        if node.tag.startswith("tag:yaml.org,2002:python") or node.tag.startswith("!"):
            self._add("yaml-syntax", f"`{key}` has the tag {node.tag}", node, "a recipe holds plain data")
            return Scalar(None, "")
        try:
            value = _SCALARS.construct_object(node)
        except (yaml.YAMLError, ValueError) as error:
            self._add("yaml-syntax", f"`{key}` cannot be read: {error}", node)
            return Scalar(None, "")
        if isinstance(value, str) and "${" in PLAIN_REFERENCE.sub("", value).replace("\\${", ""):
            self._add(
                "interpolation", f"`{key}` holds a reference that is not a plain key", node,
                "only ${section.key} of the recipe itself is resolved",
                "write \\${ for the characters themselves",
            )  # fmt: skip
        elif isinstance(value, str):
            for reference in PLAIN_REFERENCE.findall(value):
                if reference[2:-1].split(".")[0] not in (*SECTIONS, "job"):
                    self._add("interpolation", f"`{key}` refers to {reference}, which is no key of a recipe", node)
        return Scalar(value, str(node.value), bare=getattr(node, "style", None) is None)

    def _place(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}"

    def _add(self, code: str, what: str, node: yaml.Node, why: str = "", fix: str = "") -> None:
        self.problems.append(Problem(code, what, self._place(node), why, fix))

    def _syntax(self, error: yaml.YAMLError) -> Problem:
        mark = getattr(error, "problem_mark", None)
        said = getattr(error, "problem", None) or str(error)
        context = getattr(error, "context", None) or ""
        place = f"{self.name}:{mark.line + 1}, column {mark.column + 1}" if mark else self.name
        fix = 'quote patterns: {pattern: "*.down_proj", scheme: float}' if "alias" in context else ""
        if not fix:
            fix = "close what is open there (brackets, quotes), indent by spaces, a space after each colon"
        return Problem("yaml-syntax", "the recipe is not valid YAML", place, f"{context} {said}".strip(), fix)


def _group(group: str, node: Any, walk: _Walk) -> tuple[str, dict[str, Any]]:  # noqa: ANN401
    """Return the chosen option and its other keys."""
    name, rest = node, {}
    if isinstance(node, Mapping):
        rest = {key: value for key, value in node.items() if key != "name"}
        name = node.get("name")
    if not isinstance(name, Scalar) or not isinstance(name.value, str):
        walk.problems.append(
            Problem("wrong-type", f"`{group}` is a name, or a mapping with `name`", walk.where(group),
                    fix=f"{group}: NAME   or   {group}: {{name: NAME, ...}}")
        )  # fmt: skip
        return "", rest
    known = group_names(group)
    if name.value not in known:
        near = nearest(name.value, known)
        walk.problems.append(
            Problem(
                "unknown-value",
                f"there is no {group} {name.value}",
                walk.where(f"{group}.name") if rest else walk.where(group),
                f"known: {', '.join(known)}",
                f"{group}: {(near or known)[0]}",
            )
        )
    return name.value, rest


def group_names(group: str) -> list[str]:
    """Return the options of a group."""
    if group == "job":
        return list(JOBS)
    kind = field_of(SECTIONS[group], "name")
    assert kind is not None
    return list(kind[0].__args__)


def _problem(mismatch: Mismatch, walk: _Walk) -> Problem:
    where = f"{walk.where(mismatch.key)}  {mismatch.key}"
    last = mismatch.key.rsplit(".", 1)[-1]
    match mismatch.kind:
        case "unknown-key":
            fix = f"did you mean {mismatch.instead}?" if mismatch.instead else ""
            return Problem("unknown-key", f"`{mismatch.text}` is not a key of a recipe here", where,
                           f"known keys: {mismatch.expected}", fix)  # fmt: skip
        case "yaml-type":
            return Problem("yaml-type", f"`{mismatch.key}` is text, a bare {mismatch.text} is none in YAML",
                           where, "quotes keep it text", f"{last}: {mismatch.instead}")  # fmt: skip
        case "missing-key":
            example = mismatch.expected.split(" | ")[0]
            return Problem("missing-key", f"`{mismatch.key}` is missing", where, fix=f"{last}: {example}")
        case _:
            fix = f"{last}: {mismatch.instead}" if mismatch.instead else ""
            return Problem(mismatch.kind, f"`{mismatch.key}` cannot be {mismatch.text}", where,
                           f"it takes {mismatch.expected}", fix)  # fmt: skip


def _anchor(cls: type, data: Any, folder: Path) -> None:  # noqa: ANN401
    """Make the local paths of a section absolute, in place."""
    for key in keys_below(cls):
        found = field_of(cls, key)
        assert found is not None
        *above, last = key.split(".")
        holder = data
        for part in above:
            holder = holder.get(part) if isinstance(holder, dict) else None
        if not isinstance(holder, dict) or last not in holder:
            continue
        if found[1].get("path"):
            holder[last] = anchor(holder[last], folder)
        elif found[1].get("recipe") and isinstance(holder[last], str):
            near_file = [folder / holder[last], folder / f"{holder[last]}.yaml"]
            holder[last] = next((str(p.absolute()) for p in near_file if p.is_file()), holder[last])
