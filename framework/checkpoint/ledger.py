"""Every tensor of the file is accounted for: consumed by a module, ignored with a reason, missing, or left over."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from framework.checkpoint.index import Index, TensorInfo
from framework.errors import Problem, nearest


class Expected(Protocol):
    """A tensor that a module must have (formats.base.TensorSpec)."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def dtypes(self) -> tuple[str, ...]: ...  # noqa: D102


@dataclass(frozen=True)
class Ledger:
    """The account. `consumed` maps tensor to module; `problems` is empty when it closes."""

    consumed: dict[str, str]
    ignored: tuple[tuple[str, str], ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    problems: tuple[Problem, ...]


def settle(
    index: Index, expected: Mapping[str, Iterable[Expected]], ignorable: Callable[[str], str | None]
) -> Ledger:
    """Settle the account of a checkpoint. `expected`: per module the tensors it must have."""
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
    problems = []
    if missing:
        problems.append(_missing(index, missing, unexpected))
    if unexpected:
        problems.append(_unexpected(index, unexpected))
    if misshapen:
        problems.append(_misshapen(misshapen))
    if mistyped:
        problems.append(_mistyped(mistyped))
    names = tuple(name for name, _ in missing)
    return Ledger(consumed, ignored, names, tuple(unexpected), tuple(problems))


def _and_more(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""


def _missing(index: Index, missing: list[tuple[str, str]], unexpected: list[str]) -> Problem:
    name, module = missing[0]
    like = nearest(name, unexpected) or nearest(name, list(index.tensors)[:4000], cutoff=0.85)
    fix = f"the file has {like[0]}: is it a typing error?" if like and like[0] in unexpected else (
        "are config and weights of one release, and is the download complete?")  # fmt: skip
    return Problem(
        "tensor-missing",
        f"{len(missing)} tensor{'s are' if len(missing) > 1 else ' is'} not in the file: {name}{_and_more(len(missing))}",
        f"{module} in {index.root.name}",
        f"the module cannot be built without {name}",
        fix,
    )


def _unexpected(index: Index, names: list[str]) -> Problem:
    count = len(names)
    return Problem(
        "tensor-unexpected",
        f"{count} tensor{'s' if count > 1 else ''} of the file belong{'' if count > 1 else 's'} to no module: "
        f"{names[0]}{_and_more(count)}",
        f"{index.tensors[names[0]].file.name}",
        "a tensor that nothing uses means that the model is not the one its config describes",
        "are config and weights of one release?",
    )


def _misshapen(found: list[tuple[TensorInfo, Expected]]) -> Problem:
    info, spec = found[0]
    return Problem(
        "tensor-shape",
        f"{info.name} has shape {list(info.shape)}, its module needs {list(spec.shape)}{_and_more(len(found))}",
        info.file.name,
        "the shape follows from the config",
        "are config and weights of one release?",
    )


def _mistyped(found: list[tuple[TensorInfo, Expected]]) -> Problem:
    info, spec = found[0]
    return Problem(
        "tensor-dtype",
        f"{info.name} is of type {info.dtype}, which cannot be read here{_and_more(len(found))}",
        info.file.name,
        f"readable: {', '.join(spec.dtypes)}",
        "quantize or convert the file to one of these types",
    )
