"""Which tensors a linear of a group has, of which shape and dtypes."""

from __future__ import annotations

from framework.formats.base import FLOATS, TensorSpec
from framework.formats.compressed_tensors.groups import Group
from framework.geometry import Module

# Ascend's converter packs two rows of int4 in a byte and keeps the fp32 bits of a scale in 64
ROWS_PER_BYTE = 2
SCALE_BITS = ("I64", "U64", "F32")

_Part = tuple[str, tuple[int, ...], tuple[str, ...]]  # role, shape, dtypes


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
    if has_zeros(group):
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


def paired_tensors(module: Module, name: str, group: Group) -> tuple[TensorSpec, ...]:
    """Return those of Ascend's W4A8 layout: [N/2, K] pairs of rows; `bias` compensates the kernel's halves."""
    n, k = module.shape
    found: list[_Part] = [
        ("weight", (n // ROWS_PER_BYTE, k), ("I8",)),
        ("weight_scale", (n, 1), SCALE_BITS),
        ("bias", (n,), ("F32",)),
    ]
    return _specs(module, name, group, found)


def _specs(module: Module, name: str, group: Group, found: list[_Part]) -> tuple[TensorSpec, ...]:
    if group.clip and module.name.endswith(".down_proj"):
        found = [*found, ("alpha", (1,), ("F32",))]
    return tuple(TensorSpec(role, f"{name}.{role}", shape, dtypes) for role, shape, dtypes in found)


def has_zeros(group: Group) -> bool:
    """Whether weights have zero points."""
    return group.weights is not None and not group.weights.symmetric
