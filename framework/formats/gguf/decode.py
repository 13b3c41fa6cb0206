"""GGUF bytes to QuantTensors: rectangles of rows and columns, dequantized or kept packed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod

import torch
from torch import Tensor

from framework.checkpoint.gguf import GGML_TYPES
from framework.checkpoint.index import Index, TensorInfo
from framework.checkpoint.reader import Reader
from framework.formats.base import one_by_one
from framework.formats.gguf.blocks import dequantize, nibbles
from framework.formats.gguf.fp16 import half
from framework.formats.gguf.layout import GROUP, PERMUTED, architecture, stack_place, tensor_name
from framework.geometry import Kind, Module, Rect
from framework.quantization.tensor import QuantTensor

READ_BYTES = 4 << 20  # at a time, so that a network file system sees few and large reads
CHUNK_VALUES = 1 << 18  # dequantized at a time: temporaries stay in cache, 1.5 times as fast as 4 Mi values


def decode(
    module: Module,
    rect: Rect,
    scheme: str,
    index: Index,
    reader: Reader,
    *,
    dtype: torch.dtype = torch.float32,
) -> QuantTensor:
    """Return a rectangle of a module's weight.

    float: values in `dtype`, rounded once from fp32; norms [H, 1] in fp32. w4a16: Q4_0 as codes -8..7
    with scale d; Q4_1 as codes 0..15 with scale d and minimum m (signed codes would need m + 8d, which
    rounds). w8a16: Q8_0 as codes with scale d. Codes are int8 [N, K], scales and minima fp32 [N, K/32]:
    groups are the file's blocks of 32, and dequantize() equals gguf.dequantize bit for bit. Columns of a
    packed rectangle are multiples of 32, those of a float one may cut blocks. Rows of q and k are whole
    heads where the architecture permutes them. Of stacked experts only the rows of the module's own are read.
    A parameter is its tensor's values [values, 1] in `dtype`.

    Raises:
        InputError: `file-truncated`, `file-missing`, `file-unreadable`.
    """
    if module.kind is Kind.PARAMETER:
        info, _ = _tensor(module, index, "bias")
        values = dequantize(info.dtype, torch.from_numpy(reader.read(info, 0, prod(info.shape[:-1])))).flatten()
        return QuantTensor(values[rect.n0 : rect.n1].unsqueeze(1).to(dtype))
    info, first = _tensor(module, index, "weight")
    rect = replace(rect, n0=first + rect.n0, n1=first + rect.n1)
    if module.kind is Kind.NORM:
        values = dequantize(info.dtype, torch.from_numpy(reader.read(info, 0, 1))).flatten()
        if architecture(index) == "gemma3":
            values -= 1  # the converter stores w + 1
        return QuantTensor(values[rect.n0 : rect.n1].unsqueeze(1))
    if scheme == "float":
        return QuantTensor(_order(module, index, _values(info, rect, reader, dtype)))
    packed = _packed(info, rect, reader)
    parts = {name: getattr(packed, name) for name in ("stored", "scale", "minimum")}
    parts = {name: None if part is None else _order(module, index, part) for name, part in parts.items()}
    return replace(packed, **parts)


decode_experts = one_by_one(decode)


def bias(module: Module, rect: Rect, index: Index, reader: Reader) -> Tensor:
    """Return rows n0..n1 of a module's bias in fp32."""
    info, first = _tensor(module, index, "bias")
    values = dequantize(info.dtype, torch.from_numpy(reader.read(info, first, first + 1))).flatten()
    return _order(module, index, values[rect.n0 : rect.n1])


def _tensor(module: Module, index: Index, suffix: str) -> tuple[TensorInfo, int]:
    """Return a module's tensor and the row at which the module begins: experts stand one after another."""
    info = index.tensors[f"{tensor_name(module, index)}.{suffix}"]
    return info, stack_place(module, index) * prod(info.shape[1:-1])


def _values(info: TensorInfo, rect: Rect, reader: Reader, dtype: torch.dtype) -> Tensor:
    """Dequantize the blocks that the rectangle touches, and trim."""
    block = GGML_TYPES[info.dtype][1]
    skip, (rows, columns) = rect.k0 % block, rect.shape
    out = torch.empty(rows, columns, dtype=dtype)
    for start, stop, raw in _chunks(info, rect, reader):
        out[start:stop] = dequantize(info.dtype, raw)[:, skip : skip + columns]
    return out


def _chunks(info: TensorInfo, rect: Rect, reader: Reader) -> Iterator[tuple[int, int, Tensor]]:
    """Yield ranges of the rectangle's rows with their blocks, uint8 [rows, bytes]."""
    _, block, nbytes = GGML_TYPES[info.dtype]
    first, last = rect.k0 // block, -(-rect.k1 // block)
    rows = rect.shape[0]
    read_step = max(1, READ_BYTES // ((last - first) * nbytes))
    step = max(1, CHUNK_VALUES // ((last - first) * block))
    for top in range(0, rows, read_step):
        bottom = min(top + read_step, rows)
        raw = torch.from_numpy(reader.read(info, rect.n0 + top, rect.n0 + bottom, first * nbytes, last * nbytes))
        for start in range(top, bottom, step):
            stop = min(start + step, bottom)
            yield start, stop, raw[start - top : stop - top]


def _order(module: Module, index: Index, rows: Tensor) -> Tensor:
    """Undo the interleaving of q and k rows: per head of size D, file row 2i+s is row s*D/2+i."""
    if module.axis not in ("q_heads", "kv_heads") or architecture(index) not in PERMUTED:
        return rows
    if not module.name.endswith((".q_proj", ".k_proj")):
        return rows
    heads = rows.reshape(-1, module.unit // 2, 2, *rows.shape[1:])
    return heads.transpose(1, 2).reshape(rows.shape)


def _packed(info: TensorInfo, rect: Rect, reader: Reader) -> QuantTensor:
    """Unpack the rectangle in chunks of rows; nothing is rounded."""
    _, block, nbytes = GGML_TYPES[info.dtype]
    if rect.k0 % block or rect.k1 % block:
        raise ValueError(f"columns {rect.k0}..{rect.k1} of {info.name} cut a block of {block}")
    rows, columns = rect.shape
    codes = torch.empty(rows, columns, dtype=torch.int8)
    scale = torch.empty(rows, columns // GROUP)
    minimum = torch.empty_like(scale) if info.dtype == "Q4_1" else None
    for start, stop, raw in _chunks(info, rect, reader):
        blocks = raw.reshape(-1, nbytes)
        scale[start:stop] = half(blocks[:, :2]).view(stop - start, -1)
        if minimum is not None:
            minimum[start:stop] = half(blocks[:, 2:4]).view(stop - start, -1)
        codes[start:stop] = _codes(info.dtype, blocks).view(stop - start, columns)
    return QuantTensor(codes, scale, minimum=minimum, group_size=GROUP, bits=8 if info.dtype == "Q8_0" else 4)


def _codes(kind: str, blocks: Tensor) -> Tensor:
    if kind == "Q8_0":
        return blocks[:, 2:].contiguous().view(torch.int8)
    if kind == "Q4_0":
        return nibbles(blocks[:, 2:]).view(torch.int8) - 8
    return nibbles(blocks[:, 4:]).view(torch.int8)
