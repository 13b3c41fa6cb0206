"""Every tensor of the file is accounted for: consumed by a module, ignored with a reason, missing, left."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import Protocol, TypeVar

from framework.checkpoint.gguf import GGML_TYPES
from framework.checkpoint.index import Index, TensorInfo
from framework.errors import Problem, nearest

T = TypeVar("T")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_MAX_KINDS = 12  # problems of one code that are shown one by one
_MAX_COMPARED = 500  # names; comparing all of a large file takes seconds


class Expected(Protocol):
    """A tensor that a module must have (formats.base.TensorSpec)."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtypes(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class Ledger:
    """The account. `consumed` maps tensor to module; `problems` is empty when it closes."""

    consumed: dict[str, str]
    ignored: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    problems: tuple[Problem, ...]


def settle(index: Index, expected: Mapping[str, Iterable[Expected]], ignorable: Callable[[str], str | None]) -> Ledger:
    """Settle the account of a checkpoint.

    Args:
        index: what the file holds.
        expected: per module the tensors that it must have.
        ignorable: says why a tensor that no module uses may be left out, or None.

    Returns:
        The ledger; its problems are `tensor-missing`, `tensor-unexpected`, `tensor-shape`, `tensor-dtype`
        (in a GGUF `gguf-type`), one for all names that differ only in layer or expert number.
    """
    consumed: dict[str, str] = {}
    missing: list[tuple[str, str]] = []
    misshapen: list[tuple[TensorInfo, Expected]] = []
    mistyped: list[tuple[TensorInfo, Expected]] = []
    for module, specs in expected.items():
        for spec in specs:
            info = index.tensors.get(spec.name)
            if info is None:
                missing.append((spec.name, module))
                continue
            consumed[spec.name] = module
            if info.shape != spec.shape:
                misshapen.append((info, spec))
            elif spec.dtypes and info.dtype not in spec.dtypes:
                mistyped.append((info, spec))
    left = [name for name in index.tensors if name not in consumed]
    reasons = {name: ignorable(name) for name in left}
    ignored = tuple((name, reason) for name, reason in reasons.items() if reason is not None)
    unexpected = [name for name, reason in reasons.items() if reason is None]
    problems = [
        *_missing(index, missing, unexpected),
        *_unexpected(index, unexpected, [name for name, _ in missing]),
        *_misshapen(misshapen),
        *_mistyped(index, mistyped),
    ]
    names = tuple(name for name, _ in missing)
    return Ledger(consumed, ignored, names, tuple(unexpected), tuple(problems))


def _folded(items: Iterable[T], key: Callable[[T], str]) -> Iterator[tuple[str, list[T]]]:
    """Group items whose names differ only in numbers; yield the first kinds, then all others as one group."""
    groups: dict[str, list[T]] = {}
    for item in items:
        groups.setdefault(_NUMBER.sub("*", key(item)), []).append(item)
    kinds = list(groups.values())
    shown = _MAX_KINDS if len(kinds) > _MAX_KINDS + 1 else len(kinds)
    for group in kinds[:shown]:
        name = key(group[0])
        yield (name if len(group) == 1 else _NUMBER.sub("*", name)), group
    if rest := kinds[shown:]:
        group = [item for kind in rest for item in kind]
        yield f"{key(group[0])} and others of {len(rest)} kinds", group


def _tensors(count: int) -> str:
    return "a tensor" if count == 1 else f"{count} tensors"


def _verb(one: str, many: str, group: Sized) -> str:
    return one if len(group) == 1 else many


def _nearest(name: str, candidates: Iterable[str]) -> str | None:
    """Return the most alike name, among those with the same numbers (layer, expert) first."""
    candidates = list(candidates)
    numbers = _NUMBER.findall(name)
    same = [other for other in candidates if _NUMBER.findall(other) == numbers]
    found = nearest(name, same[:_MAX_COMPARED]) or nearest(name, candidates[:_MAX_COMPARED], cutoff=0.8)
    return found[0] if found else None


def _missing(index: Index, missing: list[tuple[str, str]], unexpected: list[str]) -> Iterator[Problem]:
    for pattern, group in _folded(missing, lambda pair: pair[0]):
        name, module = group[0]
        like = _nearest(name, unexpected)
        held = like or _nearest(name, index.tensors)
        example = "" if len(group) == 1 else f"; the first is {name}"
        yield Problem(
            "tensor-missing",
            f"the file lacks {_tensors(len(group))} that the model needs: {pattern}",
            f"{index.root.name}: {module}",
            (f"nearest name in the file: {held}" if held else "the file has no name like it") + example,
            f"is {like} a typing error for {name}?"
            if like
            else "are config and weights of one release, and is the download complete?",
        )


def _unexpected(index: Index, unexpected: list[str], missing: list[str]) -> Iterator[Problem]:
    for pattern, group in _folded(unexpected, str):
        like = _nearest(group[0], missing)
        yield Problem(
            "tensor-unexpected",
            f"{_tensors(len(group))} of the file {_verb('belongs', 'belong', group)} to no module: {pattern}",
            index.tensors[group[0]].file.name,
            f"nearest name that the model needs and the file lacks: {like}"
            if like
            else "a tensor that nothing uses means that the model is not the one its config describes",
            "are config and weights of one release?",
        )


def _misshapen(found: list[tuple[TensorInfo, Expected]]) -> Iterator[Problem]:
    for pattern, group in _folded(found, lambda pair: pair[0].name):
        info, spec = group[0]
        yield Problem(
            "tensor-shape",
            f"{_tensors(len(group))} of the file {_verb('has', 'have', group)} the wrong shape: {pattern}",
            f"{info.file.name}: {info.name}",
            f"it is {list(info.shape)}; by the config it is {list(spec.shape)}",
            "are config and weights of one release?",
        )


def _mistyped(index: Index, found: list[tuple[TensorInfo, Expected]]) -> Iterator[Problem]:
    ggml = index.container == "gguf"
    by_type: dict[tuple[str, tuple[str, ...]], list[TensorInfo]] = {}
    for info, spec in found:
        by_type.setdefault((info.dtype, tuple(spec.dtypes)), []).append(info)
    for (dtype, readable), infos in by_type.items():
        number = f"type {GGML_TYPES[dtype][0]} ({dtype})" if ggml and dtype in GGML_TYPES else dtype
        yield Problem(
            "gguf-type" if ggml else "tensor-dtype",
            f"{_tensors(len(infos))} of {number} cannot be read here: {infos[0].name}"
            + (f" and {len(infos) - 1} more" if len(infos) > 1 else ""),
            f"{infos[0].file.name}: {infos[0].name}",
            f"readable here: {', '.join(readable)}",
            "quantize or convert the model to one of these types",
        )
