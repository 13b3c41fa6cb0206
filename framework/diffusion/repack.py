"""What msModelSlim wrote of a Wan model, under Wan's names, into the diffusers layout of the float pipeline."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from framework.checkpoint.index import Index, TensorInfo
from framework.checkpoint.ledger import settle
from framework.checkpoint.open import open_index
from framework.checkpoint.reader import Reader
from framework.checkpoint.safetensors import read_json
from framework.checkpoint.write import CheckpointWriter
from framework.diffusion.wan_names import diffusers_name
from framework.errors import InputError, Problem, Refused
from framework.families.diffusion import describe_transformer, diffusion_modules
from framework.families.pipeline import Component, describe_pipeline
from framework.formats.declared import DESCRIPTION
from framework.formats.registry import LAYOUTS, detect

# Folders of a cascade's experts -> components, as the published pipelines map them.
EXPERTS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
WEIGHTS = "diffusion_pytorch_model"
MODEL_TYPES = ("Wan2.2-T2V-A14B", "Wan2.2-I2V-A14B", "Wan2.2-TI2V-5B", "Wan2.1")
_MAX_NAMES = 8
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Renamed:
    """One transformer: its tensors under diffusers' names, and the name that each has in the source."""

    component: Component
    index: Index
    source: dict[str, str]


def repack(original: Path, quantized: Path, output: Path, progress: Progress) -> dict[str, dict[str, int]]:
    """Write the pipeline of `original` with the transformers of `quantized`; return linears by type, by component.

    The output appears whole or not at all. Tensors pass one by one.

    Raises:
        UserError: `output-exists`; `repack-experts`, folders that do not fit the pipeline; `repack-names`, tensors
            that no rule knows or two of one name; what the ledger and the layout find; unreadable files.
    """
    if output.exists():
        raise InputError(
            Problem(
                "output-exists",
                "the output exists already",
                str(output),
                "a pipeline is written whole, into a new folder",
                f"job.output={output.with_name(output.name + '-2')}",
            )
        )
    parts = [rename(component, folder) for component, folder in sources(original, quantized)]
    problems = [problem for part in parts for problem in _check(part)]
    if problems:
        raise Refused(problems)
    total = sum(part.index.total_bytes for part in parts)
    done = 0
    with _whole(output) as folder, Reader() as reader:
        _copy_base(original, folder, {part.component.name for part in parts})
        for part in parts:
            tensors = [(name, info.dtype, info.shape) for name, info in part.index.tensors.items()]
            documents = {"config.json": part.index.config, DESCRIPTION: part.index.documents[DESCRIPTION]}
            with CheckpointWriter(folder / part.component.name, tensors, documents, stem=WEIGHTS) as writer:
                for name, info in part.index.tensors.items():
                    writer.put(name, reader.read(info, 0, prod(info.shape[:-1])).data)
                    done += info.nbytes
                    progress("repack", done, total)
    return {part.component.name: _types(part) for part in parts}


def sources(original: Path, quantized: Path) -> list[tuple[Component, Path]]:
    """Return each transformer of the pipeline with the folder that holds its quantized weights.

    Raises:
        InputError: `repack-experts`.
    """
    components = describe_pipeline(original).transformers
    found = {name: quantized / folder for name, folder in EXPERTS.items() if (quantized / folder).is_dir()}
    names = [component.name for component in components]
    if not found and len(names) == 1:
        found = {names[0]: quantized}
    if sorted(found) != sorted(names):
        held = ", ".join(folder.name for folder in found.values()) or "none"
        raise InputError(
            Problem(
                "repack-experts",
                f"the pipeline has {' and '.join(names)}, the quantized folder has {held}",
                str(quantized),
                f"experts are taken from {', '.join(f'{old} ({new})' for new, old in EXPERTS.items())}",
                "job.quantized=/the/folder/that/msmodelslim/wrote, with every expert quantized",
            )
        )
    return [(component, found[component.name]) for component in components]


def rename(component: Component, folder: Path) -> Renamed:
    """Read one transformer's headers and give every tensor, and every entry of the description, its new name.

    Names that are diffusers' already stay.

    Raises:
        UserError: `repack-names`; several descriptions; unreadable files.
    """
    held = open_index(folder)
    detect(held, "modelslim")  # refuses several descriptions, and none
    described: dict[str, Any] = next(
        value for name, value in sorted(held.documents.items()) if name.startswith("quant_model_description")
    )
    config = read_json(component.folder / "config.json")
    known = {module.name for module in diffusion_modules(describe_transformer(config))}
    source: dict[str, str] = {}
    tensors: dict[str, TensorInfo] = {}
    unknown, twice = [], []
    for name, info in held.tensors.items():
        new = name if name.rpartition(".")[0] in known or name in known else diffusers_name(name)
        if new is None:
            unknown.append(name)
        elif new in tensors:
            twice.append(f"{source[new]} and {name} are both {new}")
        else:
            source[new], tensors[new] = name, info._replace(name=new)
    if unknown or twice:
        raise Refused(_unnamed(folder, unknown, twice))
    entries = {
        (key if "." not in key or key in tensors else diffusers_name(key) or key): value
        for key, value in described.items()
    }
    index = Index(folder, "safetensors", tensors, config=config, files=held.files, documents={DESCRIPTION: entries})
    return Renamed(component, index, source)


def _unnamed(folder: Path, unknown: list[str], twice: list[str]) -> list[Problem]:
    problems = []
    if unknown:
        more = f" and {len(unknown) - _MAX_NAMES} more" if len(unknown) > _MAX_NAMES else ""
        problems.append(
            Problem(
                "repack-names",
                f"{len(unknown)} tensors have names of no Wan model: {', '.join(unknown[:_MAX_NAMES])}{more}",
                str(folder),
                "every tensor must have its place in the diffusers model",
                "is this the folder that msmodelslim wrote?",
            )
        )
    if twice:
        pairs = "; ".join(twice[:_MAX_NAMES])
        problems.append(Problem("repack-names", f"two tensors have one name: {pairs}", str(folder)))
    return problems


def _check(part: Renamed) -> Iterable[Problem]:
    """Hold the renamed tensors against the base's config, as a check of the output will."""
    layout, index = LAYOUTS["modelslim"], part.index
    described = tuple(diffusion_modules(describe_transformer(index.config or {})))
    yield from layout.faults(described, index)
    expected = {module.name: layout.held(module, index).tensors for module in described}
    yield from settle(index, expected, lambda name: layout.ignorable(name, index)).problems


@contextmanager
def _whole(output: Path) -> Iterator[Path]:
    """Give a folder beside the output, which takes its place when all is well and vanishes when it is not."""
    part = output.with_name(f".{output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        part.mkdir(parents=True)
    except OSError as error:
        raise InputError(
            Problem(
                "output-folder",
                f"the output cannot be made: {error.strerror}",
                str(output),
                fix="job.output=/a/new/folder/in/one/you/can/write",
            )
        ) from error
    try:
        yield part
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    part.rename(output)


def _copy_base(original: Path, folder: Path, transformers: set[str]) -> None:
    """Copy everything but the transformers, which are looked for at the top only."""
    for entry in sorted(original.iterdir()):
        if entry.name in transformers:
            continue
        if entry.is_dir():
            shutil.copytree(entry, folder / entry.name)
        else:
            shutil.copy(entry, folder / entry.name)


def _types(part: Renamed) -> dict[str, int]:
    """Linears by quant type."""
    described = part.index.documents[DESCRIPTION]
    counts: dict[str, int] = {}
    for name, info in part.index.tensors.items():
        if name.endswith(".weight") and len(info.shape) == 2:
            kind = str(described.get(name, "FLOAT"))
            counts[kind] = counts.get(kind, 0) + 1
    return counts
