"""What is to be run: the parts of a model, each with its headers, format and modules, described from its config."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from framework.checkpoint.index import Index
from framework.checkpoint.open import open_index
from framework.errors import InputError, Problem, Refused
from framework.families.base import DecoderSpec, ignorable, modules
from framework.families.config import describe
from framework.families.diffusion import DiffusionSpec, describe_transformer, diffusion_modules
from framework.families.gguf import describe_gguf
from framework.families.pipeline import INDEX as PIPELINE_INDEX
from framework.families.pipeline import describe_pipeline
from framework.formats.registry import LAYOUTS, detect
from framework.geometry import Module
from framework.planning.assign import Part

# What only Wan's own checkpoints have: folders of experts, names of modules.
WAN_FOLDERS = ("high_noise_model", "low_noise_model")
WAN_OWN = re.compile(r"blocks\.\d+\.(self_attn|cross_attn)\.")
DESCRIBED = "quant_model_description"


@dataclass(frozen=True)
class Described:
    """A model: the decoder of an LLM, or the transformers of a diffusion pipeline by the prefix of their names.

    `pipeline` is the class of the pipeline.
    """

    parts: tuple[Part, ...]
    decoder: DecoderSpec | None = None
    transformers: Mapping[str, DiffusionSpec] | None = None
    pipeline: str = ""

    def ignorable(self, part: Part) -> Callable[[str], str | None]:
        """Return what says why a tensor of a part may be left out."""

        def reason(name: str) -> str | None:
            said = part.layout.ignorable(name, part.index)
            return said or (ignorable(name, self.decoder) if self.decoder else None)

        return reason


def open_indexes(path: Path, kind: str) -> dict[str, Index]:
    """Open the headers of a model's parts, by the prefix of their modules' names.

    Raises:
        InputError: `model-kind`, an LLM where a pipeline is named or the reverse; `repack-needed`;
            `component-missing`, a transformer that is not there; all that the containers raise.
        Refused: `format-unsupported`, a transformer in GGUF.
    """
    is_pipeline = (path / PIPELINE_INDEX).is_file()
    if not is_pipeline and kind == "diffusion" and any((path / folder).is_dir() for folder in WAN_FOLDERS):
        raise InputError(_repack(path, "the folders are those of Wan's own checkpoints"))
    if is_pipeline != (kind == "diffusion") and path.exists():
        other = "diffusion" if is_pipeline else "llm"
        raise InputError(
            Problem(
                "model-kind",
                f"the recipe says kind {kind}, the model is {'a' if is_pipeline else 'no'} diffusers pipeline",
                str(path),
                f"it has {'a' if is_pipeline else 'no'} {PIPELINE_INDEX}",
                f"model.kind={other}",
            )
        )
    if not is_pipeline:
        return {"": _with_notes(open_index(path))}
    pipeline = describe_pipeline(path)
    transformers = pipeline.transformers
    if not transformers:
        raise InputError(
            Problem(
                "model-kind",
                "the pipeline has no transformer",
                str(path / PIPELINE_INDEX),
                "its transformers are what is planned, sharded and quantized",
                "use a pipeline with a component named transformer",
            )
        )
    missing = [_missing(str(part.folder), part.name) for part in transformers if not part.folder.is_dir()]
    if pipeline.options.get("boundary_ratio") and len(transformers) == 1:
        missing.append(_missing(str(path / PIPELINE_INDEX), "transformer_2"))
    if missing:
        raise InputError(missing)
    indexes = {f"{component.name}.": open_index(component.folder) for component in transformers}
    packed = [str(index.root) for index in indexes.values() if index.container == "gguf"]
    if packed:
        raise Refused(
            Problem(
                "format-unsupported",
                "a pipeline's transformer is in GGUF, which is read for language models only",
                ", ".join(packed),
                "the support table has no GGUF row for diffusion models",
                "the safetensors transformer of the same model",
            )
        )
    for index in indexes.values():
        described = [key for name, held in index.documents.items() if name.startswith(DESCRIBED) for key in held]
        own = next((name for name in (*index.tensors, *described) if WAN_OWN.search(name)), None)
        if own:
            raise InputError(_repack(index.root, f"{own} is a name of Wan's own checkpoints, not of diffusers"))
    return indexes


def _missing(where: str, name: str) -> Problem:
    return Problem(
        "component-missing",
        f"the pipeline's {name} is not there",
        where,
        f"{PIPELINE_INDEX} lists it, or has a boundary_ratio at which it takes over",
        "fetch the pipeline again, whole",
    )


def _repack(path: Path, why: str) -> Problem:
    return Problem(
        "repack-needed",
        "this is what msModelSlim wrote of an original Wan model: it has to be repacked first",
        str(path),
        why,
        "python launch.py job=repack job.original=/the/float/diffusers/folder job.quantized=/what/msmodelslim/wrote "
        "job.output=/a/new/folder   and then   model.path=/a/new/folder",
    )


def _with_notes(index: Index) -> Index:
    """Note a tokenizer that is missing: only what makes or takes text needs it."""
    folder = index.root if index.root.is_dir() else index.root.parent
    if "tokenizer.ggml.model" in index.metadata or (folder / "tokenizer.json").is_file():
        return index
    return replace(index, notes=(*index.notes, "no tokenizer beside the weights: job=generate and job=serve need one"))


def describe_model(indexes: Mapping[str, Index], asked_format: str) -> Described:
    """Return the description of a model and its parts, from the headers of each.

    Raises:
        UserError: where nothing further can be checked (unknown format or architecture, unreadable config).
    """
    found = {prefix: detect(index, asked_format) for prefix, index in indexes.items()}
    if "" in indexes:
        spec = describe_checkpoint(indexes[""])
        return Described((_part("", indexes[""], found[""], tuple(modules(spec))),), decoder=spec)
    specs = {prefix: describe_transformer(_config(index)) for prefix, index in indexes.items()}
    parts = [
        _part(prefix, index, found[prefix], tuple(diffusion_modules(specs[prefix])))
        for prefix, index in indexes.items()
    ]
    root = next(iter(indexes.values())).root.parent
    return Described(tuple(parts), transformers=specs, pipeline=describe_pipeline(root).class_name)


def _part(prefix: str, index: Index, found: tuple[str, str], made: tuple[Module, ...]) -> Part:
    format_name, evidence = found
    return Part(prefix, index, format_name, evidence, LAYOUTS[format_name], made)


def describe_checkpoint(index: Index) -> DecoderSpec:
    """Return the decoder that a checkpoint holds."""
    if index.container == "gguf" and index.config is None:
        return describe_gguf(index)
    spec = describe(_config(index))
    given = index.documents.get("generation_config.json")
    if isinstance(given, Mapping):
        eos = given.get("eos_token_id")
        more = eos if isinstance(eos, list) else [] if eos is None else [eos]
        spec = replace(spec, eos_ids=tuple(dict.fromkeys((*spec.eos_ids, *more))))
    return spec


def _config(index: Index) -> Mapping[str, object]:
    if index.config is None:
        raise InputError(
            Problem(
                "config-missing",
                "the checkpoint has no config.json",
                str(index.root),
                "the architecture and its shapes are in it",
                "put the config.json that was published with the weights beside them",
            )
        )
    return index.config
