"""What declares a checkpoint's quantization: the description, config.json, the quantizers' side files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import lru_cache
from typing import Any

from framework.checkpoint.faults import malformed
from framework.checkpoint.index import Index

DESCRIPTION = "quant_model_description.json"
DESCRIPTIONS = "quant_model_description*.json"
DECLARING = ("quantization_config", "compression_config")  # keys of config.json
METHODS = {
    "awq": "awq",
    "gptq": "gptq",
    "auto-round": "auto_round",
    "intel/auto-round": "auto_round",
    "compressed-tensors": "compressed_tensors",
}
_SIDE_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "quantization_config.json": "auto-round",
}


@dataclass(frozen=True, slots=True)
class Declaration:
    """One source that says how the weights are quantized.

    `place` names the file (and key); `format` is ours, or the source's own word where no format of ours reads it;
    `settings` is the declaring object: the description, or quantization_config.
    """

    place: str
    format: str
    settings: Mapping[str, Any]


@lru_cache(maxsize=8)
def declarations(index: Index) -> tuple[Declaration, ...]:
    """Return every source, the strongest first (SUPPORT: description, config.json, side files).

    Raises:
        InputError: `file-malformed`, a source is no mapping.
    """
    found: list[Declaration] = []
    names = [name for name in index.documents if fnmatch(name, DESCRIPTIONS)]
    for name in sorted(names, key=lambda name: (name != DESCRIPTION, name)):
        found.append(Declaration(name, "modelslim", _mapping(index, name, index.documents[name])))
    config = index.config or {}
    for place, held in (("config.json", config), ("config.json: text_config", config.get("text_config"))):
        for key in DECLARING:
            if isinstance(held, Mapping) and held.get(key):
                where = f"{place}{'.' if ':' in place else ': '}{key}"
                settings = _mapping(index, where, held[key])
                found.append(Declaration(where, _format(settings, "compressed-tensors"), settings))
    for name, method in _SIDE_FILES.items():
        if name in index.documents:
            settings = _mapping(index, name, index.documents[name])
            if name == "quantize_config.json" and "w_bit" in settings:
                method = "awq"
            found.append(Declaration(name, _format(settings, method), settings))
    return tuple(found)


def settings(index: Index, format_name: str) -> Mapping[str, Any]:
    """Return the settings of the strongest source that declares a format; empty if none does."""
    return next((d.settings for d in declarations(index) if d.format == format_name), {})


def _format(given: Mapping[str, Any], default: str) -> str:
    method = str(given.get("quant_method") or given.get("quant_type") or default).lower()
    return METHODS.get(method, method)


def _mapping(index: Index, place: str, value: Any) -> Mapping[str, Any]:  # noqa: ANN401
    if not isinstance(value, Mapping):
        folder = index.root if index.root.is_dir() else index.root.parent
        raise malformed(folder / place.split(":")[0], f"{place} is no mapping")
    return value
