"""Where GPTQ keeps a module's tensors: codes in words along the input features, zero points along the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from framework.checkpoint.index import Index
from framework.errors import Problem
from framework.formats.base import Assumed, Held, TensorSpec
from framework.formats.declared import settings
from framework.formats.gptq.rules import broken, overridden
from framework.formats.plain.layout import ignorable_float
from framework.formats.words import (
    Packing,
    Width,
    assumed_words,
    feature,
    group_of,
    held_words,
    linears,
    number,
    odd_values,
    stray,
    stray_problems,
    without_codes,
)  # fmt: skip
from framework.geometry import Module

V1, V2 = "v1", "v2"  # zero points stored minus one, or as they are
FORMATS = {"": V1, "gptq": V1, "gptq_v2": V2}
_KINDS = {"bits": int, "group_size": int, "sym": bool, "desc_act": bool, "dynamic": dict, "lm_head": bool}


class GptqLayout:
    """Layout of GPTQ checkpoints (formats.base.Layout)."""

    name = "gptq"

    def detect(self, index: Index) -> str | None:
        """quantization_config says so."""
        given = settings(index, self.name)
        return f"says gptq: {declared_width(given).label}, zero points {zeros(given)}"

    def held(self, module: Module, index: Index) -> Held:
        """What config and rules say, where the file has codes."""
        given = settings(index, self.name)
        return held_words(module, index, _width(module, given), Packing("gptq", zeros(given)))

    def stacked(self, module: Module, index: Index) -> bool:
        """Every expert has tensors of its own."""
        return False

    def extras(self, index: Index) -> dict[str, list[TensorSpec]]:
        """Nothing beyond the modules."""
        return {}

    def ignorable(self, name: str, index: Index) -> str | None:
        """Buffers and vision towers."""
        return ignorable_float(name)

    def faults(self, modules: Sequence[Module], index: Index) -> list[Problem]:
        """Other word layouts, widths without a row, rules that are no expressions."""
        given, where = settings(index, self.name), f"{index.root.name}: quantization_config"
        problems = odd_values(given, _KINDS, where)
        written = _format(given)
        if written not in FORMATS or given.get("is_marlin_format") is True:
            problems.append(
                feature(f"GPTQ format {written or 'marlin'} is another layout of the words", where,
                        f"read are {', '.join(filter(None, FORMATS))}", "convert the checkpoint to gptq or gptq_v2")
            )  # fmt: skip
        if str(given.get("pack_dtype") or "int32").removeprefix("torch.") != "int32":
            problems.append(
                feature(f"codes are packed in {given['pack_dtype']}", where, "words of 32 bits are read",
                        "convert the checkpoint to pack_dtype int32")
            )  # fmt: skip
        problems += [
            Problem("file-malformed", f"the rule {pattern!r:.80} of dynamic is no regular expression", where)
            for pattern in broken(given.get("dynamic"))
        ]
        return problems + gptq_faults(modules, index, {m.name: _width(m, given) for m in linears(modules)}, where)

    def stand_in(self, modules: Sequence[Module], scheme: str, options: dict[str, Any]) -> Assumed:
        """Return the headers that GPTQModel would write."""
        made, widths = assumed_words(modules, scheme, options, Packing("gptq"))
        quantized = [width for width in widths.values() if width]
        base = quantized[0] if quantized else Width()
        config = {
            "quant_method": "gptq", "bits": base.bits, "group_size": base.group or -1, "sym": base.symmetric,
            "desc_act": False, "checkpoint_format": "gptq", "pack_dtype": "int32", "lm_head": False,
            "dynamic": {_pattern(name): {"bits": width.bits} for name, width in widths.items()
                        if width and width.bits != base.bits},
        }  # fmt: skip
        return Assumed(tuple(made), {}, {"quantization_config": config})


def declared_width(given: Mapping[str, Any]) -> Width:
    """Return what holds for all modules."""
    return Width(
        number(given.get("bits"), 4),
        group_of(given.get("group_size")),
        given.get("sym") is not False,
        given.get("desc_act") is True,
    )


def zeros(given: Mapping[str, Any]) -> str:
    """Return v1 or v2."""
    return FORMATS.get(_format(given), V1)


def gptq_faults(
    modules: Sequence[Module], index: Index, widths: Mapping[str, Width | None], where: str
) -> list[Problem]:
    """What is wrong with codes in GPTQ's words, whoever declares them."""
    found: dict[str, list[str]] = {}
    for module in linears(modules):
        if reason := stray(module, index, widths[module.name]):
            found.setdefault(reason, []).append(module.name)
    return [*without_codes(modules, index, where), *stray_problems(found, where)]


def _format(given: Mapping[str, Any]) -> str:
    return str(given.get("checkpoint_format") or given.get("format") or "").lower()


def _width(module: Module, given: Mapping[str, Any]) -> Width | None:
    return overridden(module.name, declared_width(given), given.get("dynamic"))


def _pattern(name: str) -> str:
    """A regular expression for a module's name, whose `*` stands for the expert's number."""
    return name.replace(".", r"\.").replace("*", r"\d+")
