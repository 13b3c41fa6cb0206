"""Weights in the CPU's own layout: torch's int4pack bytes for decoding, dequantized by blocks for prefill."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from framework.ops.cpu.memory import new_bytes
from framework.ops.cpu.repack import can_repack, repack
from framework.ops.linear import bfloat16_rows, linear, of_few_heights
from framework.ops.nibbles import Nibbles

_int4_matmul = torch._weight_int4pack_mm_for_cpu

_GROUP_SIZES = (32, 64, 128, 256)  # what the int4pack kernel takes
_ROWS_MULTIPLE = 16
_LARGEST_BLOCK = 64

# From this many rows of x on, dequantizing the weight once per call and one float matmul is faster.
_DEQUANTIZE_FROM_ROWS = 96
# Weights dequantized at a time: 1 MB of fp32, which the matmul then reads from the cache.
_CHUNK_DEQUANTIZED = 1 << 18
# Weights packed at a time.
_CHUNK_PACKED = 1 << 18
_SIXTEEN_BYTES = torch.complex128


@dataclass(frozen=True, slots=True)
class CpuWeight:
    """The CPU's own form of a weight operand [K, N].

    `kind`: `int4`, `int8` (codes of 8 bits as two of 4 bits: K doubled, high halves first) or `dense`.
    `codes`: int4pack bytes uint8 [N, K/2] (int8: [N, K]), or the weight [N, K] in the activations' dtype.
    `scale_and_zero`: bf16 [G, N, 2] (int8: [2 G, N, 2]); value = scale * (code - 8) + zero.
    `sums`: kept by the matmul that needs them, sums of the codes over K, int32 [G, N], by number of groups G.
    """

    kind: str
    codes: Tensor
    group_size: int = 0
    scale_and_zero: Tensor | None = None
    sums: dict[int, Tensor] = field(default_factory=dict, repr=False, compare=False)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self.codes.nbytes + (0 if self.scale_and_zero is None else self.scale_and_zero.nbytes)


def private(weight: Tensor) -> CpuWeight | None:
    """Return the CPU's own form that an operand carries, if any."""
    return getattr(weight, "_cpu_weight", None)


def carry(operand: Tensor, form: CpuWeight) -> Tensor:
    """Attach the form to the operand that stands for it."""
    operand._cpu_weight = form  # type: ignore[attr-defined]
    return operand


def private_experts(weight: Tensor) -> tuple[CpuWeight, ...] | None:
    """Return the forms of all experts that an operand [E, ..] carries, if any."""
    return getattr(weight, "_cpu_experts", None)


def carry_experts(operand: Tensor, forms: tuple[CpuWeight, ...]) -> Tensor:
    """Attach one form an expert to the operand [E, ..] that stands for them."""
    operand._cpu_experts = forms  # type: ignore[attr-defined]
    return operand


def takes(n: int, k: int, groups: int) -> bool:
    """Whether torch's int4 kernel multiplies a weight [N, K] in `groups` groups along K."""
    return n % _ROWS_MULTIPLE == 0 and k % groups == 0 and k // groups in _GROUP_SIZES


def pack(codes: Tensor | Nibbles, scale: Tensor, zero: Tensor | None, bits: int) -> CpuWeight:
    """Pack signed codes [N, K]; scale and zero (None: 0) fp32 [G, N], value = scale * code + zero."""
    n, k = codes.shape
    zero = torch.zeros_like(scale) if zero is None else zero
    # as complex numbers: torch interleaves those in a third of the time of a stack
    if bits == 4:
        pairs = torch.complex(scale, zero)
    else:
        # q + 128 = 16 h + l with h and l in 0..15, so q * s = (h - 8) * 16 s + (l - 8) * s + 8 s.
        pairs = torch.cat((torch.complex(scale * 16, torch.zeros_like(scale)), torch.complex(scale, zero + 8 * scale)))
    packed = new_bytes(n, k * bits // 8)
    scale_and_zero = torch.view_as_real(pairs.contiguous()).bfloat16()
    form = CpuWeight(f"int{bits}", packed, k // scale.shape[0], scale_and_zero)
    block = block_rows()
    if isinstance(codes, Nibbles):
        if block is not None and can_repack(codes, block):
            repack(codes, packed, block)
            return form
        codes = codes.unpack()
    features = codes.t()
    if block is not None and n % block == 0 and features.is_contiguous():
        _pack_features(features.view(torch.uint8), packed.view(n // block, -1, block // 2), bits)
        return form
    # Blocks of rows are packed on their own: temporaries stay in the cache.
    step = max(_CHUNK_PACKED // k // _LARGEST_BLOCK, 1) * _LARGEST_BLOCK
    for first in range(0, n, step):
        part = codes[first : first + step].view(torch.uint8)
        nibbles = part + 8 if bits == 4 else torch.cat((part >> 4 ^ 8, part & 15), dim=1)
        _pack_rows(nibbles, packed[first : first + step])
    return form


def _pack_rows(nibbles: Tensor, out: Tensor) -> None:
    """Fill int4pack bytes [R, K/2] of uint8 0..15 [R, K]: by torch, or by its known layout in a third of the time."""
    rows, k = nibbles.shape
    block = block_rows()
    if block is None or rows % block:
        out.copy_(torch._convert_weight_to_int4pack_for_cpu(nibbles.int(), 1))
        return
    low, high = nibbles.view(-1, 2, block // 2, k).unbind(1)
    octets = high.bitwise_left_shift_(4).bitwise_or_(low).view(-1, block // 4, 2, k)
    # Four rows become one element before they are transposed: moved as bytes they cost twice as much.
    pairs = octets[:, :, 1].short().bitwise_left_shift_(8).bitwise_or_(octets[:, :, 0]).view(-1, block // 8, 2, k)
    fours = pairs[:, :, 1].int().bitwise_left_shift_(16).bitwise_or_(pairs[:, :, 0].int().bitwise_and_(0xFFFF))
    out.view(torch.int32).view(-1, k, block // 8).copy_(fours.transpose(1, 2))


def _pack_features(features: Tensor, out: Tensor, bits: int) -> None:
    """Fill int4pack bytes [blocks, K, block/2] (8 bits: 2 K) of signed codes uint8 [K, N]: nothing is transposed."""
    k, n = features.shape
    step = max(_CHUNK_PACKED // n, 1)
    for first in range(0, k, step):
        part = features[first : first + step]
        rows = part.shape[0]
        for nibbles, start in ((part + 8, 0),) if bits == 4 else ((part >> 4 ^ 8, 0), (part & 15, k)):
            # sixteen codes move as one element: [half, blocks, rows, block/2]
            halves = nibbles.view(_SIXTEEN_BYTES).view(rows, out.shape[0], 2, -1).permute(2, 1, 0, 3)
            low, high = halves.contiguous().view(torch.uint8)
            torch.bitwise_or(high.bitwise_left_shift_(4), low, out=out.narrow(1, start + first, rows))


def multiply(x: Tensor, form: CpuWeight) -> Tensor:
    """X [M, K] -> [M, N] in x's dtype, accumulated in fp32."""
    if form.scale_and_zero is None:
        return linear(x, form.codes)
    if x.shape[0] >= _DEQUANTIZE_FROM_ROWS and _in_whole_blocks(form):
        return _multiply_dequantized(x, form)
    if form.kind == "int8":
        x = torch.cat((x, x), dim=1)
    return _int4_matmul(x, form.codes, form.group_size, form.scale_and_zero)


def dequantized(form: CpuWeight, first: int, last: int) -> Tensor:
    """Return rows first..last of a packed weight (multiples of `block_rows`) in fp32, [blocks, K, block]."""
    block = block_rows()
    pairs = form.scale_and_zero
    if block is None or pairs is None:
        raise ValueError("only int4pack weights in a known layout can be dequantized")
    blocks = (last - first) // block
    doubled_k = 2 * form.codes.shape[1]
    octets = form.codes[first:last].view(blocks, doubled_k, 1, block // 2)
    # Byte j of a column holds row j of the block low and row j + block/2 high. Sixteen codes move as one
    # element: copied as bytes, runs this short cost ten times as much.
    halves = torch.empty((blocks, doubled_k, 2, block // 32), dtype=_SIXTEEN_BYTES)
    halves[:, :, :1] = (octets & 15).view(_SIXTEEN_BYTES)
    halves[:, :, 1:] = (octets >> 4).view(_SIXTEEN_BYTES)
    values = halves.view(torch.uint8).view(blocks, -1, form.group_size, block).float()
    own_pairs = pairs[:, first:last].float().view(-1, blocks, block, 2)
    scale, zero = own_pairs.permute(3, 1, 0, 2).unsqueeze(3).contiguous().unbind(0)
    torch.addcmul(zero - 8 * scale, values, scale, out=values)
    weight = values.view(blocks, doubled_k, block)
    if form.kind == "int8":
        high, low = weight.chunk(2, 1)
        return high + low
    return weight


def _multiply_dequantized(x: Tensor, form: CpuWeight) -> Tensor:
    rows, k = x.shape
    n = form.codes.shape[0]
    dtype = torch.bfloat16 if rows <= bfloat16_rows() else torch.float32
    wide = of_few_heights(x.to(dtype)) if dtype is torch.bfloat16 else x.to(dtype)
    block = block_rows() or n
    step = max(_CHUNK_DEQUANTIZED // k // block, 1) * block
    y = x.new_empty((rows, n))
    for first in range(0, n, step):
        last = min(first + step, n)
        weight = dequantized(form, first, last).to(dtype).transpose(0, 1).reshape(k, last - first)
        y[:, first:last] = torch.mm(wide, weight)[:rows]
    return y


def _in_whole_blocks(form: CpuWeight) -> bool:
    block = block_rows()
    return block is not None and form.codes.shape[0] % block == 0


@cache
def block_rows() -> int | None:
    """Rows that torch's int4pack layout interleaves on this processor: 32 or 64; None: not known.

    The layout is private to torch, so it is tried on one small matrix before it is relied on.
    """
    codes = (torch.arange(128 * 32, dtype=torch.int32).view(128, 32) * 7 + 3) % 16
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    for block in (32, 64):
        octets = packed.view(128 // block, 32, block // 2)
        read = torch.cat((octets & 15, octets >> 4), dim=-1).transpose(1, 2).reshape(128, 32)
        if torch.equal(read.int(), codes):
            return block
    return None
