"""The formats by name, and which one a checkpoint is of."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from framework.checkpoint import safetensors
from framework.checkpoint.faults import malformed
from framework.checkpoint.index import Index
from framework.errors import InputError, Problem, Refused
from framework.formats.base import Layout
from framework.formats.gguf.layout import GgufLayout
from framework.formats.plain.layout import PlainLayout

if TYPE_CHECKING:
    from framework.formats.base import Decoder

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (GgufLayout(), PlainLayout())}
_DECODERS = {"gguf": "framework.formats.gguf.decode", "none": "framework.formats.plain.decode"}
_DECLARED = {
    "awq": "awq",
    "gptq": "gptq",
    "auto-round": "auto_round",
    "compressed-tensors": "compressed_tensors",
}
_SIDE_FILES = {
    "quantize_config.json": "gptq",
    "quant_config.json": "gptq",
    "quantization_config.json": "auto-round",
}
_LATER = ("modelslim", *_DECLARED.values())


def decoder(name: str) -> Decoder:
    """Return the decoding half of a format (imports torch)."""
    return cast("Decoder", importlib.import_module(_DECODERS[name]))


def detect(index: Index, asked: str = "auto") -> tuple[str, str]:
    """Return the format and why, by content; `asked` is `quantization.format`.

    Raises:
        Refused: `format-not-yet`, recognised, cannot be run yet; `format-unsupported`; `format-mismatch`.
        InputError: `unknown-format`, `file-malformed`.
    """
    known = ("auto", *LAYOUTS, *_LATER)
    if asked not in known:
        raise InputError(
            Problem(
                "unknown-format",
                f"there is no format {asked}",
                "quantization.format",
                f"known: {', '.join(known)}",
            )
        )
    found, why = _detect(index)
    if asked not in ("auto", found):
        raise Refused(
            Problem(
                "format-mismatch",
                f"the recipe says the checkpoint is {asked}, it is {found}",
                "quantization.format",
                why,
                f"quantization.format=auto   or   quantization.format={found}",
            )
        )
    if found not in LAYOUTS:
        later = found in _LATER
        raise Refused(
            Problem(
                "format-not-yet" if later else "format-unsupported",
                f"checkpoints of format {found} cannot be run" + (" yet" if later else ""),
                str(index.root),
                why,
                "a float or GGUF checkpoint of the model; job=matrix lists what the support table knows",
            )
        )
    return found, why


def _detect(index: Index) -> tuple[str, str]:
    if index.container == "gguf":
        return "gguf", LAYOUTS["gguf"].detect(index) or ""
    folder = index.root if index.root.is_dir() else index.root.parent
    described = sorted(path.name for path in folder.glob("quant_model_description*.json"))
    if described:
        return "modelslim", f"{described[0]} describes its weights"
    for place, declared in _declarations(folder, index.config or {}):
        if not isinstance(declared, dict):
            raise malformed(folder / place.split(":")[0], f"{place} is no mapping")
        method = str(declared.get("quant_method", "compressed-tensors")).lower()
        return _DECLARED.get(method, method), f"{place} says quant_method {method}"
    return "none", LAYOUTS["none"].detect(index) or ""


def _declarations(folder: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield what declares a quantization, and where, the strongest first."""
    text = config.get("text_config")
    for place, held in (("config.json", config), ("config.json: text_config", text)):
        for key in ("quantization_config", "compression_config"):
            if isinstance(held, Mapping) and held.get(key):
                yield f"{place}{'.' if ':' in place else ': '}{key}", held[key]
    for name, method in _SIDE_FILES.items():
        if (folder / name).is_file():
            declared = safetensors.read_json(folder / name)
            yield name, {"quant_method": method} | declared if isinstance(declared, dict) else declared
