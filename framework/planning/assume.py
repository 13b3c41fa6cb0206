"""A checkpoint that is not at hand: its headers, made from the published config through the same layouts."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

from framework.checkpoint.gguf import GGML_TYPES
from framework.checkpoint.index import Index, TensorInfo
from framework.checkpoint.safetensors import DTYPE_BYTES, read_json
from framework.errors import InputError, Problem
from framework.families.base import modules
from framework.families.config import describe
from framework.families.diffusion import describe_transformer, diffusion_modules
from framework.families.gguf import ARCHITECTURES, WITH_EXPERTS
from framework.families.pipeline import describe_pipeline
from framework.formats.base import Assumed
from framework.formats.declared import DECLARING
from framework.formats.registry import LAYOUTS
from framework.geometry import Module
from framework.recipe.schema import Assume

NOTE = "from the config, not from a file"


def assumed_indexes(assume: Assume, kind: str) -> dict[str, Index]:
    """Return the headers that a model described by `model.assume` would have, by the prefix of each part.

    Raises:
        UserError: the config cannot be read or understood.
    """
    path = Path(assume.config).resolve()
    if kind == "diffusion":
        folder = path if path.is_dir() else path.parent
        parts = {f"{part.name}.": part.folder / "config.json" for part in describe_pipeline(folder).transformers}
    else:
        parts = {"": path / "config.json" if path.is_dir() else path}
    return {prefix: _index(file, prefix, assume, _config(file)) for prefix, file in parts.items()}


def _config(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        raise InputError(
            Problem(
                "config-missing",
                "there is no config at this path",
                str(path),
                "model.assume describes a model by its published config.json",
                "model.assume.config=/where/the/config.json/is   or   model.assume=null",
            )
        )
    config = read_json(path)
    if not isinstance(config, dict):
        raise InputError(
            Problem(
                "file-malformed",
                "the config is no JSON object",
                str(path),
                fix="use the config.json that was published with the weights",
            )
        )
    return config


def _index(path: Path, prefix: str, assume: Assume, config: Mapping[str, Any]) -> Index:
    described = diffusion_modules(describe_transformer(config)) if prefix else modules(describe(config))
    made = _stand_in(assume, tuple(described))
    gguf = assume.format == "gguf"
    tensors = {
        name: TensorInfo(name, path, 0, _nbytes(dtype, shape, gguf=gguf), dtype, shape)
        for name, dtype, shape in made.tensors
    }
    return Index(
        path.parent,
        "gguf" if gguf else "safetensors",
        tensors,
        metadata={"general.architecture": _architecture(config)} if gguf else {},
        # how the published weights are quantized does not say how the assumed ones are
        config={key: value for key, value in config.items() if key not in DECLARING} | made.config,
        notes=(NOTE,),
        documents=dict(made.documents),
    )


def _stand_in(assume: Assume, described: tuple[Module, ...]) -> Assumed:
    layout = LAYOUTS["none" if assume.format == "auto" else assume.format]
    options = {
        "mix": assume.gguf_mix,
        "group_size": assume.group_size,
        "symmetric": assume.symmetric,
        "layers": [{"pattern": rule.pattern, "scheme": rule.scheme} for rule in assume.layers],
    }
    given = {name: value for name, value in options.items() if value not in (None, [])}
    return layout.stand_in(described, assume.scheme or "float", given)


def _architecture(config: Mapping[str, Any]) -> str:
    """GGUF's word for a config's architecture."""
    given = (config.get("architectures") or [""])[0]
    known = [*WITH_EXPERTS.items(), *ARCHITECTURES.items()]
    return next((ours for ours, theirs in known if theirs == given), "")


@lru_cache(maxsize=4096)
def _nbytes(dtype: str, shape: tuple[int, ...], *, gguf: bool) -> int:
    if not gguf:
        return prod(shape) * DTYPE_BYTES[dtype]
    _, block, size = GGML_TYPES[dtype]
    return prod(shape) // block * size
