"""Values against the types of the schema: read, refuse in words, and mirror the types for OmegaConf."""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass
from functools import cache
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from framework.errors import nearest
from framework.recipe.schema import MISSING

PLAIN_REFERENCE = re.compile(r"(?<!\\)\$\{[A-Za-z_]\w*(?:\.\w+)*\}")
SUFFIX_TOKENS = {"k": 1 << 10, "m": 1 << 20}


@dataclass(frozen=True, slots=True)
class Scalar:
    """A value as written: what YAML or Hydra made of it, its text, whether it stood without quotes."""

    value: Any
    text: str
    bare: bool = True


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A value that does not fit. `kind` is unknown-key, wrong-type, yaml-type or unknown-value."""

    key: str
    kind: str
    text: str
    expected: str
    instead: str = ""  # what could be written in its place


@cache
def typed_fields(cls: type) -> dict[str, tuple[Any, Mapping[str, Any]]]:
    """Return type and metadata of each field of a dataclass."""
    hints = get_type_hints(cls)
    return {f.name: (hints[f.name], f.metadata) for f in fields(cls)}


def field_of(cls: type, path: str) -> tuple[Any, Mapping[str, Any]] | None:
    """Return type and metadata of the field that a dotted path leads to; None where there is none."""
    kind: Any = cls
    metadata: Mapping[str, Any] = {}
    for part in path.split("."):
        kind = _without_none(kind)
        if is_record(kind) and part in typed_fields(kind):
            kind, metadata = typed_fields(kind)[part]
        elif get_origin(kind) in (Mapping, types.MappingProxyType) or _is_mapping(kind):
            kind, metadata = get_args(kind)[1], {}
        else:
            return None
    return kind, metadata


def keys_below(cls: type, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all keys of a dataclass, inner ones included."""
    for name, (kind, _) in typed_fields(cls).items():
        yield prefix + name
        inner = _without_none(kind)
        if is_record(inner):
            yield from keys_below(inner, f"{prefix}{name}.")


def read(kind: Any, node: Any, key: str, metadata: Mapping[str, Any], found: list[Mismatch]) -> Any:  # noqa: ANN401
    """Return `node` (dicts, lists, Scalars) as plain data of type `kind`; misfits go to `found`."""
    if isinstance(node, Scalar) and isinstance(node.value, str) and _stands_for_later(node.value):
        return node.value
    if is_record(kind):
        return _read_dataclass(kind, node, key, found)
    if _is_union(kind):
        return _read_union(kind, node, key, metadata, found)
    if _is_mapping(kind):
        if isinstance(node, Mapping):
            inner = get_args(kind)[1]
            return {name: read(inner, value, f"{key}.{name}", {}, found) for name, value in node.items()}
        return _refuse(kind, node, key, metadata, found)
    if get_origin(kind) is tuple:
        if isinstance(node, Sequence) and not isinstance(node, str | Scalar):
            inner = get_args(kind)[0]
            return [read(inner, value, f"{key}[{i}]", metadata, found) for i, value in enumerate(node)]
        return _refuse(kind, node, key, metadata, found)
    if isinstance(node, Scalar):
        fits, value = _scalar(kind, node, metadata)
        if fits:
            return value
    return _refuse(kind, node, key, metadata, found)


def with_defaults(cls: type, data: Mapping[str, Any]) -> dict[str, Any]:
    """Return plain data of a dataclass with the defaults of records that were given in part."""
    filled = dict(data)
    for f in fields(cls):
        if f.name not in filled:
            made = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
            filled[f.name] = list(made) if isinstance(made, tuple) else made
        inner = _without_none(typed_fields(cls)[f.name][0])
        if is_record(inner) and isinstance(filled[f.name], Mapping):
            filled[f.name] = with_defaults(inner, filled[f.name])
    return filled


def build(kind: Any, data: Any) -> Any:  # noqa: ANN401
    """Turn checked plain data into the frozen dataclasses of the schema; lists become tuples."""
    if is_record(kind) and isinstance(data, Mapping):
        known = typed_fields(kind)
        return kind(**{name: build(known[name][0], value) for name, value in data.items()})
    if _is_union(kind) and data is not None:
        inner = _without_none(kind)
        return build(inner, data) if not _is_union(inner) else _tuples(data)
    if get_origin(kind) is tuple and data is not None:
        return tuple(build(get_args(kind)[0], item) for item in data)
    if _is_mapping(kind) and data is not None:
        return {name: build(get_args(kind)[1], value) for name, value in data.items()}
    return data


@cache
def mirror(cls: type, name: str = "") -> type:
    """Make the mutable dataclass that OmegaConf understands (it knows neither Literal nor frozen classes).

    With `name`, a first field `name` holds it: the form of a config group's option.
    """
    made: list[Any] = [("name", str, field(default=name))] if name else []
    for f in fields(cls):
        kind = _mirror_type(typed_fields(cls)[f.name][0])
        default = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        made.append((f.name, kind, _mirror_default(default)))
    return make_dataclass(cls.__name__, made)


def describe_type(kind: Any, metadata: Mapping[str, Any] | None = None) -> str:  # noqa: ANN401
    """Say what a field takes, in a user's words."""
    metadata = metadata or {}
    if _is_union(kind):
        return " or ".join(describe_type(part, metadata) for part in get_args(kind))
    if get_origin(kind) is Literal:
        return " | ".join(str(value) for value in get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list, each {describe_type(get_args(kind)[0], metadata)}"
    if kind is types.NoneType:
        return "null"
    if is_record(kind) or _is_mapping(kind):
        return "a mapping" + (f" of {', '.join(typed_fields(kind))}" if is_record(kind) else "")
    words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[kind]
    bounds = [f"{word} {metadata[k]}" for k, word in _BOUND_WORDS.items() if k in metadata and kind in (int, float)]
    return " ".join([words, " and ".join(bounds)]).strip()


_BOUND_WORDS = {"minimum": "from", "above": "above", "maximum": "up to"}


def _stands_for_later(text: str) -> bool:
    return text == MISSING or PLAIN_REFERENCE.fullmatch(text) is not None


def is_record(kind: Any) -> bool:  # noqa: ANN401
    """Tell whether this is a dataclass (without narrowing the type for the checker)."""
    return is_dataclass(kind)


def is_optional_record(kind: Any) -> bool:  # noqa: ANN401
    """Tell whether this is a dataclass or None."""
    return _is_union(kind) and is_record(_without_none(kind))


def _is_union(kind: Any) -> bool:  # noqa: ANN401
    return get_origin(kind) in (Union, types.UnionType)


def _is_mapping(kind: Any) -> bool:  # noqa: ANN401
    origin = get_origin(kind)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _without_none(kind: Any) -> Any:  # noqa: ANN401
    if not _is_union(kind):
        return kind
    parts = [part for part in get_args(kind) if part is not types.NoneType]
    return parts[0] if len(parts) == 1 else kind


def _read_dataclass(kind: Any, node: Any, key: str, found: list[Mismatch]) -> Any:  # noqa: ANN401
    if not isinstance(node, Mapping):
        return _refuse(kind, node, key, {}, found)
    known = typed_fields(kind)
    data = {}
    for name, value in node.items():
        inner = f"{key}.{name}" if key else str(name)
        if name not in known:
            near = nearest(str(name), known)
            found.append(Mismatch(inner, "unknown-key", str(name), ", ".join(known), near[0] if near else ""))
            continue
        data[name] = read(known[name][0], value, inner, known[name][1], found)
    if key.endswith("]"):  # an item of a list has nobody else to complete it
        for f in fields(kind):
            if f.default == MISSING and f.name not in data:
                found.append(Mismatch(f"{key}.{f.name}", "missing-key", "", describe_type(known[f.name][0])))
    return data


def _read_union(
    kind: Any,  # noqa: ANN401
    node: Any,  # noqa: ANN401
    key: str,
    metadata: Mapping[str, Any],
    found: list[Mismatch],
) -> Any:  # noqa: ANN401
    parts = get_args(kind)
    best: list[Mismatch] | None = None
    for part in parts:
        trial: list[Mismatch] = []
        value = read(part, node, key, metadata, trial)
        if not trial:
            return value
        if not isinstance(node, Scalar) and not any(m.key == key for m in trial):
            best = trial  # of the right shape, wrong further in: say where
    if best is None and _without_none(kind) is not kind and not _is_union(_without_none(kind)):
        return read(_without_none(kind), node, key, metadata, found)
    if best is None:
        return _refuse(kind, node, key, metadata, found)
    found.extend(best)
    return None


def _scalar(kind: Any, node: Scalar, metadata: Mapping[str, Any]) -> tuple[bool, Any]:  # noqa: ANN401
    value, text = node.value, node.text
    if kind is types.NoneType:
        return value is None, None
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind), value
    if kind is str:
        return isinstance(value, str), value
    if kind is bool:
        return isinstance(value, bool), value
    if isinstance(value, bool) or value is None:
        return False, None
    number = _whole(value, text, metadata) if kind is int else _number(value, text)
    return number is not None and _within(number, metadata), number


def _whole(value: Any, text: str, metadata: Mapping[str, Any]) -> int | None:  # noqa: ANN401
    if re.fullmatch(r"[+-]?\d+(_\d+)*", text):
        return int(text)
    if metadata.get("tokens") and (match := re.fullmatch(r"(\d+)([kKmM])", text)):
        return int(match[1]) * SUFFIX_TOKENS[match[2].lower()]
    return None


def _number(value: Any, text: str) -> float | None:  # noqa: ANN401
    if isinstance(value, str | int | float) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text):
        return float(text)
    return None


def _within(number: float, metadata: Mapping[str, Any]) -> bool:
    return (
        number >= metadata.get("minimum", number)
        and number <= metadata.get("maximum", number)
        and ("above" not in metadata or number > metadata["above"])
    )


def _refuse(kind: Any, node: Any, key: str, metadata: Mapping[str, Any], found: list[Mismatch]) -> None:  # noqa: ANN401
    text = node.text if isinstance(node, Scalar) else "a list" if isinstance(node, list | tuple) else "a mapping"
    code, instead = "wrong-type", ""
    literals = [v for part in (get_args(kind) if _is_union(kind) else [kind]) for v in _literals(part)]
    if isinstance(node, Scalar):
        wants_text = str in (get_args(kind) if _is_union(kind) else (kind,))
        if wants_text and node.bare and isinstance(node.value, bool | int | float):
            code, instead = "yaml-type", f'"{text}"'
        elif literals and isinstance(node.value, str):
            near = nearest(node.value, literals)
            code, instead = "unknown-value", near[0] if near else ""
    found.append(Mismatch(key, code, text, describe_type(kind, metadata), instead))


def _literals(kind: Any) -> list[str]:  # noqa: ANN401
    return [str(value) for value in get_args(kind)] if get_origin(kind) is Literal else []


def _tuples(data: Any) -> Any:  # noqa: ANN401
    return tuple(_tuples(item) for item in data) if isinstance(data, list) else data


def _mirror_type(kind: Any) -> Any:  # noqa: ANN401
    if is_record(kind):
        return mirror(kind)
    if _is_union(kind):
        # a record that is null cannot take a key from the command line; all values are read again by their own types
        inner = _without_none(kind)
        return Any if _is_union(inner) or is_record(inner) else Union[_mirror_type(inner), None]  # noqa: UP007
    if get_origin(kind) is Literal:
        return str
    if get_origin(kind) is tuple:
        return list[_mirror_type(get_args(kind)[0])]  # type: ignore[misc]
    if _is_mapping(kind):
        return dict[str, _mirror_type(get_args(kind)[1])]  # type: ignore[misc]
    return kind


def _mirror_default(default: Any) -> Any:  # noqa: ANN401
    if isinstance(default, tuple):
        return field(default_factory=lambda: list(default))
    if isinstance(default, Mapping):
        return field(default_factory=dict)
    return field(default=default)
