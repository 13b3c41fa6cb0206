"""Where compressed-tensors files keep a module's tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import lcm
from typing import Any

from framework.checkpoint.index import Index
from framework.errors import Problem
from framework.formats.base import FLOATS, Assumed, Held, TensorSpec
from framework.formats.compressed_tensors.assumed import assume
from framework.formats.compressed_tensors.groups import FORMAT, PACKED, Group, declared, find
from framework.formats.compressed_tensors.tensors import ROWS_PER_BYTE, has_zeros, paired_tensors, tensors
from framework.formats.declared import settings
from framework.formats.names import stem
from framework.formats.plain.layout import float_tensors, held_float, ignorable_float
from framework.geometry import Kind, Module, Role

SUFFIXES = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    "weight_global_scale", "input_scale", "input_zero_point", "input_global_scale", "output_scale", "alpha", "bias",
)  # fmt: skip
# Schemes that differ in activations alone
SERVES = {"w8a8_static": ("w8a8_dynamic", "w8a16"), "w8a8_dynamic": ("w8a16",), "w4a8_dynamic": ("w4a16",)}

# Ways of a module not to be what the config says
FORGOTTEN, UNCOMPRESSED = "quantized in the file, and no group of the config says how", "quantized by the config alone"
LOOKED_UP = "quantized in the file, which embeddings cannot be"
UNLIKE = (
    Problem(
        "description-missing",
        FORGOTTEN,
        why="no target selects them by name, expression or the class Linear, or ignore does",
        fix="use the config.json that was saved with these weights",
    ),
    Problem(
        "description-missing",
        UNCOMPRESSED,
        why="their weights are float in the file: the model was saved without compression",
        fix="save it with save_compressed=True   or   list the modules under ignore",
    ),
    Problem(
        "embedding-quantized",
        LOOKED_UP,
        why="rows of an embedding are looked up in float",
        fix="a checkpoint that was quantized with its embedding under ignore",
    ),
)

_CACHE = re.compile(r"\.self_attn\.(?:(?:attn\.)?[qkv]_(?:scale|zero_point)|[kv]_proj\.output_scale)$")


class CompressedTensorsLayout:
    """Layout of compressed-tensors checkpoints (formats.base.Layout)."""

    name = FORMAT

    def detect(self, index: Index) -> str | None:
        """quantization_config says so."""
        given = settings(index, FORMAT)
        if not given:
            return None
        schemes = dict.fromkeys(group.scheme for group in declared(index).groups)
        return f"says compressed-tensors, format {given.get('format')}: {', '.join(schemes) or 'no groups'}"

    def held(self, module: Module, index: Index) -> Held:
        """What its group declares, in the form that the names of its tensors show."""
        group = _group(module, index) if module.kind is Kind.LINEAR else None
        if group is None or (group.weights is None and not group.faults):
            return _as_found(module, index) if _has_codes(module, index) else held_float(module, index)
        if group.faults or _is_float(module, index):
            return _as_found(module, index)
        return _quantized(module, index, group)

    def stacked(self, module: Module, index: Index) -> bool:
        """Every expert has tensors of its own."""
        return False

    def extras(self, index: Index) -> dict[str, list[TensorSpec]]:
        """Nothing beyond the modules."""
        return {}

    def ignorable(self, name: str, index: Index) -> str | None:
        """Buffers, vision towers, and scales of a quantized KV cache: ours is float."""
        if _CACHE.search(name):
            return "a scale of a quantized KV cache; the cache is kept in float"
        return ignorable_float(name)

    def faults(self, modules: Sequence[Module], index: Index) -> list[Problem]:
        """What is wrong with the config as a whole, then groups that cannot be run, then modules unlike their group."""
        refused: dict[Group, list[str]] = {}
        odd: dict[str, list[str]] = {}
        for module in _linears(modules):
            group = _group(module, index) if module.kind is Kind.LINEAR else None
            if group is not None and group.faults:
                refused.setdefault(group, []).append(module.name)
            elif reason := _unlike(module, index, group):
                odd.setdefault(reason, []).append(module.name)
        parsed = declared(index)
        unused: dict[Group, list[str]] = {
            group: [] for group in parsed.groups if group not in refused and _malformed(group)
        }
        where = f"{index.root.name}: config.json"
        return [
            *parsed.problems,
            *(_refusal(group, names, where) for group, names in {**refused, **unused}.items()),
            *(replace(p, what=f"{_count(odd[p.what])} {p.what}", where=where) for p in UNLIKE if p.what in odd),
        ]

    def stand_in(self, modules: Sequence[Module], scheme: str, options: dict[str, Any]) -> Assumed:
        """Return what LLM-Compressor would save with `scheme` on every linear but routers and heads.

        Options: `group_size` (-1: one scale a row), `symmetric` (of weight-only schemes), `layers` (ordered patterns
        with schemes of their own).

        Raises:
            InputError: `quant-type-unknown`, a scheme that the tool does not write.
        """
        return assume(modules, scheme, options)


def _group(module: Module, index: Index) -> Group | None:
    """Return a linear's group. The class Linear takes routers and heads only where the file has codes of them."""
    group, named = find(module, index)
    by_class = group is not None and not named
    return None if by_class and module.role is not Role.NONE and not _has_codes(module, index) else group


def _unlike(module: Module, index: Index, group: Group | None) -> str:
    """Say how a module is not what the config says: a key of UNLIKE, or nothing."""
    if module.kind is Kind.EMBEDDING:
        return LOOKED_UP if _has_codes(module, index) else ""
    if group is None or group.weights is None:
        return FORGOTTEN if _has_codes(module, index) else ""
    return UNCOMPRESSED if _is_float(module, index) else ""


def _quantized(module: Module, index: Index, group: Group) -> Held:
    weights = group.weights
    assert weights is not None
    name, (n, k) = stem(module, index), module.shape
    weight = index.tensors.get(f"{name}.weight")
    if weights.bits == 4 and weight is not None and weight.shape == (n // ROWS_PER_BYTE, k):
        return _paired(module, index, group)
    packed = f"{name}.weight_packed" in index.tensors or (weight is None and group.format == PACKED)
    if not weights.gathered and f"{name}.weight_g_idx" in index.tensors:
        weights = replace(weights, gathered=True)
        group = replace(group, weights=weights)
    word = 32 // weights.bits if packed else 1
    step = 1  # with one scale a row, every rank keeps it
    if 0 < weights.group < k:
        step = k if weights.gathered else weights.group
    return Held(
        group.scheme,
        tuple(_as_stored(spec, index) for spec in tensors(module, name, group, packed=packed)),
        group.label,
        weights.group,
        SERVES.get(group.scheme, ()),
        (word if packed and has_zeros(group) else 1, lcm(word, step)),
        weights.symmetric,
        "clip" if group.clip else "g_idx" if weights.gathered else "",
    )


def _paired(module: Module, index: Index, group: Group) -> Held:
    """Ascend's W4A8 layout: [N/2, K] pairs of rows; `bias` compensates the kernel's halves, `alpha` clips inputs."""
    specs = tuple(_as_stored(spec, index) for spec in paired_tensors(module, stem(module, index), group))
    return Held(group.scheme, specs, group.label, grain=(ROWS_PER_BYTE, 1), variant="clip" if group.clip else "paired")


def _as_stored(spec: TensorSpec, index: Index) -> TensorSpec:
    """A single value may have no or more dimensions."""
    info = index.tensors.get(spec.name)
    single = spec.shape == (1,) and info is not None and set(info.shape) <= {1}
    return spec._replace(shape=info.shape) if info is not None and single else spec


def _as_found(module: Module, index: Index) -> Held:
    """A module that is refused: what the file has of it counts as used, so that only the refusal is reported."""
    name = stem(module, index)
    infos = [info for suffix in SUFFIXES if (info := index.tensors.get(f"{name}.{suffix}"))]
    specs = tuple(TensorSpec(info.name.rpartition(".")[2], info.name, info.shape, (info.dtype,)) for info in infos)
    return Held("float", specs or float_tensors(module, index), label="unreadable")


def _has_codes(module: Module, index: Index) -> bool:
    name = stem(module, index)
    weight = index.tensors.get(f"{name}.weight")
    return f"{name}.weight_packed" in index.tensors or (
        weight is not None and weight.dtype not in FLOATS and f"{name}.weight_scale" in index.tensors
    )


def _is_float(module: Module, index: Index) -> bool:
    weight = index.tensors.get(f"{stem(module, index)}.weight")
    return weight is not None and weight.dtype in FLOATS


def _linears(modules: Iterable[Module]) -> Iterable[Module]:
    """Linears and embeddings, of experts one by one."""
    for module in modules:
        if module.kind is Kind.EXPERTS:
            yield from (module.expert(e) for e in range(module.experts))
        elif module.kind in (Kind.LINEAR, Kind.EMBEDDING):
            yield module


def _malformed(group: Group) -> bool:
    return any(fault.code == "file-malformed" for fault in group.faults)


def _refusal(group: Group, names: list[str], where: str) -> Problem:
    fixes = {
        "file-malformed": "use the config.json that was saved with these weights",
        "quant-type-unknown": "a checkpoint of a scheme that job=matrix lists",
        "format-feature": "a checkpoint of a scheme that job=matrix lists",
    }
    code = group.faults[0].code
    return Problem(
        code,
        f"{_count(names) if names else 'No module is'} quantized by {group.name}, which cannot be run",
        f"{where}, quantization_config.config_groups.{group.name}",
        "; ".join(dict.fromkeys(fault.why for fault in group.faults)),
        fixes[code],
    )


def _count(names: list[str]) -> str:
    return f"{names[0]} is" if len(names) == 1 else f"{names[0]} and {len(names) - 1} more are"
