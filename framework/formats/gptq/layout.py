"""Where GPTQ keeps a module's tensors: codes in words along the input features, zero points along the outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from framework.checkpoint.index import Index
from framework.errors import Problem
from framework.formats.base import Assumed, Held, TensorSpec
from framework.formats.declared import declarations, settings
from framework.formats.gptq.rules import broken, overridden, rules_for
from framework.formats.names import stem
from framework.formats.plain.layout import ignorable_float
from framework.formats.words import (
    SCHEMES,
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
    stray,
    stray_problems,
    without_codes,
)  # fmt: skip
from framework.geometry import Kind, Module, Role

Kinds = Mapping[str, type | tuple[type, ...]]
V1, V2 = "v1", "v2"  # zero points stored minus one, or as they are
FORMATS = {"": V1, "gptq": V1, "gptq_v2": V2}
# what a rule may say of one module; the rest holds for all
OVERRIDES: Kinds = {"bits": int, "group_size": int, "sym": bool, "desc_act": bool}
_KINDS = {**OVERRIDES, "dynamic": dict, "lm_head": bool, "modules_in_block_to_quantize": list}
_DECISIVE = ("bits", "w_bit", "group_size", "q_group_size", "sym", "zero_point", "desc_act", "checkpoint_format",
             "version", "packing_format")  # fmt: skip


class GptqLayout:
    """Layout of GPTQ checkpoints (formats.base.Layout)."""

    name = "gptq"

    def detect(self, index: Index) -> str | None:
        """quantization_config says so."""
        given = settings(index, self.name)
        return f"says gptq: {declared_width(given).label}, zero points {zeros(given)}"

    def held(self, module: Module, index: Index) -> Held:
        """What config and rules say, where the file has codes."""
        return held_words(module, index, _width(module, index), Packing("gptq", zeros(settings(index, self.name))))

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
        given, where = settings(index, self.name), place(index, self.name)
        problems = odd_values(given, _KINDS, where) + odd_rules(given, "dynamic", OVERRIDES, where)
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
        widths = {module.name: _width(module, index) for module in linears(modules)}
        return problems + contradictions(index, self.name) + word_faults(modules, index, widths, where)

    def stand_in(self, modules: Sequence[Module], scheme: str, options: dict[str, Any]) -> Assumed:
        """Return the headers that GPTQModel would write."""
        made, widths = assumed_words(modules, scheme, options, Packing("gptq"))
        quantized = [width for width in widths.values() if width]
        base = quantized[0] if quantized else Width()
        coded = [module for module in modules if widths.get(module.name)]
        made += [(f"{name}.g_idx", "I32", (module.shape[1],)) for module in coded for name in module.names()]
        config = {
            "quant_method": "gptq", "bits": base.bits, "group_size": base.group or -1, "sym": base.symmetric,
            "desc_act": False, "checkpoint_format": "gptq", "pack_dtype": "int32", "lm_head": False,
            "dynamic": rules_for(widths, base.bits) | left_out(modules, widths),
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


def place(index: Index, format_name: str) -> str:
    """Say where a checkpoint declares a format."""
    found = (d.place for d in declarations(index) if d.format == format_name)
    return f"{index.root.name}: {next(found, 'config.json')}"


def spellings(module: Module, index: Index) -> tuple[str, ...]:
    """Return the names by which a config may call a module: as the file spells it, and the canonical one."""
    written = module.name if module.tied_to else stem(module, index)
    return (written, module.name) if written != module.name else (written,)


def is_part(entry: object, names: Iterable[str]) -> bool:
    """Whether an entry is some whole components of a name: `layers.1` is no part of `layers.10`."""
    text = entry.strip(".") if isinstance(entry, str) else ""
    return bool(text) and any(f".{text}." in f".{name}." for name in names)


def ruled(module: Module, index: Index, base: Width, dynamic: object) -> Width | None:
    """Return a module's width by the rules that match either of its names; None: float."""
    found = (overridden(name, base, dynamic) for name in spellings(module, index))
    return next((width for width in found if width != base), base)


def left_out(modules: Sequence[Module], widths: Mapping[str, Width | None]) -> dict[str, dict[str, int]]:
    """Return the rules of a stand-in's modules that are float and no router or head, which writers leave out unsaid."""
    names = (m.name for m in modules if m.quantizable and m.role is Role.NONE and widths[m.name] is None)
    return {"-:" + name.replace(".", r"\.").replace("*", r"\d+"): {} for name in names}


def odd_rules(given: Mapping[str, Any], key: str, kinds: Kinds, where: str) -> list[Problem]:
    """Problems `file-malformed`: patterns of `key` that are no expressions, overrides of the wrong type, each once."""
    overrides = given.get(key)
    found: dict[str, Problem] = {}
    for name, values in overrides.items() if isinstance(overrides, Mapping) else ():
        for problem in odd_values(values, kinds, f"{where}: {key}: {name}") if isinstance(values, Mapping) else ():
            found.setdefault(problem.what, problem)
    return [*found.values(), *broken(overrides, key, where)]


def contradictions(index: Index, format_name: str) -> list[Problem]:
    """Problems `format-conflict`: two sources of one format that would have the words read differently."""
    same = [d for d in declarations(index) if d.format == format_name]
    problems = []
    for other in same[1:]:
        first = same[0]
        odd = [key for key in _DECISIVE if first.settings.get(key) is not None and other.settings.get(key) is not None]
        odd = [key for key in odd if str(first.settings[key]).lower() != str(other.settings[key]).lower()]
        if odd:
            said = [f"{d.place} says {', '.join(f'{key} {d.settings[key]}' for key in odd)}" for d in (first, other)]
            problems.append(
                Problem("format-conflict", "; ".join(said), str(index.root), "only one of them fits the weights",
                        f"remove {other.place}, or mend it")
            )  # fmt: skip
    return problems


def word_faults(
    modules: Sequence[Module], index: Index, widths: Mapping[str, Width | None], where: str
) -> list[Problem]:
    """What is wrong with codes in words, whoever declares them.

    Args:
        modules: of the model.
        index: of the checkpoint.
        widths: of each linear by its config; None: float.
        where: the place of that config.

    Returns:
        Problems `format-feature`, `description-missing`, `tensor-missing`, `embedding-quantized`.
    """
    if nothing := without_codes(modules, index, where):
        return nothing
    found: dict[str, list[str]] = {}
    kept = []
    for module in linears(modules):
        width = widths[module.name]
        if reason := stray(module, index, width):
            found.setdefault(reason, []).append(module.name)
        elif width is None or module.role is Role.ROUTER or module.tied_to or is_quantized(module, index):
            continue
        elif f"{stem(module, index)}.weight" in index.tensors:
            kept.append(module.name)
        elif width.bits not in SCHEMES:
            found.setdefault(f"{width.bits} bits", []).append(module.name)
    problems = stray_problems(found, where)
    if kept:
        problems.append(
            Problem(
                "tensor-missing",
                f"the file lacks the codes of {_counted(kept)}: it has float weights, and the config quantizes them",
                where,
                "what the config describes wrongly here may be wrong elsewhere",
                "name them in the config among the modules that are left out, or use the config of these weights",
            )
        )
    embedded = [m.name for m in modules if m.kind is Kind.EMBEDDING and f"{stem(m, index)}.qweight" in index.tensors]
    if embedded:
        problems.append(
            Problem(
                "embedding-quantized",
                f"{_counted(embedded)} has codes in the file, embeddings must be float",
                where,
                "rows of an embedding are looked up in float; no op of the tables takes codes",
                "quantize again with the embedding left out",
            )
        )
    return problems


def _counted(names: Sequence[str]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else names[0]


def _format(given: Mapping[str, Any]) -> str:
    return str(given.get("checkpoint_format") or given.get("format") or "").lower()


def _width(module: Module, index: Index) -> Width | None:
    given = settings(index, "gptq")
    if module.role is Role.HEAD and given.get("lm_head") is not True:
        return None
    blocks = given.get("modules_in_block_to_quantize")
    if isinstance(blocks, list) and blocks and not is_quantized(module, index):
        listed = (entry for block in blocks for entry in (block if isinstance(block, list) else [block]))
        if not any(is_part(entry, spellings(module, index)) for entry in listed):
            return None
    return ruled(module, index, declared_width(given), given.get("dynamic"))
