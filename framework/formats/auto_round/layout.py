"""auto-round: GPTQ's or AWQ's tensors under a config of its own, with widths module by module."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from framework.checkpoint.index import Index
from framework.errors import Problem
from framework.formats.awq.layout import EXCLUDED, awq_faults, byte_order, excluded
from framework.formats.base import Assumed, Held, TensorSpec
from framework.formats.declared import settings
from framework.formats.gptq.layout import V1, V2, Kinds, contradictions, odd_rules, place, spellings, word_faults, zeros
from framework.formats.gptq.rules import expression
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
_OVERRIDES: Kinds = {"bits": int, "group_size": int, "sym": bool, "data_type": str, "act_bits": int}
_BLOCKS = ("block_name_to_quantize", "to_quant_block_names")
_KINDS: Kinds = {**_OVERRIDES, "extra_config": dict, **dict.fromkeys((EXCLUDED, *_BLOCKS), (str, list))}
_OPERATORS = set("*+?^$()[]{}|\\")
_ANYTHING = ".*"
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
        given, where = settings(index, self.name), place(index, self.name)
        extra = _extra(given)
        problems = odd_values(given, _KINDS, where) + odd_rules(given, "extra_config", _OVERRIDES, where)
        packing = _packing_name(given)
        if packing not in PACKINGS:
            problems.append(
                feature(f"auto-round packing {packing} is another layout of the words", where,
                        f"read are {', '.join(name or 'native' for name in PACKINGS)}",
                        "export with --format auto_round:auto_gptq")
            )  # fmt: skip
        coded = [values for values in (given, *extra.values()) if number(_of(values, "bits"), 0) < FLOAT_BITS]
        types = {said for values in coded if isinstance(said := _of(values, "data_type"), str)} - {"", "int"}
        if types:
            problems.append(
                feature(f"auto-round data type {', '.join(sorted(types))} has no row in the support table", where,
                        "integer codes of 4 and 8 bits are run", "quantize with data type int")
            )  # fmt: skip
        inputs = min((number(_of(values, "act_bits"), FLOAT_BITS) for values in coded), default=FLOAT_BITS)
        if inputs < FLOAT_BITS:
            problems.append(
                feature(f"activations of {inputs} bits are asked for", where,
                        "rows of auto-round are weight-only", "quantize with act_bits 16")
            )  # fmt: skip
        problems += [
            feature(f"{key} transforms weights and activations", where, "its tensors are not applied here",
                    f"quantize without {key}")
            for key in _TRANSFORMS if any(_of(values, key) for values in (given, *extra.values()))
        ]  # fmt: skip
        widths = {module.name: width_of(module, index) for module in linears(modules)}
        along = PACKINGS.get(packing, PACKINGS["auto"]).along
        problems += contradictions(index, self.name)
        return problems + (awq_faults if along == "awq" else word_faults)(modules, index, widths, where)

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
    given = settings(index, "auto_round")
    packing = PACKINGS.get(_packing_name(given), PACKINGS["auto"])
    if packing.along == "awq":
        return replace(packing, variant=byte_order(index, width))
    return replace(packing, variant=V2) if zeros(given) == V2 else packing


def width_of(module: Module, index: Index) -> Width | None:
    """Return a module's width: its own entry, a pattern's, or that of all blocks; None: float."""
    given = settings(index, "auto_round")
    base, names = _base(given), spellings(module, index)
    own = _entry(names, index)
    outside = module.role is Role.HEAD or not _in_blocks(names, given) or excluded(module, index, given)
    if outside and not own:
        return None
    bits = number(own.get("bits"), base.bits)
    if bits >= FLOAT_BITS:
        return None
    symmetric = own["sym"] if isinstance(own.get("sym"), bool) else base.symmetric
    return Width(bits, group_of(own.get("group_size"), base.group or -1), symmetric)


@dataclass(frozen=True, slots=True)
class _Rule:
    """A key of extra_config that is an expression.

    `inner` is what the tool puts between `.*` and `.*`, where it is plain text: found ten times as fast.
    """

    pattern: re.Pattern[str]
    inner: str
    values: Mapping[str, Any]

    def whole(self, name: str) -> bool:
        return self.inner in name if self.inner else self.pattern.fullmatch(name) is not None

    def part(self, name: str) -> bool:
        return not self.inner and self.pattern.search(name) is not None


def _entry(names: Sequence[str], index: Index) -> Mapping[str, Any]:
    """Return what extra_config says of a module: by name, by an expression for all of it, for a part of it.

    An empty entry says nothing, as in the tool's own loader.
    """
    extra = _extra(settings(index, "auto_round"))
    for name in names:
        if isinstance(own := extra.get(name), Mapping) and own:
            return own
    rules = _rules(index)
    whole = (rule.values for name in names for rule in rules if rule.whole(name))
    part = (rule.values for name in names for rule in rules if rule.part(name))
    return next(whole, None) or next(part, {})


@lru_cache(maxsize=8)
def _rules(index: Index) -> tuple[_Rule, ...]:
    """The keys of extra_config that are expressions; names that are none never match anything but themselves."""
    return tuple(_compiled(_extra(settings(index, "auto_round"))))


def _compiled(extra: Mapping[str, Any]) -> Iterator[_Rule]:
    for key, values in extra.items():
        if not _OPERATORS & set(key) or not isinstance(values, Mapping) or not values:
            continue
        wrapped = len(key) > 2 * len(_ANYTHING) and key.startswith(_ANYTHING) and key.endswith(_ANYTHING)
        inner = key[len(_ANYTHING) : -len(_ANYTHING)].replace(r"\.", "\0") if wrapped else "."
        plain = not (_OPERATORS | {"."}) & set(inner)
        if (pattern := expression(key)) is not None:
            yield _Rule(pattern, inner.replace("\0", ".") if plain else "", values)


def _extra(given: Mapping[str, Any]) -> Mapping[str, Any]:
    extra = given.get("extra_config")
    return extra if isinstance(extra, Mapping) else {}


def _of(values: object, key: str) -> Any:  # noqa: ANN401
    return values.get(key) if isinstance(values, Mapping) else None


def _in_blocks(names: Sequence[str], given: Mapping[str, Any]) -> bool:
    blocks = next((given[key] for key in _BLOCKS if given.get(key)), None)
    listed = list(_flat(blocks))
    return not listed or any(name.startswith(f"{block}.") for block in listed for name in names)


def _flat(blocks: object) -> Iterator[str]:
    """Block names from a list, a list of lists or one text with commas."""
    if isinstance(blocks, str):
        yield from (block.strip().rstrip(".") for block in blocks.split(","))
    elif isinstance(blocks, list):
        for block in blocks:
            yield from _flat(block)


def _base(given: Mapping[str, Any]) -> Width:
    return Width(number(given.get("bits"), 4), group_of(given.get("group_size")), given.get("sym") is not False)


def _packing_name(given: Mapping[str, Any]) -> str:
    backend = str(given.get("backend") or "")
    unsaid = "awq" if "awq" in backend and "gptq" not in backend else "auto_gptq"
    return str(given.get("packing_format") or unsaid).removeprefix("auto_round").removeprefix(":")


def _pattern(name: str) -> str:
    """An exact name, or an expression for that of all experts."""
    return re.escape(name).replace(r"\*", r"\d+") if "*" in name else name
