"""GGUF bytes to QuantTensors: rectangles of rows and columns, dequantized or kept packed."""

from __future__ import annotations

import torch
from torch import Tensor

from framework.checkpoint.gguf import GGML_TYPES
from framework.checkpoint.index import Index, TensorInfo
from framework.checkpoint.reader import Reader
from framework.formats.gguf.blocks import dequantize, nibbles
from framework.formats.gguf.fp16 import half
from framework.formats.gguf.layout import GROUP, PERMUTED, architecture, tensor_name
from framework.geometry import Kind, Module, Rect
from framework.quantization.tensor import QuantTensor

CHUNK_VALUES = 4 << 20  # dequantized at a time


def decode(
    module: Module, rect: Rect, scheme: str, index: Index, reader: Reader, *, dtype: torch.dtype = torch.float32
) -> QuantTensor:
    """Return a rectangle of a module's weight.

    scheme float: values in `dtype` (rounded once from fp32). w4a16: Q4_0 as codes -8..7 with scale d, Q4_1 as codes
    0..15 with scale d and minimum m. w8a16: Q8_0 as codes with scale d. Groups are the file's blocks of 32.
    """
    info = index.tensors[f"{tensor_name(module, index)}.weight"]
    if module.kind is Kind.NORM:
        values = dequantize(info.dtype, torch.from_numpy(reader.read(info, 0, 1))).flatten()
        if architecture(index) == "gemma3":
            values -= 1  # the converter stores w + 1
        return QuantTensor(values[rect.n0 : rect.n1].unsqueeze(1))
    if scheme == "float":
        return QuantTensor(_order(module, index, _values(info, rect, reader, dtype)))
    _, block, nbytes = GGML_TYPES[info.dtype]
    raw = torch.from_numpy(reader.read(info, rect.n0, rect.n1, rect.k0 // block * nbytes, rect.k1 // block * nbytes))
    return _packed(info.dtype, _order(module, index, raw))


def bias(module: Module, rect: Rect, index: Index, reader: Reader) -> Tensor:
    """Return rows n0..n1 of a module's bias in fp32."""
    info = index.tensors[f"{tensor_name(module, index)}.bias"]
    values = dequantize(info.dtype, torch.from_numpy(reader.read(info, 0, 1))).flatten()
    return _order(module, index, values[rect.n0 : rect.n1])


def _values(info: TensorInfo, rect: Rect, reader: Reader, dtype: torch.dtype) -> Tensor:
    """Dequantize the blocks that the rectangle touches, in chunks of rows, and trim."""
    _, block, nbytes = GGML_TYPES[info.dtype]
    first, last = rect.k0 // block, -(-rect.k1 // block)
    skip, (rows, columns) = rect.k0 - first * block, rect.shape
    out = torch.empty(rows, columns, dtype=dtype)
    step = max(1, CHUNK_VALUES // ((last - first) * block))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        raw = reader.read(info, rect.n0 + start, rect.n0 + stop, first * nbytes, last * nbytes)
        out[start:stop] = dequantize(info.dtype, torch.from_numpy(raw))[:, skip : skip + columns]
    return out


def _order(module: Module, index: Index, rows: Tensor) -> Tensor:
    """Undo the interleaving of q and k rows: per head of size D, file row 2i+s is row s*D/2+i."""
    if module.axis not in ("q_heads", "kv_heads") or architecture(index) not in PERMUTED:
        return rows
    if not module.name.endswith((".q_proj", ".k_proj")):
        return rows
    heads = rows.unflatten(0, (-1, module.unit // 2, 2))
    return heads.transpose(1, 2).reshape(rows.shape)


def _packed(kind: str, raw: Tensor) -> QuantTensor:
    rows = raw.shape[0]
    blocks = raw.reshape(-1, GGML_TYPES[kind][2])
    scale = half(blocks[:, :2]).view(rows, -1)
    if kind == "Q8_0":
        codes = blocks[:, 2:].contiguous().view(torch.int8)
        return QuantTensor(codes.view(rows, -1), scale, group_size=GROUP, bits=8)
    if kind == "Q4_0":
        codes = nibbles(blocks[:, 2:]).view(torch.int8) - 8
        return QuantTensor(codes.view(rows, -1), scale, group_size=GROUP, bits=4)
    codes = nibbles(blocks[:, 4:]).view(torch.int8)
    minimum = half(blocks[:, 2:4]).view(rows, -1)
    return QuantTensor(codes.view(rows, -1), scale, minimum=minimum, group_size=GROUP, bits=4)
