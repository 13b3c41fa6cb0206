"""Where AWQ keeps a module's tensors: codes in words along the output features, eight interleaved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from framework.checkpoint.index import Index
from framework.errors import Problem
from framework.formats.base import Assumed, Held, TensorSpec
from framework.formats.declared import settings
from framework.formats.gptq.layout import (
    OVERRIDES,
    Kinds,
    contradictions,
    is_part,
    left_out,
    odd_rules,
    place,
    ruled,
    spellings,
    word_faults,
)  # fmt: skip
from framework.formats.gptq.rules import rules_for
from framework.formats.names import stem
from framework.formats.plain.layout import ignorable_float
from framework.formats.words import (
    Packing,
    Width,
    assumed_words,
    feature,
    group_of,
    held_words,
    is_quantized,
    linears,
    number,
    odd_values,
)  # fmt: skip
from framework.geometry import Module, Role

# Families of word layouts; only this one is read.
GEMM = ("gemm", "awq", "")
OPTION = "awq_byte_order"
EXCLUDED = "modules_to_not_convert"
_KINDS: Kinds = {"bits": int, "w_bit": int, "group_size": int, "q_group_size": int, "zero_point": bool, "dynamic": dict,
                 EXCLUDED: (str, list)}  # fmt: skip


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
        given, where = settings(index, self.name), place(index, self.name)
        problems = odd_values(given, _KINDS, where) + odd_rules(given, "dynamic", OVERRIDES, where)
        version = str(given.get("version") or given.get("format") or given.get("checkpoint_format") or "").lower()
        if version not in GEMM:
            problems.append(
                feature(f"AWQ version {version} is another layout of the words", where, "version gemm is read",
                        "convert the checkpoint to version gemm")
            )  # fmt: skip
        widths = {module.name: _width(module, index) for module in linears(modules)}
        return problems + contradictions(index, self.name) + awq_faults(modules, index, widths, where)

    def stand_in(self, modules: Sequence[Module], scheme: str, options: dict[str, Any]) -> Assumed:
        """Return the headers that AutoAWQ (4 bits) or GPTQModel (8 bits) would write."""
        made, widths = assumed_words(modules, scheme, {"symmetric": False, **options}, Packing("awq"))
        quantized = [width for width in widths.values() if width]
        base = quantized[0] if quantized else Width()
        config: dict[str, Any] = {
            "quant_method": "awq", "bits": base.bits, "group_size": base.group or -1, "version": "gemm",
            "zero_point": not base.symmetric,
            EXCLUDED: [module.name for module in modules if module.quantizable and module.role is not Role.NONE],
            "dynamic": rules_for(widths, base.bits) | left_out(modules, widths),
        }  # fmt: skip
        if any(width.bits == 8 for width in quantized):
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


def excluded(module: Module, index: Index, given: Mapping[str, Any]) -> bool:
    """Whether modules_to_not_convert keeps a module float that has no codes in the file.

    Entries are whole parts of a name. AutoAWQ looks for them anywhere in it, relative to the layer: that explains
    float weights, which the file then has, and is no reason to leave out codes.
    """
    entries, names = given.get(EXCLUDED), spellings(module, index)
    if not isinstance(entries, str | list) or is_quantized(module, index):
        return False
    entries = [entries] if isinstance(entries, str) else entries
    if f"{stem(module, index)}.weight" in index.tensors:
        return any(isinstance(entry, str) and entry and entry in name for name in names for entry in entries)
    return any(is_part(entry, names) for entry in entries)


def awq_faults(
    modules: Sequence[Module], index: Index, widths: Mapping[str, Width | None], where: str
) -> list[Problem]:
    """What is wrong with codes in AWQ's words, whoever declares them: word_faults, and `awq-byte-order`."""
    problems = word_faults(modules, index, widths, where)
    unsaid = [
        module.name
        for module in linears(modules)
        if (width := widths[module.name]) and width.bits == 8 and not byte_order(index, width)
        and is_quantized(module, index)
    ]  # fmt: skip
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
    # writers leave the head float without listing it
    if (module.role is Role.HEAD and given.get("lm_head") is not True) or excluded(module, index, given):
        return None
    return ruled(module, index, declared_width(given), given.get("dynamic"))
