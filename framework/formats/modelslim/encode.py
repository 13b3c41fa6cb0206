"""QuantTensors to ModelSlim's tensors: what `job=quantize` writes, and `decode` reads back."""

from __future__ import annotations

import torch
from torch import Tensor

from framework.formats.modelslim.types import TYPES, shape_of
from framework.ops import packing
from framework.quantization.tensor import QuantTensor

TYPE_OF = {kind.scheme: name for name, kind in TYPES.items()}
CONTAINERS = {
    torch.int8: "I8", torch.uint8: "U8", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3",
}  # fmt: skip


def entries(name: str, scheme: str, n: int, k: int, group: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return name, dtype and shape of the tensors that a linear [n, k] gets."""
    kind = TYPES[TYPE_OF[scheme]]
    groups = -(-k // group) if group and not kind.block else 1
    made = []
    for tensor in kind.tensors:
        by_rows = tensor.suffix == "weight" and scheme == "w4a16" and groups > 1
        made.append((f"{name}.{tensor.suffix}", tensor.dtypes[0], shape_of(tensor.shapes[by_rows], n, k, groups)))
    return made


def encode(name: str, scheme: str, weight: QuantTensor) -> dict[str, Tensor]:
    """Return the tensors of one linear by their full names, as `entries` lists them.

    Raises:
        ValueError: a weight that is not of this scheme, or not symmetric.
    """
    if weight.scale is None or weight.zero is not None or weight.minimum is not None:
        raise ValueError(f"{name}: only symmetric codes are written")
    if weight.element != "int":
        codes = weight.codes if weight.element == "e4m3" else packing.pack_fp4(weight.codes)
        return {f"{name}.weight": codes, f"{name}.weight_scale": weight.scale}
    codes = weight.codes
    if scheme == "w4a16":
        # the tool packs two columns in a byte where a row has one scale, two rows where it has groups
        low, high = (codes[:, ::2], codes[:, 1::2]) if weight.scale.shape[1] == 1 else (codes[::2], codes[1::2])
        codes = (low & 15) | (high << 4)
    scale = weight.scale.float()
    return {f"{name}.weight": codes, f"{name}.weight_scale": scale, f"{name}.weight_offset": torch.zeros_like(scale)}
