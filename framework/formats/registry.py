"""The formats by name, and which one a checkpoint is of."""

from __future__ import annotations

import importlib
import json
from typing import TYPE_CHECKING, cast

from framework.checkpoint.index import Index
from framework.errors import InputError, Problem, Refused
from framework.formats.base import Layout
from framework.formats.gguf.layout import GgufLayout
from framework.formats.plain.layout import PlainLayout

if TYPE_CHECKING:
    from framework.formats.base import Decoder

LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (GgufLayout(), PlainLayout())}
_DECODERS = {"gguf": "framework.formats.gguf.decode", "none": "framework.formats.plain.decode"}
_DECLARED = {"awq": "awq", "gptq": "gptq", "auto-round": "auto_round", "compressed-tensors": "compressed_tensors"}
_LATER = ("modelslim", *_DECLARED.values())


def decoder(name: str) -> Decoder:
    """Return the decoding half of a format (imports torch)."""
    return cast("Decoder", importlib.import_module(_DECODERS[name]))


def detect(index: Index, asked: str = "auto") -> tuple[str, str]:
    """Return the format and why, by content; `asked` is `quantization.format`.

    Raises:
        Refused: `format-not-yet`, a quantized format that is recognised but cannot be run yet; `format-mismatch`.
        InputError: `unknown-format`.
    """
    known = ("auto", *LAYOUTS, *_LATER)
    if asked not in known:
        raise InputError(
            Problem("unknown-format", f"there is no format {asked}", "quantization.format", f"known: {', '.join(known)}")
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
    if found in _LATER:
        raise Refused(
            Problem(
                "format-not-yet",
                f"checkpoints of format {found} cannot be run yet",
                str(index.root),
                why,
                "a float or GGUF checkpoint of the model; job=matrix lists what the support table knows",
            )
        )
    return found, why


def _detect(index: Index) -> tuple[str, str]:
    if index.container == "gguf":
        return "gguf", LAYOUTS["gguf"].detect(index) or ""
    if index.root.is_dir():
        described = sorted(path.name for path in index.root.glob("quant_model_description*.json"))
        if described:
            return "modelslim", f"{described[0]} describes its weights"
        config = index.config or {}
        text = config.get("text_config") or {}
        declared = config.get("quantization_config") or text.get("quantization_config")
        declared = declared or config.get("compression_config") or _side_file(index)
        if declared:
            method = str(declared.get("quant_method", "compressed-tensors")).lower()
            return _DECLARED.get(method, method), f"quantization_config says quant_method {method}"
    return "none", LAYOUTS["none"].detect(index) or ""


def _side_file(index: Index) -> dict[str, object] | None:
    for name in ("quantize_config.json", "quant_config.json", "quantization_config.json"):
        path = index.root / name
        if path.is_file():
            try:
                data = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(Problem("file-malformed", f"{name} is not JSON: {error}", str(path))) from error
            default = "auto-round" if name == "quantization_config.json" else "gptq"
            return {"quant_method": default} | data if isinstance(data, dict) else None
    return None
