"""Where AWQ keeps a module's tensors: codes in words along the output features, eight interleaved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from framework.checkpoint.index import Index
from framework.errors import Problem
from framework.formats.base import Assumed, Held, TensorSpec
from framework.formats.declared import settings
from framework.formats.gptq.rules import overridden
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

# Families of word layouts; only this one is read.
GEMM = ("gemm", "awq", "")
BYTE_ORDERS = ("natural", "interleaved")
OPTION = "awq_byte_order"
_KINDS = {"bits": int, "w_bit": int, "group_size": int, "q_group_size": int, "zero_point": bool, "dynamic": dict}


class AwqLayout:
    """Layout of AWQ checkpoints (formats.base.Layout)."""

    name = "awq"

    def detect(self, index: Index) -> str | None:
        """quantization_config says so."""
        return f"says awq: {declared_width(settings(index, self.name)).label}"

    def held(self, module: Module, index: Index) -> Held:
        """What the config says, where the file has codes."""
        width = _width(module, index)
        return held_words(module, index, width, Packing("awq", byte_order(index, width)))

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
        """Other word layouts, widths without a row, 8-bit codes whose byte order nobody says."""
        given, where = settings(index, self.name), f"{index.root.name}: quantization_config"
        problems = odd_values(given, _KINDS, where)
        version = str(given.get("version") or given.get("format") or given.get("checkpoint_format") or "").lower()
        if version not in GEMM:
            problems.append(
                feature(f"AWQ version {version} is another layout of the words", where, "version gemm is read",
                        "convert the checkpoint to version gemm")
            )  # fmt: skip
        return problems + awq_faults(modules, index, {m.name: _width(m, index) for m in linears(modules)}, where)

    def stand_in(self, modules: Sequence[Module], scheme: str, options: dict[str, Any]) -> Assumed:
        """Return the headers that AutoAWQ (4 bits) or GPTQModel (8 bits) would write."""
        made, widths = assumed_words(modules, scheme, options, Packing("awq"))
        quantized = [width for width in widths.values() if width]
        base = quantized[0] if quantized else Width()
        config = {
            "quant_method": "awq", "bits": base.bits, "group_size": base.group or -1, "version": "gemm",
            "zero_point": True, "modules_to_not_convert": [name for name, width in widths.items() if width is None],
        }  # fmt: skip
        if base.bits == 8:
            config["meta"] = {"quantizer": ["gptqmodel:7.7.0"]}
        return Assumed(tuple(made), {}, {"quantization_config": config})


def declared_width(given: Mapping[str, Any]) -> Width:
    """Return bits and group of a config, by either name of each key."""
    return Width(
        number(given.get("bits", given.get("w_bit")), 4),
        group_of(given.get("group_size", given.get("q_group_size"))),
        given.get("zero_point") is False,
    )


def byte_order(index: Index, width: Width | None) -> str:
    """Return how four 8-bit codes share a word: natural or interleaved; empty where neither file nor recipe says."""
    if width is None or width.bits != 8:
        return ""
    if asked := index.options.get(OPTION):
        return asked
    meta = settings(index, "awq").get("meta")
    writers = meta.get("quantizer") if isinstance(meta, Mapping) else None
    return "natural" if "gptqmodel" in str(writers) else ""


def awq_faults(
    modules: Sequence[Module], index: Index, widths: Mapping[str, Width | None], where: str
) -> list[Problem]:
    """What is wrong with codes in AWQ's words, whoever declares them."""
    found: dict[str, list[str]] = {}
    unsaid = []
    for module in linears(modules):
        width = widths[module.name]
        if reason := stray(module, index, width):
            found.setdefault(reason, []).append(module.name)
        elif held_words(module, index, width, Packing("awq")).scheme == "w8a16" and not byte_order(index, width):
            unsaid.append(module.name)
    problems = [*without_codes(modules, index, where), *stray_problems(found, where)]
    if unsaid:
        problems.append(
            Problem(
                "awq-byte-order",
                f"{len(unsaid)} linears of 8 bits, and nothing says in which order their bytes are: {unsaid[0]}",
                where,
                "two tools write two orders into tensors that look the same; the wrong one gives garbage",
                "quantization.awq_byte_order=natural   or   quantization.awq_byte_order=interleaved",
            )
        )
    return problems


def _width(module: Module, index: Index) -> Width | None:
    given = settings(index, "awq")
    return overridden(module.name, declared_width(given), given.get("dynamic"))
