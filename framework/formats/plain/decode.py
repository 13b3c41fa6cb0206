"""Float tensors of safetensors files to QuantTensors."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from framework.checkpoint.index import Index, TensorInfo
from framework.checkpoint.reader import Reader
from framework.formats.base import one_by_one
from framework.formats.names import stem
from framework.geometry import Kind, Module, Rect
from framework.quantization.tensor import QuantTensor

TYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
CHUNK_BYTES = 4 << 20


def decode(
    module: Module,
    rect: Rect,
    scheme: str,
    index: Index,
    reader: Reader,
    *,
    dtype: torch.dtype = torch.float32,
) -> QuantTensor:
    """Return a rectangle of a module's weight in `dtype`."""
    if module.kind is Kind.PARAMETER:
        return QuantTensor(_values(index.tensors[stem(module, index)], reader).unsqueeze(1))
    info = index.tensors[f"{stem(module, index)}.weight"]
    if module.kind is Kind.NORM:
        return QuantTensor(_vector(info, reader)[rect.n0 : rect.n1].unsqueeze(1))
    size = TYPES[info.dtype].itemsize
    rows, columns = rect.shape
    out = torch.empty(rows, columns, dtype=dtype)
    step = max(1, CHUNK_BYTES // (columns * size))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        raw = reader.read(info, rect.n0 + start, rect.n0 + stop, rect.k0 * size, rect.k1 * size)
        out[start:stop] = torch.from_numpy(raw).view(TYPES[info.dtype])
    return QuantTensor(out)


decode_experts = one_by_one(decode)


def bias(module: Module, rect: Rect, index: Index, reader: Reader) -> Tensor:
    """Return rows n0..n1 of a module's bias in fp32."""
    info = index.tensors[f"{stem(module, index)}.bias"]
    return _vector(info, reader)[rect.n0 : rect.n1]


def _values(info: TensorInfo, reader: Reader) -> Tensor:
    """All values of a tensor of any shape, flattened, in fp32."""
    return torch.from_numpy(reader.read(info, 0, prod(info.shape[:-1]))).view(TYPES[info.dtype]).flatten().float()


def _vector(info: TensorInfo, reader: Reader) -> Tensor:
    return torch.from_numpy(reader.read(info, 0, 1)).view(TYPES[info.dtype]).flatten().float()
