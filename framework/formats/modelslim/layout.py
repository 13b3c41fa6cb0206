"""Where ModelSlim keeps a module's tensors: each linear by its own entry of the description."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from fnmatch import translate
from functools import lru_cache
from math import gcd
from typing import Any

from framework.checkpoint.index import Index
from framework.errors import InputError, Problem, nearest
from framework.formats.base import FLOATS, Assumed, Held, TensorSpec
from framework.formats.declared import DESCRIPTION
from framework.formats.modelslim.description import canonical, described, malformed, place
from framework.formats.modelslim.types import FLOAT, GROUPED_BY, REFUSED, TYPES, QuantType, shape_of
from framework.formats.names import stem
from framework.formats.plain.layout import assumed_float, held_float, ignorable_float
from framework.geometry import Kind, Module, Role

OUTER_BLOCK = 512  # input features that share an outer scale of two-level MX
TYPE_OF = {kind.scheme: name for name, kind in TYPES.items()}
_SUFFIXES = dict.fromkeys(t.suffix for kind in TYPES.values() for t in (*kind.tensors, *kind.optional)) | {"bias": None}
# The smoothed linear of a module stands under `.linear.`, the factor of its input beside it.
INNER = ".linear"
FACTORS = ("div.mul_scale", "mul_scale")

_IGNORED = (
    (re.compile(r"_proj\.kv_cache_(scale|offset)$"), "a scale of a quantized KV cache; the cache is kept in float"),
    (re.compile(r"\.fa3?_[qkv]\.(scale|offset)$"), "a scale of quantized attention; attention is kept in float"),
    (re.compile(r"\.[qk]_rot$"), "rotates queries and keys alike, which cancels where attention is float"),
    (re.compile(r"norm\.module\.(weight|bias)$"), "the norm's own tensors, written twice"),
)
# Tensors without which the weights beside them mean something else: endings, a part of the name, what and why.
_FEATURES: tuple[tuple[tuple[str, ...], str, str, str, str], ...] = (
    ((".heads_rotation", ".kronecker_rotation_m", ".kronecker_rotation_n"), "",
     "activations are rotated while the model runs", "online rotations are not applied here",
     "quantize with rotations folded into the weights (offline QuaRot)"),
    ((".left_trans", ".right_trans", ".clip_ratio"), "", "FlatQuant transforms activations while the model runs",
     "its transforms are not applied here", "quantize without FlatQuant"),
    ((".svd_lowrank_l1", ".svd_lowrank_l2"), "", "weights have a low-rank branch", "such branches are not run here",
     "quantize without the SVD residual"),
    ((".bias",), ".experts.", "routed experts have biases", "one grouped matmul runs all experts, and adds none",
     "smooth symmetrically, which shifts no activations"),
    ((".mul_scale",), ".experts.", "every routed expert scales its own input",
     "one grouped matmul runs all experts on inputs scaled alike", "fold the smoothing of experts into their weights"),
    ((".bias", ".mul_scale"), ".kv_b_proj.", "kv_b_proj has a bias or scales its input",
     "latent attention uses its weight alone", "leave kv_b_proj out of smoothing"),
)  # fmt: skip


class ModelslimLayout:
    """Layout of checkpoints that msModelSlim wrote (formats.base.Layout)."""

    name = "modelslim"

    def detect(self, index: Index) -> str | None:
        """A description says so."""
        counts = Counter(kind for name, kind in described(index).items() if name.endswith(".weight") and kind != FLOAT)
        kinds = ", ".join(f"{count} {kind}" for kind, count in counts.most_common())
        return f"says {kinds or 'that nothing is quantized'}"

    def held(self, module: Module, index: Index) -> Held:
        """What the entry of its weight says."""
        if module.kind is not Kind.LINEAR:
            return held_float(module, index)
        name, label = entry(module, index)
        kind, weight = TYPES.get(label), index.tensors.get(f"{name}.weight")
        if weight is not None and (weight.dtype in FLOATS) != (kind is None):
            return _as_found(name, label, index)
        return _float(module, name, index) if kind is None else _quantized(module, name, label, index)

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
                *_unlike(index), *_stale(modules, index), *_features(index)]  # fmt: skip

    def stand_in(self, modules: Sequence[Module], scheme: str, options: dict[str, Any]) -> Assumed:
        """Return the headers that msModelSlim would write.

        Raises:
            InputError: `format-feature`, a group size that leaves part of a group; `pattern-syntax`.
        """
        rules = [(_pattern(str(rule["pattern"])), str(rule["scheme"])) for rule in options.get("layers", ())]
        tensors: list[tuple[str, str, tuple[int, ...]]] = []
        described: dict[str, str] = {"version": "1.0.0", "model_quant_type": TYPE_OF.get(scheme, FLOAT)}
        for module in modules:
            label = TYPE_OF.get(_asked(module, scheme, rules), FLOAT)
            made = assumed_float(module) if label == FLOAT else list(_assumed(module, TYPES[label], options))
            tensors += made
            described |= {name: FLOAT if name.endswith(".bias") else label for name, _, _ in made}
        return Assumed(tuple(tensors), {DESCRIPTION: described}, {})


def entry(module: Module, index: Index) -> tuple[str, str]:
    """Return the name before the suffixes of a linear's tensors, and its value in the description."""
    name, entries = stem(module, index), described(index)
    label = entries.get(f"{name}.weight")
    if label is None:
        label = entries.get(f"{name}{INNER}.weight")
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


def _float(module: Module, name: str, index: Index) -> Held:
    """A linear that is not quantized; smoothing of the norm before it may have left it a bias."""
    held = held_float(module, index)
    if module.bias or f"{name}.bias" not in index.tensors:
        return held
    return held._replace(tensors=(*held.tensors, TensorSpec("bias", f"{name}.bias", (module.shape[0],), FLOATS)))


def _as_found(name: str, label: str, index: Index) -> Held:
    """A linear unlike its entry: what the file has of it counts as used, so that only `faults` speaks of it."""
    infos = [info for suffix in _SUFFIXES if (info := index.tensors.get(f"{name}.{suffix}"))]
    specs = (TensorSpec(info.name.removeprefix(f"{name}."), info.name, info.shape, (info.dtype,)) for info in infos)
    return Held("float", tuple(specs), label)


def _quantized(module: Module, name: str, label: str, index: Index) -> Held:
    n, k = module.shape
    groups = _groups(name, label, k, index)
    entries, tensors = described(index), index.tensors
    specs = []
    for suffix, shapes, dtypes, optional in _forms(label, n, k, groups):
        full = f"{name}.{suffix}"
        info = tensors.get(full)
        if optional and info is None and full not in entries:
            continue
        shape = info.shape if info is not None and info.shape in shapes else shapes[0]
        specs.append(TensorSpec(suffix, full, shape, dtypes))
    if module.bias or f"{name}.bias" in tensors:
        specs.append(TensorSpec("bias", f"{name}.bias", (n,), FLOATS))
    if (scaled := factor(module, index)) is not None:
        specs.append(TensorSpec("mul_scale", scaled, (k,), FLOATS))
    return Held(TYPES[label].scheme, tuple(specs), *_terms(label, n, k, groups, specs[0].shape))


@lru_cache(maxsize=1024)
def _terms(
    label: str, n: int, k: int, groups: int, stored: tuple[int, ...]
) -> tuple[str, int, tuple[str, ...], tuple[int, int], bool]:
    """Return label, group, further schemes, grain and symmetry of linears of a shape, whose codes are `stored`."""
    kind = TYPES[label]
    group = kind.block or (-(-k // groups) if groups > 1 else 0)
    columns = OUTER_BLOCK if kind.scheme == "mxfp4_dualscale" else max(group, 2 if stored[1] * 2 == k else 1)
    grain = (2 if stored[0] * 2 == n else 1, columns)
    said = f"{label}, groups of {group}" if group and not kind.block else label
    return said, group, kind.serves, grain, kind.scheme not in ("w4a16", "w8a16")


def _groups(name: str, label: str, k: int, index: Index) -> int:
    """Scales of a row, as the file has them; 1 where groups of K / scales would not be whole."""
    suffix = GROUPED_BY[label]
    info = index.tensors.get(f"{name}.{suffix}") if suffix else None
    if info is None or len(info.shape) != 2:
        return 1
    groups = info.shape[1]
    return groups if groups and k % groups == 0 else 1


@lru_cache(maxsize=1024)
def _forms(label: str, n: int, k: int, groups: int) -> list[tuple[str, list[tuple[int, ...]], tuple[str, ...], bool]]:
    """Return suffix, shapes, dtypes and whether it may be absent, of each tensor that linears of this shape have."""
    kind = TYPES[label]
    return [
        (tensor.suffix, [shape_of(notation, n, k, groups) for notation in tensor.shapes], tensor.dtypes, optional)
        for tensors, optional in ((kind.tensors, False), (kind.optional, True))
        for tensor in tensors
    ]


def _linears(modules: Sequence[Module]) -> Iterator[Module]:
    for module in modules:
        if module.kind is Kind.LINEAR:
            yield module
        elif module.kind is Kind.EXPERTS:
            yield from (module.expert(e) for e in range(module.experts))


def _malformed(index: Index) -> list[Problem]:
    """Entries of tensors whose value is no word."""
    odd = malformed(index)
    if not odd:
        return []
    name, kind = next(iter(odd.items()))
    return [
        Problem(
            "file-malformed",
            f"the description gives {name}{_more(len(odd))} a value that is no quant type",
            place(index),
            f"it is {kind!r:.60}",
            "use the description that was written with these weights",
        )
    ]


def _unknown(modules: Sequence[Module], index: Index) -> list[Problem]:
    found: dict[str, list[str]] = {}
    strange = set(described(index).values()) - TYPES.keys() - {FLOAT}
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
                f"quant type {label} of {_linear(len(names))} cannot be run: {names[0]}{_more(len(names))}",
                place(index),
                why,
                f"is {like[0]} meant?" if like and label not in REFUSED else "quantize with a type that is run here",
            )
        )
    return problems


def _embeddings(modules: Sequence[Module], index: Index) -> list[Problem]:
    problems = []
    for module in modules:
        label = described(index).get(f"{stem(module, index)}.weight", FLOAT)
        if module.kind is Kind.EMBEDDING and label != FLOAT:
            problems.append(
                Problem(
                    "embedding-quantized",
                    f"{module.name} is {label} in the file, embeddings must be float",
                    place(index),
                    "rows of an embedding are looked up in float; no op of the tables takes codes",
                    "quantize again with the embedding disabled (disable_names in msmodelslim)",
                )
            )
    return problems


def _unlike(index: Index) -> list[Problem]:
    """Weights whose tensors and description do not speak of the same thing."""
    entries, odd = described(index), malformed(index)
    silent, float_held = [], []
    for name, info in index.tensors.items():
        if not name.endswith(".weight") or name in odd:
            continue
        label = entries.get(name)
        if info.dtype not in FLOATS and label in (None, FLOAT):
            silent.append((name, "no entry" if label is None else "the entry FLOAT", info.dtype))
        elif info.dtype in FLOATS and label in TYPES:
            float_held.append((name, f"the entry {label}", info.dtype))
    return [
        Problem(
            "description-missing",
            f"{found[0][0]}{_more(len(found))} {'has' if len(found) == 1 else 'have'} {found[0][1]} in the description "
            f"and {found[0][2]} weights",
            place(index),
            "loaded as the description says, the model would compute with codes as if they were weights",
            "use the description that was written with these weights",
        )
        for found in (silent, float_held)
        if found
    ]


def _stale(modules: Sequence[Module], index: Index) -> list[Problem]:
    """Quantized weights of the description that the file lacks and no module asks for (the ledger has the others)."""
    entries = described(index)
    strays = [name for name in entries if name not in index.tensors and name.endswith(".weight")]
    strays = [name for name in strays if entries[name] != FLOAT]
    if strays:
        asked = {f"{module.name}{inner}.weight" for module in _linears(modules) for inner in ("", INNER)}
        strays = [name for name in strays if canonical(name) not in asked]
    return [
        Problem(
            "description-missing",
            f"the description has an entry for {name}{_more(len(strays))}, the file no tensor and the model no linear",
            place(index),
            f"it says {entries[name]}; what is described wrongly here may be wrong elsewhere",
            "use the description that was written with these weights",
        )
        for name in strays[:1]
    ]


def _features(index: Index) -> list[Problem]:
    endings = tuple(ending for feature in _FEATURES for ending in feature[0])
    marked = [name for name in index.tensors if name.endswith(endings)]
    problems = []
    for ends, within, what, why, fix in _FEATURES:
        if found := [name for name in marked if name.endswith(ends) and within in name]:
            where = index.tensors[found[0]].file.name
            problems.append(Problem("format-feature", f"{what}: {found[0]}{_more(len(found))}", where, why, fix))
    return problems


def _linear(count: int) -> str:
    return "1 linear" if count == 1 else f"{count} linears"


def _more(count: int) -> str:
    return f" and {count - 1} more" if count > 1 else ""


def _asked(module: Module, scheme: str, rules: Sequence[tuple[re.Pattern[str], str]]) -> str:
    """Return the scheme that a stand-in gives a module."""
    if not module.quantizable or module.role is not Role.NONE:
        return "float"
    name = module.names()[0]
    return next((asked for pattern, asked in rules if pattern.fullmatch(name)), scheme)


def _pattern(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern[3:] if pattern.startswith("re:") else translate(pattern))
    except re.error as error:
        raise InputError(
            Problem(
                "pattern-syntax",
                f"{pattern} is not a regular expression: {error}",
                "model.assume.layers",
                fix="mend the expression   or   write a glob, without re:",
            )
        ) from error


def _assumed(module: Module, kind: QuantType, options: dict[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    n, k = module.shape
    size = int(options.get("group_size") or 0)
    grouped = 0 < size < k and any("N G" in tensor.shapes for tensor in kind.tensors + kind.optional)
    if grouped and k % size:
        raise _uneven(module, size)
    groups = k // size if grouped else 1
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


def _uneven(module: Module, size: int) -> InputError:
    k = module.shape[1]
    return InputError(
        Problem(
            "format-feature",
            f"groups of {size} do not divide the {k} input features of {module.name}",
            "model.assume.group_size",
            "the tool writes whole groups only",
            f"model.assume.group_size={gcd(k, size)}",
        )
    )
