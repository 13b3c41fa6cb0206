"""Where ModelSlim keeps a module's tensors: each linear by its own entry of the description."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

from framework.checkpoint.index import Index
from framework.errors import Problem, nearest
from framework.formats.base import FLOATS, Assumed, Held, TensorSpec
from framework.formats.declared import DESCRIPTION, settings
from framework.formats.modelslim.types import FLOAT, REFUSED, TYPES, QuantType, Tensor, shape_of
from framework.formats.names import stem
from framework.formats.plain.layout import assumed_float, held_float, ignorable_float
from framework.geometry import Kind, Module, Role

GROUP_SIZE = 128  # of a stand-in whose recipe does not say
TYPE_OF = {kind.scheme: name for name, kind in TYPES.items()}
# The smoothed linear of a module stands under `.linear.`, the factor of its input beside it.
INNER = ".linear"
FACTORS = ("div.mul_scale", "mul_scale")

_KV_CACHE = re.compile(r"\.[kv]_proj\.kv_cache_(scale|offset)$")
_IGNORED = (
    (_KV_CACHE, "a scale of a quantized KV cache; the cache is kept in float"),
    (re.compile(r"\.fa_[qkv]\.(scale|offset)$"), "a scale of quantized attention; attention is kept in float"),
    (re.compile(r"\.[qk]_rot$"), "rotates queries and keys alike, which cancels where attention is float"),
    (re.compile(r"norm\.module\.(weight|bias)$"), "the norm's own tensors, written twice"),
)
_ROTATIONS = re.compile(r"\.(heads_rotation|kronecker_rotation_[mn])$")


class ModelslimLayout:
    """Layout of checkpoints that msModelSlim wrote (formats.base.Layout)."""

    name = "modelslim"

    def detect(self, index: Index) -> str | None:
        """A description says so."""
        counts = Counter(kind for name, kind in _described(index).items() if name.endswith(".weight") and kind != FLOAT)
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
        return f"says {kinds or 'that nothing is quantized'}"

    def held(self, module: Module, index: Index) -> Held:
        """What the entry of its weight says."""
        if module.kind is not Kind.LINEAR:
            return held_float(module, index)
        name, label = entry(module, index)
        kind = TYPES.get(label)
        return held_float(module, index) if kind is None else _quantized(module, name, label, kind, index)

    def stacked(self, module: Module, index: Index) -> bool:
        """Every expert has tensors of its own."""
        return False

    def extras(self, index: Index) -> dict[str, list[TensorSpec]]:
        """Nothing beyond the modules."""
        return {}

    def ignorable(self, name: str, index: Index) -> str | None:
        """Scales of a quantized cache or attention, rotations that cancel, duplicates."""
        return next((why for pattern, why in _IGNORED if pattern.search(name)), None) or ignorable_float(name)

    def faults(self, modules: Sequence[Module], index: Index) -> list[Problem]:
        """Values that nobody runs, quantized embeddings, entries without tensors, codes without entries."""
        return [*_malformed(index), *_unknown(modules, index), *_embeddings(modules, index),
                *_unlike(index), *_rotated(index)]  # fmt: skip

    def stand_in(self, modules: Sequence[Module], scheme: str, options: dict[str, Any]) -> Assumed:
        """Return the headers that msModelSlim would write."""
        tensors: list[tuple[str, str, tuple[int, ...]]] = []
        described: dict[str, str] = {"version": "1.0.0", "model_quant_type": TYPE_OF.get(scheme, FLOAT)}
        for module in modules:
            label = TYPE_OF.get(_asked(module, scheme, options), FLOAT)
            made = assumed_float(module) if label == FLOAT else list(_assumed(module, TYPES[label], options))
            tensors += made
            described |= {name: FLOAT if name.endswith(".bias") else label for name, _, _ in made}
        return Assumed(tuple(tensors), {DESCRIPTION: described}, {})


def entry(module: Module, index: Index) -> tuple[str, str]:
    """Return the name before the suffixes of a linear's tensors, and its value in the description."""
    name, described = stem(module, index), _described(index)
    label = described.get(f"{name}.weight")
    if label is None:
        label = described.get(f"{name}{INNER}.weight")
        if label is not None:
            return name + INNER, label
    return name, FLOAT if label is None else label


def factor(module: Module, index: Index) -> str | None:
    """Return the name of the tensor that multiplies a linear's input, if the file has one."""
    if not _has_factors(index):
        return None
    name = stem(module, index)
    return next((f"{name}.{suffix}" for suffix in FACTORS if f"{name}.{suffix}" in index.tensors), None)


@lru_cache(maxsize=8)
def _has_factors(index: Index) -> bool:
    return any(name.endswith(FACTORS[1]) for name in index.tensors)


@lru_cache(maxsize=8)
def _described(index: Index) -> Mapping[str, str]:
    """The entries of tensors: keys with a dot whose value is a string."""
    return {name: kind for name, kind in settings(index, "modelslim").items() if isinstance(kind, str) and "." in name}


def _quantized(module: Module, name: str, label: str, kind: QuantType, index: Index) -> Held:
    n, k = module.shape
    groups = _groups(name, kind, index)
    described, tensors = _described(index), index.tensors
    specs = [_spec(tensor, name, n, k, groups, index) for tensor in kind.tensors]
    for tensor in kind.optional:
        full = f"{name}.{tensor.suffix}"
        if full in tensors or full in described:
            specs.append(_spec(tensor, name, n, k, groups, index))
    if module.bias or f"{name}.bias" in tensors:
        specs.append(TensorSpec("bias", f"{name}.bias", (n,), FLOATS))
    if (scaled := factor(module, index)) is not None:
        specs.append(TensorSpec("mul_scale", scaled, (k,), FLOATS))
    group = kind.block or (-(-k // groups) if groups > 1 else 0)
    first = specs[0].shape
    grain = (2 if first[0] * 2 == n else 1, max(group, 2 if first[1] * 2 == k else 1))
    said = f"{label}, groups of {group}" if group and not kind.block else label
    symmetric = kind.scheme not in ("w4a16", "w8a16")
    return Held(kind.scheme, tuple(specs), said, group, kind.serves, grain, symmetric)


def _groups(name: str, kind: QuantType, index: Index) -> int:
    """Scales of a row, as the file has them."""
    if kind.block:
        return 1
    for suffix in ("weight_scale_second", "weight_scale"):
        info = index.tensors.get(f"{name}.{suffix}")
        if info is not None and len(info.shape) == 2:
            return max(info.shape[1], 1)
    return 1


def _spec(tensor: Tensor, name: str, n: int, k: int, groups: int, index: Index) -> TensorSpec:
    full = f"{name}.{tensor.suffix}"
    shape = shape_of(tensor.shapes[0], n, k, groups)
    if len(tensor.shapes) > 1 and (info := index.tensors.get(full)) is not None and info.shape != shape:
        others = (shape_of(notation, n, k, groups) for notation in tensor.shapes[1:])
        shape = next((other for other in others if other == info.shape), shape)
    return TensorSpec(tensor.suffix, full, shape, tensor.dtypes)


def _linears(modules: Sequence[Module]) -> Iterator[Module]:
    for module in modules:
        if module.kind is Kind.LINEAR:
            yield module
        elif module.kind is Kind.EXPERTS:
            yield from (module.expert(e) for e in range(module.experts))


def _malformed(index: Index) -> list[Problem]:
    """Entries of tensors whose value is no word (keys without a dot are the tool's own notes)."""
    odd = [name for name, kind in settings(index, "modelslim").items() if "." in name and not isinstance(kind, str)]
    if not odd:
        return []
    return [
        Problem(
            "quant-type-unknown",
            f"the description gives {odd[0]}{_more(len(odd))} a value that is no quant type",
            f"{index.root.name}/{DESCRIPTION}",
            f"it is {settings(index, 'modelslim')[odd[0]]!r:.60}",
            "use the description that was written with these weights",
        )
    ]


def _unknown(modules: Sequence[Module], index: Index) -> list[Problem]:
    found: dict[str, list[str]] = {}
    strange = set(_described(index).values()) - TYPES.keys() - {FLOAT}
    for module in _linears(modules) if strange else ():
        label = entry(module, index)[1]
        if label != FLOAT and label not in TYPES:
            found.setdefault(label, []).append(module.name)
    problems = []
    for label, names in found.items():
        like = nearest(label, TYPES)
        why = REFUSED.get(label, f"known: {FLOAT}, {', '.join(TYPES)}")
        problems.append(
            Problem(
                "quant-type-unknown",
                f"quant type {label} of {len(names)} linears cannot be run: {names[0]}{_more(len(names))}",
                f"{index.root.name}/{DESCRIPTION}",
                why,
                f"is {like[0]} meant?" if like and label not in REFUSED else "quantize with a type that is run here",
            )
        )
    return problems


def _embeddings(modules: Sequence[Module], index: Index) -> list[Problem]:
    problems = []
    for module in modules:
        label = _described(index).get(f"{stem(module, index)}.weight", FLOAT)
        if module.kind is Kind.EMBEDDING and label != FLOAT:
            problems.append(
                Problem(
                    "embedding-quantized",
                    f"{module.name} is {label} in the file, embeddings must be float",
                    f"{index.root.name}/{DESCRIPTION}",
                    "rows of an embedding are looked up in float; no op of the tables takes codes",
                    "quantize again with the embedding disabled (disable_names in msmodelslim)",
                )
            )
    return problems


def _unlike(index: Index) -> list[Problem]:
    """Weights whose tensors and description do not speak of the same thing."""
    described = _described(index)
    silent, float_held = [], []
    for name, info in index.tensors.items():
        if not name.endswith(".weight"):
            continue
        label = described.get(name)
        if info.dtype not in FLOATS and label in (None, FLOAT):
            silent.append((name, "no entry" if label is None else "the entry FLOAT", info.dtype))
        elif info.dtype in FLOATS and label in TYPES:
            float_held.append((name, f"the entry {label}", info.dtype))
    return [
        Problem(
            "description-missing",
            f"{found[0][0]}{_more(len(found))} have {found[0][1]} in the description and {found[0][2]} weights",
            f"{index.root.name}/{DESCRIPTION}",
            "loaded as the description says, the model would compute with codes as if they were weights",
            "use the description that was written with these weights",
        )
        for found in (silent, float_held)
        if found
    ]


def _rotated(index: Index) -> list[Problem]:
    found = [name for name in index.tensors if _ROTATIONS.search(name)]
    if not found:
        return []
    return [
        Problem(
            "format-feature",
            f"the file rotates activations while it runs: {found[0]}{_more(len(found))}",
            index.tensors[found[0]].file.name,
            "online rotations are not applied here, and without them the weights give garbage",
            "quantize with rotations folded into the weights (offline QuaRot)",
        )
    ]


def _more(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""


def _asked(module: Module, scheme: str, options: dict[str, Any]) -> str:
    """Return the scheme that a stand-in gives a module."""
    if not module.quantizable or module.role is not Role.NONE:
        return "float"
    rules = options.get("layers", ())
    return next((str(rule["scheme"]) for rule in rules if fnmatchcase(module.name, rule["pattern"])), scheme)


def _assumed(module: Module, kind: QuantType, options: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    n, k = module.shape
    size = int(options.get("group_size") or 0)
    groups = -(-k // size) if size and size < k else 1
    second = kind.optional if kind.scheme == "w4a8_dynamic" else ()
    tensors = [*kind.tensors, *(t for t in second if groups > 1 or t.suffix == "scale_bias")]
    shapes = []
    for tensor in tensors:
        notation = tensor.shapes[0]
        if tensor.suffix == "weight" and kind.scheme == "w4a16" and groups > 1:
            notation = tensor.shapes[1]  # by group the tool packs two rows in a byte
        if tensor.suffix == "scale_bias" and module.name.endswith(("down_proj", "o_proj")):
            notation = tensor.shapes[1]  # sixteen partial sums
        shapes.append((tensor.suffix, tensor.dtypes[0], shape_of(notation, n, k, groups)))
    if module.bias:
        shapes.append(("bias", "F32", (n,)))
    for name in module.names():
        yield from ((f"{name}.{suffix}", dtype, shape) for suffix, dtype, shape in shapes)
