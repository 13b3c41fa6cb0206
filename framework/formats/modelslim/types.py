"""The quant types of ModelSlim: which tensors each keeps of a linear (msmodelslim 26.1.0's savers), as data."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

SCALES = ("F32", "BF16", "F16")


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a linear: its suffix, shapes it may have, dtypes.

    A shape is written in N, K, G (groups along K, as many as the file has), B (blocks of 32), D (blocks of 512), with
    `/2` for two codes a byte. The first of several is what the tool writes by default.
    """

    suffix: str
    shapes: tuple[str, ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class QuantType:
    """A value of the description.

    `optional` tensors must be there if the description lists them. `block` is the group that the type itself fixes.
    `serves`: further schemes that the same tensors serve.
    """

    scheme: str
    bits: int
    tensors: tuple[Tensor, ...]
    optional: tuple[Tensor, ...] = ()
    element: str = "int"
    block: int = 0
    serves: tuple[str, ...] = ()


def _scales(shape: str, *suffixes: str) -> tuple[Tensor, ...]:
    return tuple(Tensor(suffix, (shape,), SCALES) for suffix in suffixes)


_ROW = _scales("N 1", "weight_scale", "weight_offset")
_GROUPED = _scales("N G", "weight_scale", "weight_offset")
_INT8 = Tensor("weight", ("N K",), ("I8",))
_FP4 = Tensor("weight", ("N K/2",), ("U8",))
_E8M0 = Tensor("weight_scale", ("N B",), ("U8",))
_STATIC = (
    _INT8,
    Tensor("input_scale", ("1",), SCALES),
    Tensor("input_offset", ("1",), SCALES),
    Tensor("quant_bias", ("N",), ("I32",)),
    Tensor("deq_scale", ("N",), ("F32", "I64")),
)
_SECOND = (
    Tensor("weight_scale_second", ("N G",), SCALES),
    Tensor("weight_offset_second", ("N G",), ("I64", *SCALES)),
    Tensor("scale_bias", ("N 1", "N 16"), SCALES),
)

TYPES: dict[str, QuantType] = {
    "W8A8": QuantType("w8a8_static", 8, _STATIC, _ROW),
    "W8A8_MIX": QuantType("w8a8_mix", 8, (*_STATIC, *_ROW), serves=("w8a8_dynamic", "w8a8_static")),
    "W8A8_DYNAMIC": QuantType("w8a8_dynamic", 8, (_INT8, *_GROUPED), serves=("w8a16",)),
    "W4A4_DYNAMIC": QuantType("w4a4_dynamic", 4, (Tensor("weight", ("N K", "N/2 K"), ("I8",)), *_GROUPED)),
    "W4A8_DYNAMIC": QuantType(
        "w4a8_dynamic", 4, (Tensor("weight", ("N/2 K", "N K"), ("I8",)), *_ROW), _SECOND, serves=("w4a16",)
    ),
    "W8A16": QuantType("w8a16", 8, (_INT8, *_GROUPED)),
    "W4A16": QuantType("w4a16", 4, (Tensor("weight", ("N K/2", "N/2 K", "N K"), ("I8",)), *_GROUPED)),
    "W8A8_MXFP8": QuantType(
        "mxfp8", 8, (Tensor("weight", ("N K",), ("F8_E4M3",)), _E8M0), element="e4m3", block=32
    ),
    "W4A4_MXFP4": QuantType("mxfp4", 4, (_FP4, _E8M0), element="e2m1", block=32),
    "W4A8_MXFP": QuantType("w4a8_mxfp", 4, (_FP4, _E8M0), element="e2m1", block=32),
    "W4A4_MXFP4_DUALSCALE": QuantType(
        "mxfp4_dualscale",
        4,
        (_FP4, _E8M0, Tensor("weight_dual_scale", ("N D 1",), ("F32",))),
        element="e2m1",
        block=32,
    ),
}  # fmt: skip
FLOAT = "FLOAT"
# The tensor of each whose columns are the groups of a row; empty where rows have none.
GROUPED_BY = {
    name: next((tensor.suffix for tensor in (*kind.optional, *kind.tensors) if "N G" in tensor.shapes), "")
    for name, kind in TYPES.items()
}
# Values that the tool or its readers know and nobody here can run, and why.
REFUSED = {
    "WFP8AFP8_DYNAMIC": "fp8 with one scale a row has no row in the support table",
    "W4A4_MXFP4_SVD": "the low-rank branch of SVD types is not run",
    "W4A4_MXFP4_SVD_DYNAMIC": "the low-rank branch of SVD types is not run",
    "W4A4_FLATQUANT_DYNAMIC": "FlatQuant's transforms of the activations are not run",
    "W4A4_MXFP4_FLATQUANT": "FlatQuant's transforms of the activations are not run",
    "W16A16S": "sparse float weights have no row in the support table",
    "W8A8S": "sparse weights have no row in the support table",
    "W8A8SC": "compressed weights can be read by a closed kernel only",
    "W16A16SC": "compressed weights can be read by a closed kernel only",
    "W4A16_MXFP4": "weight-only MXFP4 has no row in the support table",
    "NF4": "NF4 has no row in the support table",
    "W8A8_TIMESTEP": "scales that differ by time step are not run",
}


def extent(axis: str, n: int, k: int, groups: int) -> int:
    """Return the length that one axis of a shape's notation stands for."""
    sizes = {"N": n, "K": k, "G": groups, "B": -(-k // 32), "D": -(-k // 512)}
    name, _, divisor = axis.partition("/")
    return sizes[name] // int(divisor or 1) if name in sizes else int(axis)


@lru_cache(maxsize=4096)
def shape_of(notation: str, n: int, k: int, groups: int) -> tuple[int, ...]:
    """Return a shape from its notation."""
    return tuple(extent(axis, n, k, groups) for axis in notation.split())
