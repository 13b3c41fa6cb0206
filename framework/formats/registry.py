"""The formats by name, and which one a checkpoint is of."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from framework.checkpoint.index import Index
from framework.errors import InputError, Problem, Refused
from framework.formats.auto_round.layout import AutoRoundLayout
from framework.formats.awq.layout import AwqLayout
from framework.formats.base import Layout
from framework.formats.compressed_tensors.layout import CompressedTensorsLayout
from framework.formats.declared import DESCRIPTION, Declaration, declarations
from framework.formats.gguf.layout import GgufLayout
from framework.formats.gptq.layout import GptqLayout
from framework.formats.modelslim.layout import ModelslimLayout
from framework.formats.plain.layout import PlainLayout

if TYPE_CHECKING:
    from framework.formats.base import Decoder

_LAYOUTS: tuple[Layout, ...] = (
    ModelslimLayout(),
    AwqLayout(),
    GptqLayout(),
    AutoRoundLayout(),
    CompressedTensorsLayout(),
    GgufLayout(),
    PlainLayout(),
)
MODELSLIM_ONLY = (".deq_scale", ".quant_bias", ".weight_offset")  # no other format has tensors of these names
LAYOUTS = {layout.name: layout for layout in _LAYOUTS}
_DECODERS = {
    "modelslim": "framework.formats.modelslim.decode",
    "awq": "framework.formats.awq.decode",
    "gptq": "framework.formats.gptq.decode",
    "auto_round": "framework.formats.auto_round.decode",
    "compressed_tensors": "framework.formats.compressed_tensors.decode",
    "gguf": "framework.formats.gguf.decode",
    "none": "framework.formats.plain.decode",
}


def decoder(name: str) -> Decoder:
    """Return the decoding half of a format (imports torch)."""
    return cast("Decoder", importlib.import_module(_DECODERS[name]))


def can_run(name: str) -> bool:
    """Whether weights of a format can be decoded, beyond being checked and planned."""
    return name in _DECODERS


def detect(index: Index, asked: str = "auto") -> tuple[str, str]:
    """Return the format and why, by content; `asked` is `quantization.format`.

    Raises:
        Refused: `format-unsupported`; `format-mismatch`; `format-conflict`, sources contradict each other.
        InputError: `unknown-format`, `file-malformed`.
    """
    if asked not in ("auto", *LAYOUTS):
        raise InputError(
            Problem(
                "unknown-format",
                f"there is no format {asked}",
                "quantization.format",
                f"known: {', '.join(('auto', *LAYOUTS))}",
                "quantization.format=auto",
            )
        )
    found, why = _detect(index, asked)
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
        raise Refused(
            Problem(
                "format-unsupported",
                f"checkpoints of format {found} cannot be run",
                str(index.root),
                why,
                "a checkpoint in one of the formats that job=matrix lists, or the float one",
            )
        )
    return found, why


def _detect(index: Index, asked: str) -> tuple[str, str]:
    if index.container == "gguf":
        return "gguf", LAYOUTS["gguf"].detect(index) or ""
    sources = declarations(index)
    if not sources:
        _require_undescribed(index)
        return "none", LAYOUTS["none"].detect(index) or ""
    chosen = next((d for d in sources if d.format == asked), sources[0])
    several = [
        d for d in sources if d.format == chosen.format == "modelslim" and d is not chosen and _disagree(chosen, d)
    ]
    others = [d for d in sources if d.format != chosen.format and asked != chosen.format]
    if rivals := several + others:
        raise _conflict(index, chosen, rivals)
    layout = LAYOUTS.get(chosen.format)
    said = layout.detect(index) if layout is not None else None
    return chosen.format, f"{chosen.place} {said or f'says quant_method {chosen.format}'}"


def _disagree(chosen: Declaration, other: Declaration) -> bool:
    """Whether two descriptions cannot stand side by side: where none has the name itself, or a tensor two types."""
    if chosen.place != DESCRIPTION:
        return True
    return any(chosen.settings[name] != kind for name, kind in other.settings.items() if name in chosen.settings)


def _require_undescribed(index: Index) -> None:
    """Refuse weights of ModelSlim that no description explains.

    Raises:
        InputError: `description-absent`.
    """
    telling = next((name for name in index.tensors if name.endswith(MODELSLIM_ONLY)), None)
    if telling is None:
        return
    folder = index.root if index.root.is_dir() else index.root.parent
    raise InputError(
        Problem(
            "description-absent",
            f"these are weights of ModelSlim, their {DESCRIPTION} is missing",
            str(folder),
            f"they hold {telling}; the type of each tensor stands in the description alone",
            f"copy {DESCRIPTION} from where the weights came from",
        )
    )


def _conflict(index: Index, chosen: Declaration, rivals: list[Declaration]) -> Refused:
    several = [d for d in rivals if d.format == chosen.format]
    if several:
        names = ", ".join(d.place for d in (chosen, *several))
        return Refused(
            Problem(
                "format-conflict",
                f"the folder holds {len(several) + 1} descriptions of its weights",
                str(index.root),
                names,
                f"keep the one of these weights, as {DESCRIPTION}",
            )
        )
    other = rivals[0]
    return Refused(
        Problem(
            "format-conflict",
            f"two sources disagree: {chosen.place} says {chosen.format}, {other.place} says {other.format}",
            str(index.root),
            "the one that is picked must serve detection and loading alike, so neither is guessed",
            f"quantization.format={chosen.format}   or   quantization.format={other.format}",
        )
    )
