"""Where compressed-tensors files keep a module's tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from fnmatch import translate
from math import lcm
from typing import Any

from framework.checkpoint.index import Index
from framework.errors import InputError, Problem, nearest
from framework.formats.base import FLOATS, Assumed, Held, TensorSpec
from framework.formats.compressed_tensors.groups import CODES, FORMAT, PACKED, Declared, Group, declared, find, parse
from framework.formats.declared import settings
from framework.formats.names import stem
from framework.formats.plain.layout import assumed_float, float_tensors, held_float, ignorable_float
from framework.geometry import Kind, Module, Role

# Ascend's converter packs two rows of int4 in a byte and keeps the fp32 bits of a scale in 64
ROWS_PER_BYTE = 2
SCALE_BITS = ("I64", "U64", "F32")
SUFFIXES = (
    "weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx",
    "weight_global_scale", "input_scale", "input_zero_point", "input_global_scale", "output_scale", "alpha", "bias",
)  # fmt: skip
# Schemes that differ in activations alone
SERVES = {"w8a8_static": ("w8a8_dynamic", "w8a16"), "w8a8_dynamic": ("w8a16",), "w4a8_dynamic": ("w4a16",)}
GROUP_SIZE = 128
_TOKEN = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
_STATIC = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
# scheme: bits, activations, format, by group unless asked otherwise; what the tool's presets of these names say
MADE: dict[str, tuple[int, dict[str, Any] | None, str, bool]] = {
    "w4a16": (4, None, PACKED, True),
    "w8a16": (8, None, PACKED, True),
    "w4a8_dynamic": (4, _TOKEN, CODES, True),
    "w8a8_dynamic": (8, _TOKEN, CODES, False),
    "w8a8_static": (8, _STATIC, CODES, False),
}

# Ways of a module not to be what the config says: code, why, what would work
FORGOTTEN, UNCOMPRESSED = "quantized in the file, and no group of the config says how", "quantized by the config alone"
LOOKED_UP = "quantized in the file, which embeddings cannot be"
UNLIKE = {
    FORGOTTEN: (
        "description-missing",
        "no target selects them by name, expression or the class Linear, or ignore does",
        "use the config.json that was saved with these weights",
    ),
    UNCOMPRESSED: (
        "description-missing",
        "their weights are float in the file: the model was saved without compression",
        "save it with save_compressed=True   or   list the modules under ignore",
    ),
    LOOKED_UP: (
        "embedding-quantized",
        "rows of an embedding are looked up in float",
        "a checkpoint that was quantized with its embedding under ignore",
    ),
}

_Part = tuple[str, tuple[int, ...], tuple[str, ...]]  # role, shape, dtypes
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
            *(Problem(code, f"{_count(odd[what])} {what}", where, why, fix)
              for what, (code, why, fix) in UNLIKE.items() if what in odd),
        ]  # fmt: skip

    def stand_in(self, modules: Sequence[Module], scheme: str, options: dict[str, Any]) -> Assumed:
        """Return what LLM-Compressor would save with `scheme` on every linear but routers and heads.

        Options: `group_size` (-1: one scale a row), `symmetric` (of weight-only schemes), `layers` (ordered patterns
        with schemes of their own).

        Raises:
            InputError: `quant-type-unknown`, a scheme that the tool does not write.
        """
        rules = [(_regex(str(rule["pattern"])), str(rule["scheme"])) for rule in options.get("layers", ())]
        given = [*rules, ("Linear", scheme)]
        groups = {
            f"group_{i}": {"targets": [target], **_made(asked, options)} for i, (target, asked) in enumerate(given)
        }
        formats = {group["format"] for group in groups.values() if group.get("weights")}
        config = {
            "quant_method": "compressed-tensors",
            "format": formats.pop() if len(formats) == 1 else "mixed-precision" if formats else "dense",
            "config_groups": groups,
            "ignore": [module.name for module in modules if module.role is not Role.NONE and module.quantizable],
            "quantization_status": "compressed",
        }
        parsed = parse(config)
        made = [entry for module in modules for entry in _assumed(module, parsed)]
        return Assumed(tuple(made), {}, {"quantization_config": config})


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
    assert group.weights is not None
    name, (n, k) = stem(module, index), module.shape
    weight = index.tensors.get(f"{name}.weight")
    if group.weights.bits == 4 and weight is not None and weight.shape == (n // ROWS_PER_BYTE, k):
        return _paired(module, index, group)
    packed = f"{name}.weight_packed" in index.tensors or (weight is None and group.format == PACKED)
    gathered = group.weights.gathered or f"{name}.weight_g_idx" in index.tensors
    group = replace(group, weights=replace(group.weights, gathered=gathered))
    assert group.weights is not None
    word = 32 // group.weights.bits if packed else 1
    # with groups by g_idx, or only one, every rank keeps all scales
    whole_groups = group.weights.group if not gathered and group.weights.group < k else 1
    return Held(
        group.scheme,
        tuple(_as_stored(spec, index) for spec in tensors(module, name, group, packed=packed)),
        group.label,
        group.weights.group,
        SERVES.get(group.scheme, ()),
        (word if packed and _has_zeros(group) else 1, lcm(word, whole_groups or 1)),
        group.weights.symmetric,
        "clip" if group.clip else "g_idx" if gathered else "",
    )


def tensors(module: Module, name: str, group: Group, *, packed: bool) -> tuple[TensorSpec, ...]:
    """Return the tensors of a module [N, K] of a group, names starting with `name`; roles are the names' ends.

    packed: words int32 [N, ceil(K*bits/32)] and zero points int32 [ceil(N*bits/32), groups]; else int8 codes [N, K]
    and zero points like the scales, float [N, groups], of one value by tensor.
    """
    assert group.weights is not None
    weights, (n, k) = group.weights, module.shape
    columns = -(-k // weights.group) if weights.group else 1
    scale = (1,) if weights.strategy == "tensor" else (n, columns)
    found: list[_Part] = []
    if packed:
        found.append(("weight_packed", (n, -(-k * weights.bits // 32)), ("I32",)))
        found.append(("weight_shape", (2,), ("I64", "I32")))
    else:
        found.append(("weight", (n, k), ("I8",)))
    found.append(("weight_scale", scale, FLOATS))
    if _has_zeros(group):
        words = packed and len(scale) > 1
        shape = (-(-n * weights.bits // 32), columns) if words else scale
        found.append(("weight_zero_point", shape, ("I32",) if words else ("I8",)))
    if weights.gathered:
        found.append(("weight_g_idx", (k,), ("I32",)))
    if group.inputs is not None and not group.inputs.dynamic:
        found.append(("input_scale", (1,), FLOATS))
        if not group.inputs.symmetric:
            found.append(("input_zero_point", (1,), ("I8",)))
    if module.bias:
        found.append(("bias", (n,), FLOATS))
    return _specs(module, name, group, found)


def _specs(module: Module, name: str, group: Group, found: list[_Part]) -> tuple[TensorSpec, ...]:
    if group.clip and module.name.endswith(".down_proj"):
        found = [*found, ("alpha", (1,), ("F32",))]
    return tuple(TensorSpec(role, f"{name}.{role}", shape, dtypes) for role, shape, dtypes in found)


def _paired(module: Module, index: Index, group: Group) -> Held:
    """Ascend's W4A8 layout: [N/2, K] pairs of rows; `bias` compensates the kernel's halves, `alpha` clips inputs."""
    n, k = module.shape
    found: list[_Part] = [
        ("weight", (n // ROWS_PER_BYTE, k), ("I8",)),
        ("weight_scale", (n, 1), SCALE_BITS),
        ("bias", (n,), ("F32",)),
    ]
    specs = tuple(_as_stored(spec, index) for spec in _specs(module, stem(module, index), group, found))
    return Held(group.scheme, specs, group.label, grain=(ROWS_PER_BYTE, 1), variant="clip" if group.clip else "paired")


def _as_stored(spec: TensorSpec, index: Index) -> TensorSpec:
    """A single value may have no or more dimensions."""
    info = index.tensors.get(spec.name)
    single = spec.shape == (1,) and info is not None and set(info.shape) <= {1}
    return replace(spec, shape=info.shape) if info is not None and single else spec


def _as_found(module: Module, index: Index) -> Held:
    """A module that is refused: what the file has of it counts as used, so that only the refusal is reported."""
    name = stem(module, index)
    infos = [info for suffix in SUFFIXES if (info := index.tensors.get(f"{name}.{suffix}"))]
    specs = tuple(TensorSpec(info.name.rpartition(".")[2], info.name, info.shape, (info.dtype,)) for info in infos)
    return Held("float", specs or float_tensors(module, index), label="unreadable")


def _has_zeros(group: Group) -> bool:
    return group.weights is not None and not group.weights.symmetric


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


def _assumed(module: Module, parsed: Declared) -> list[tuple[str, str, tuple[int, ...]]]:
    names = module.names()
    group: Group | None = parsed.find((names[0],))[0] if module.quantizable and not module.role else None
    if group is None or group.weights is None:
        return assumed_float(module)
    found = (spec for name in names for spec in tensors(module, name, group, packed=group.format == PACKED))
    return [(spec.name, spec.dtypes[0], spec.shape) for spec in found]


def _made(scheme: str, options: dict[str, Any]) -> dict[str, Any]:
    if scheme == "float":
        return {"weights": None, "input_activations": None, "format": "dense"}
    if scheme not in MADE:
        near = nearest(scheme, MADE)
        raise InputError(
            Problem(
                "quant-type-unknown",
                f"no compressed-tensors checkpoint of scheme {scheme} is written by its tools",
                "model.assume",
                f"schemes: float, {', '.join(MADE)}",
                f"model.assume.scheme={near[0] if near else 'w8a8_dynamic'}",
            )
        )
    bits, inputs, form, grouped = MADE[scheme]
    size = options.get("group_size", GROUP_SIZE) if grouped else -1
    weights = {"num_bits": bits, "type": "int", "symmetric": inputs is not None or options.get("symmetric", True)}
    by_group = {"strategy": "group", "group_size": size} if size > 0 else {"strategy": "channel", "group_size": None}
    return {"weights": weights | by_group, "input_activations": inputs, "format": form}


def _regex(pattern: str) -> str:
    """A glob over whole names, or `re:` and an expression, as a target, which need not match to the end."""
    return f"re:(?:{pattern[3:]})\\Z" if pattern.startswith("re:") else f"re:{translate(pattern)}"
