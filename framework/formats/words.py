"""Integer codes in 32-bit words, as AWQ, GPTQ and auto-round keep them: which tensors, of which shape. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import translate
from typing import Any

from framework.checkpoint.index import Index
from framework.errors import InputError, Problem, nearest
from framework.formats.base import FLOATS, Held, TensorSpec
from framework.formats.names import stem
from framework.formats.plain.layout import assumed_float, held_float
from framework.geometry import Kind, Module, Role

SCHEMES = {4: "w4a16", 8: "w8a16"}
SUFFIXES = ("qweight", "qzeros", "scales", "g_idx", "bias")


@dataclass(frozen=True, slots=True)
class Width:
    """How one linear is quantized: bits a code, input features a scale (0: all), without zero points, in act order."""

    bits: int = 4
    group: int = 128
    symmetric: bool = True
    order: bool = False

    @property
    def label(self) -> str:
        """In words."""
        grouped = f"groups of {self.group}" if self.group else "one scale a row"
        return f"{self.bits} bits, {grouped}{', act order' if self.order else ''}"


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the words run: `gptq` along K (zero points along N), `awq` along N.

    `variant` tells decoders what shapes do not: v1 or v2 zero points, the order of bytes.
    """

    along: str
    variant: str = ""


def is_quantized(module: Module, index: Index) -> bool:
    """Whether the file holds codes for a linear: that decides, whatever its config excludes."""
    return f"{stem(module, index)}.qweight" in index.tensors


def held_words(module: Module, index: Index, width: Width | None, packing: Packing) -> Held:
    """Return what the file holds of a module whose config says `width` (None: float).

    Codes that the file has and its config does not describe are counted as used; `stray` names them.
    """
    found = module.kind is Kind.LINEAR and is_quantized(module, index)
    if module.kind is not Kind.LINEAR or (not found and (width is None or _has_weight(module, index))):
        return held_float(module, index)
    name = stem(module, index)
    if width is None or width.bits not in SCHEMES:
        infos = [index.tensors.get(f"{name}.{suffix}") for suffix in SUFFIXES]
        specs = tuple(TensorSpec(i.name.rsplit(".", 1)[1], i.name, i.shape, (i.dtype,)) for i in infos if i is not None)
        return Held("float", specs, label=f"{width.bits} bits" if width else "codes that no rule describes")
    k = module.shape[1]
    ordered = width.order and bool(width.group)
    return Held(
        SCHEMES[width.bits],
        tuple(_specs(module, name, width, packing, index)),
        label=width.label,
        group=width.group if width.group < k else 0,
        grain=(1, k if ordered else width.group if 0 < width.group < k else 1),
        symmetric=width.symmetric,
        variant=packing.variant,
    )


def _has_weight(module: Module, index: Index) -> bool:
    return f"{stem(module, index)}.weight" in index.tensors


def _specs(module: Module, name: str, width: Width, packing: Packing, index: Index) -> Iterator[TensorSpec]:
    n, k = module.shape
    for suffix, dtype, shape in shapes(n, k, width, packing):
        yield TensorSpec(suffix, f"{name}.{suffix}", shape, FLOATS if suffix == "scales" else (dtype,))
    if (width.order and width.group) or f"{name}.g_idx" in index.tensors:
        yield TensorSpec("g_idx", f"{name}.g_idx", (k,), ("I32",))
    if module.bias or f"{name}.bias" in index.tensors:
        yield TensorSpec("bias", f"{name}.bias", (n,), FLOATS)


def shapes(n: int, k: int, width: Width, packing: Packing) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return suffix, dtype and shape of the three tensors that every quantized linear has."""
    groups = -(-k // width.group) if width.group else 1

    def words(count: int) -> int:
        return -(-count * width.bits // 32)

    codes = (words(k), n) if packing.along == "gptq" else (k, words(n))
    return [("qweight", "I32", codes), ("qzeros", "I32", (groups, words(n))), ("scales", "F16", (groups, n))]


def linears(modules: Sequence[Module]) -> Iterator[Module]:
    """Yield every linear, those of experts one by one."""
    for module in modules:
        if module.kind is Kind.LINEAR:
            yield module
        elif module.kind is Kind.EXPERTS:
            yield from (module.expert(e) for e in range(module.experts))


def stray(module: Module, index: Index, width: Width | None) -> str | None:
    """Say what of a linear's codes cannot be run, or None."""
    if not is_quantized(module, index):
        return None
    if width is None:
        return "codes in the file, and the config keeps them float"
    return f"{width.bits} bits" if width.bits not in SCHEMES else None


def stray_problems(found: Mapping[str, list[str]], where: str) -> list[Problem]:
    """Say which linears cannot be run, one problem a kind."""
    problems = []
    for what, names in found.items():
        by_bits = what.endswith(" bits")
        problems.append(
            Problem(
                "format-feature" if by_bits else "description-missing",
                f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} have {what}",
                where,
                "codes of 4 and of 8 bits have rows in the support table" if by_bits
                else "neither bits nor group size of these codes are said",
                "quantize to 4 or 8 bits" if by_bits else "use the config that was written with these weights",
            )
        )  # fmt: skip
    return problems


def without_codes(modules: Sequence[Module], index: Index, where: str) -> list[Problem]:
    """Problem `description-missing`: a config that declares codes beside a file that has none."""
    if any(is_quantized(module, index) for module in linears(modules)):
        return []
    return [
        Problem(
            "description-missing",
            "the config declares a quantization, and no linear of the file has codes",
            where,
            "weights and config are of different checkpoints",
            "use the config that was written with these weights   or   quantization.format=none",
        )
    ]


def number(value: object, default: int) -> int:
    """Return a whole number of a config, or the default where it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def group_of(value: object, default: int = 128) -> int:
    """Return a group size; -1 (one group) is 0."""
    size = number(value, default)
    return size if size > 0 else 0


def odd_values(given: Mapping[str, Any], kinds: Mapping[str, type | tuple[type, ...]], where: str) -> list[Problem]:
    """Problems `file-malformed`: keys of a config whose value has the wrong type, or is no width or group size."""
    types = {key: kind if isinstance(kind, tuple) else (kind,) for key, kind in kinds.items()}
    takes = {key: " or ".join(kind.__name__ for kind in kinds) for key, kinds in types.items()}
    takes |= dict.fromkeys(("group_size", "q_group_size"), "a group size of 1 or more, or -1")
    odd = [key for key, kind in types.items() if given.get(key) is not None and type(given[key]) not in kind]
    odd += [key for key in ("group_size", "q_group_size") if type(size := given.get(key)) is int and -1 != size < 1]
    return [
        Problem(
            "file-malformed",
            f"{key} of the quantization is {given[key]!r:.60}",
            where,
            f"it takes {takes[key]}",
            "use the config that was written with these weights",
        )
        for key in dict.fromkeys(odd)
    ]


def feature(what: str, where: str, why: str, fix: str) -> Problem:
    """A declared feature that is not run."""
    return Problem("format-feature", what, where, why, fix)


def assumed_words(
    modules: Sequence[Module], scheme: str, options: Mapping[str, Any], packing: Packing
) -> tuple[list[tuple[str, str, tuple[int, ...]]], dict[str, Width | None]]:
    """Return the tensors of a stand-in, and each quantizable module's width (None: float), by its name with `*`.

    Raises:
        InputError: `quant-type-unknown`, a scheme that is not kept in words; `pattern-syntax`.
    """
    bits = {name: count for count, name in SCHEMES.items()}
    rules = [(_pattern(str(rule["pattern"])), str(rule["scheme"])) for rule in options.get("layers", ())]
    for unknown in {scheme, *(asked for _, asked in rules)} - {"float", *bits}:
        near = nearest(unknown, bits)
        raise InputError(
            Problem(
                "quant-type-unknown",
                f"no checkpoint of this format holds scheme {unknown}",
                "model.assume",
                f"schemes: float, {', '.join(bits)}",
                f"model.assume.scheme={near[0] if near else 'w4a16'}",
            )
        )
    width = Width(group=group_of(options.get("group_size")), symmetric=bool(options.get("symmetric", True)))
    made: list[tuple[str, str, tuple[int, ...]]] = []
    widths: dict[str, Width | None] = {}
    for module in modules:
        asked = next((given for pattern, given in rules if pattern.fullmatch(module.names()[0])), scheme)
        if not module.quantizable or module.role is not Role.NONE or asked not in bits:
            made += assumed_float(module)
            if module.quantizable:
                widths[module.name] = None
            continue
        widths[module.name] = own = replace(width, bits=bits[asked])
        for name in module.names():
            made += [(f"{name}.{suffix}", dtype, shape) for suffix, dtype, shape in shapes(*module.shape, own, packing)]
            made += [(f"{name}.bias", "F16", (module.shape[0],))] if module.bias else []
    return made, widths


def _pattern(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern[3:] if pattern.startswith("re:") else translate(pattern))
    except re.error as error:
        raise InputError(
            Problem("pattern-syntax", f"{pattern} is not a regular expression: {error}", "model.assume.layers")
        ) from error
