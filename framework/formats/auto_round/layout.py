"""auto-round: GPTQ's or AWQ's tensors under a config of its own, with widths module by module."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

from framework.checkpoint.index import Index
from framework.errors import Problem
from framework.formats.awq.layout import awq_faults, byte_order
from framework.formats.base import Assumed, Held, TensorSpec
from framework.formats.declared import settings
from framework.formats.gptq.layout import V1, V2, gptq_faults
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
)  # fmt: skip
from framework.geometry import Module, Role

FLOAT_BITS = 16
# packing_format without its prefix -> where words run, how zero points are stored
PACKINGS = {
    "auto_gptq": Packing("gptq", V1), "gptq": Packing("gptq", V1), "auto": Packing("gptq", V1),
    "gptqmodel": Packing("gptq", V2), "": Packing("gptq", V2), "exllamav2": Packing("gptq", V2),
    "tritonv2": Packing("gptq", V2), "auto_awq": Packing("awq"), "awq": Packing("awq"),
}  # fmt: skip
_KINDS = {"bits": int, "group_size": int, "sym": bool, "extra_config": dict}
_EXPRESSION = re.compile(r"[*+?^$()\[\]{}|\\]")
_TRANSFORMS = ("rotation_config", "spinquant_config")


class AutoRoundLayout:
    """Layout of auto-round checkpoints (formats.base.Layout)."""

    name = "auto_round"

    def detect(self, index: Index) -> str | None:
        """quantization_config says so."""
        given = settings(index, self.name)
        return f"says auto-round: {_base(given).label}, packing {_packing_name(given) or 'native'}"

    def held(self, module: Module, index: Index) -> Held:
        """What config and exceptions say, where the file has codes."""
        width = width_of(module, index)
        return held_words(module, index, width, packing_of(index, width))

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
        """Other packings and data types, quantized activations, transforms, widths without a row."""
        given, where = settings(index, self.name), f"{index.root.name}: quantization_config"
        problems = odd_values(given, _KINDS, where)
        packing = _packing_name(given)
        if packing not in PACKINGS:
            problems.append(
                feature(f"auto-round packing {packing} is another layout of the words", where,
                        f"read are {', '.join(name or 'native' for name in PACKINGS)}",
                        "export with --format auto_round:auto_gptq")
            )  # fmt: skip
        if str(given.get("data_type") or "int") != "int":
            problems.append(
                feature(f"auto-round data type {given['data_type']} has no row in the support table", where,
                        "integer codes of 4 and 8 bits are run", "quantize with data type int")
            )  # fmt: skip
        if number(given.get("act_bits"), FLOAT_BITS) < FLOAT_BITS:
            problems.append(
                feature(f"activations of {given['act_bits']} bits are asked for", where,
                        "rows of auto-round are weight-only", "quantize with act_bits 16")
            )  # fmt: skip
        problems += [
            feature(f"{key} transforms weights and activations", where, "its tensors are not applied here",
                    f"quantize without {key}")
            for key in _TRANSFORMS if given.get(key)
        ]  # fmt: skip
        widths = {module.name: width_of(module, index) for module in linears(modules)}
        along = PACKINGS.get(packing, PACKINGS["auto"]).along
        return problems + (awq_faults if along == "awq" else gptq_faults)(modules, index, widths, where)

    def stand_in(self, modules: Sequence[Module], scheme: str, options: dict[str, Any]) -> Assumed:
        """Return the headers that auto-round would write in its GPTQ packing."""
        made, widths = assumed_words(modules, scheme, options, Packing("gptq"))
        quantized = [width for width in widths.values() if width]
        base = quantized[0] if quantized else Width()
        config = {
            "quant_method": "auto-round", "packing_format": "auto_round:auto_gptq", "bits": base.bits,
            "group_size": base.group or -1, "sym": base.symmetric, "data_type": "int",
            "extra_config": {_pattern(name): {"bits": width.bits if width else FLOAT_BITS}
                             for name, width in widths.items() if width is None or width.bits != base.bits},
        }  # fmt: skip
        return Assumed(tuple(made), {}, {"quantization_config": config})


def packing_of(index: Index, width: Width | None) -> Packing:
    """Return where the words of a checkpoint run and how their fields are to be read."""
    packing = PACKINGS.get(_packing_name(settings(index, "auto_round")), PACKINGS["auto"])
    return replace(packing, variant=byte_order(index, width)) if packing.along == "awq" else packing


def width_of(module: Module, index: Index) -> Width | None:
    """Return a module's width: its own entry, a pattern's, or that of all blocks; None: float."""
    given = settings(index, "auto_round")
    base = _base(given)
    extra = given.get("extra_config")
    extra = extra if isinstance(extra, Mapping) else {}
    own = extra.get(module.name)
    if own is None:
        own = next((values for pattern, values in _patterns(index) if pattern.fullmatch(module.name)), None)
    if own is None:
        own = next((values for pattern, values in _patterns(index) if pattern.search(module.name)), None)
    if not isinstance(own, Mapping):
        outside = module.role is Role.HEAD or not _in_blocks(module.name, given)
        return None if outside else base
    bits = number(own.get("bits"), base.bits)
    if bits >= FLOAT_BITS:
        return None
    symmetric = own["sym"] if isinstance(own.get("sym"), bool) else base.symmetric
    return Width(bits, group_of(own.get("group_size"), base.group or -1), symmetric)


@lru_cache(maxsize=8)
def _patterns(index: Index) -> tuple[tuple[re.Pattern[str], Any], ...]:
    """The keys of extra_config that are expressions; names that are none never match anything but themselves."""
    extra = settings(index, "auto_round").get("extra_config")
    found = []
    for key, values in extra.items() if isinstance(extra, Mapping) else ():
        if _EXPRESSION.search(str(key)):
            try:
                found.append((re.compile(str(key)), values))
            except re.error:
                continue
    return tuple(found)


def _in_blocks(name: str, given: Mapping[str, Any]) -> bool:
    blocks = given.get("block_name_to_quantize") or given.get("to_quant_block_names")
    if not blocks:
        return True
    names = blocks.split(",") if isinstance(blocks, str) else [str(block) for block in blocks]
    return any(name.startswith(f"{block.strip()}.") for block in names)


def _base(given: Mapping[str, Any]) -> Width:
    return Width(number(given.get("bits"), 4), group_of(given.get("group_size")), given.get("sym") is not False)


def _packing_name(given: Mapping[str, Any]) -> str:
    text = str(given.get("packing_format") or "auto_round:auto_gptq")
    return text.removeprefix("auto_round").removeprefix(":")


def _pattern(name: str) -> str:
    """An exact name, or an expression for that of all experts."""
    return re.escape(name).replace(r"\*", r"\d+") if "*" in name else name
