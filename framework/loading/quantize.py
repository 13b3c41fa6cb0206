"""A float checkpoint to a quantized one, tensor by tensor: round to nearest, in ModelSlim's layout."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch

from framework.checkpoint.index import Index
from framework.checkpoint.reader import Reader
from framework.checkpoint.write import SHARD_BYTES, CheckpointWriter, Entry
from framework.formats.declared import DECLARING, DESCRIPTION
from framework.formats.modelslim.encode import TYPE_OF, encode, entries
from framework.formats.names import stem
from framework.formats.registry import decoder
from framework.geometry import Module
from framework.planning.plan import PlannedModule
from framework.quantization.online import quantize

FLOAT = "FLOAT"
# Beside the weights: tokenizers, generation settings. Code is never copied.
_COMPANIONS = ("*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken")
_NOT_COPIED = ("config.json", DESCRIPTION)
Progress = Callable[[int, int], None]


def write_quantized(
    index: Index,
    format_name: str,
    planned: tuple[PlannedModule, ...],
    output: Path,
    progress: Progress,
    *,
    stem_name: str = "quant_model_weights",
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write the checkpoint of `index` with the modules of a TP 1 plan quantized; return the bytes of its tensors.

    Raises:
        UserError: the output exists or cannot be written; the source broke since it was checked.
    """
    plans = {
        stem(module, index): (one, module) for one in planned if one.mode == "online" for module in _linears(one.module)
    }
    tensors = list(_entries(index, plans))
    described = {name: _label(name, plans) for name, _, _ in tensors}
    documents = {
        "config.json": _config(index),
        DESCRIPTION: {"version": "1.0.0", "model_quant_type": FLOAT, **described},
    }
    source = decoder(format_name)
    with (
        CheckpointWriter(output, tensors, documents, stem=stem_name, shard_bytes=shard_bytes) as writer,
        Reader() as reader,
    ):
        done = 0
        for name, info in index.tensors.items():
            base = name.removesuffix(".weight")
            if name.endswith(".weight") and base in plans:
                one, module = plans[base]
                weight = source.decode(module, module.full, "float", index, reader, dtype=torch.float32).codes
                for made, tensor in encode(base, one.scheme, quantize(weight, one.scheme, one.group)).items():
                    writer.put(made, tensor.contiguous().view(torch.uint8).numpy().data)
            else:
                writer.put(name, reader.read(info, 0, prod(info.shape[:-1])).data)
            done += info.nbytes
            progress(done, index.total_bytes)
        with writer.writing("the files beside the weights"):
            _copy_companions(index, writer.part)
    return sum(writer.files.places[name][2] for name, _, _ in tensors)


def _linears(module: Module) -> list[Module]:
    return [module.expert(e) for e in range(module.experts)] if module.experts else [module]


def _entries(index: Index, plans: Mapping[str, tuple[PlannedModule, Module]]) -> Iterator[Entry]:
    for name, info in index.tensors.items():
        base = name.removesuffix(".weight")
        if name.endswith(".weight") and base in plans:
            one, module = plans[base]
            yield from entries(base, one.scheme, *module.shape, one.group)
        else:
            yield name, info.dtype, info.shape


def _label(name: str, plans: Mapping[str, tuple[PlannedModule, Module]]) -> str:
    base, _, suffix = name.rpartition(".")
    return TYPE_OF[plans[base][0].scheme] if base in plans and suffix != "bias" else FLOAT


def _config(index: Index) -> dict[str, Any]:
    return {key: value for key, value in (index.config or {}).items() if key not in DECLARING}


def _copy_companions(index: Index, output: Path) -> None:
    folder = index.root if index.root.is_dir() else index.root.parent
    for pattern in _COMPANIONS:
        for path in folder.glob(pattern):
            if path.name not in _NOT_COPIED and not path.name.endswith(".safetensors.index.json"):
                shutil.copy(path, output / path.name)
