"""GGUF block types to fp32, vectorised. `blocks` is uint8 [B, bytes a block]; the result [B, values a block].

Layouts: ggml-common.h as restated by gguf 0.19 (quants.py). All products are exact in fp32, so every form
equals gguf.dequantize bit for bit; types with an addend round once, in the same place.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from framework.checkpoint.gguf import GGML_TYPES
from framework.formats.gguf import iq
from framework.formats.gguf.fp16 import half

Dequantize = Callable[[Tensor], Tensor]


def nibbles(raw: Tensor) -> Tensor:
    """uint8 [B, n] -> [B, 2n]: all low nibbles, then all high ones."""
    return torch.cat((raw & 15, raw >> 4), dim=1)


def _f32(raw: Tensor) -> Tensor:
    return raw.contiguous().view(torch.float32)


def _f16(raw: Tensor) -> Tensor:
    return raw.contiguous().view(torch.float16).float()


def _bf16(raw: Tensor) -> Tensor:
    return raw.contiguous().view(torch.bfloat16).float()


def _q4_0(raw: Tensor) -> Tensor:
    return half(raw[:, :2]) * (nibbles(raw[:, 2:]).float() - 8)


def _q4_1(raw: Tensor) -> Tensor:
    return half(raw[:, :2]) * nibbles(raw[:, 4:]).float() + half(raw[:, 2:4])


def _fifth_bits(raw: Tensor) -> Tensor:
    """uint8 [B, 4] -> [B, 32] of bit e in bit 4."""
    shifts = torch.arange(8, dtype=torch.uint8)
    return ((raw.unsqueeze(2) >> shifts) & 1).flatten(1) << 4


def _q5_0(raw: Tensor) -> Tensor:
    return half(raw[:, :2]) * ((nibbles(raw[:, 6:]) | _fifth_bits(raw[:, 2:6])).float() - 16)


def _q5_1(raw: Tensor) -> Tensor:
    codes = nibbles(raw[:, 8:]) | _fifth_bits(raw[:, 4:8])
    return half(raw[:, :2]) * codes.float() + half(raw[:, 2:4])


def _q8_0(raw: Tensor) -> Tensor:
    return half(raw[:, :2]) * raw[:, 2:].view(torch.int8).float()


def _two_bits(raw: Tensor) -> Tensor:
    """uint8 [B, 64] -> [B, 2, 4, 32]: half, pair of bits, byte."""
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(1, 1, 4, 1)
    return (raw.view(-1, 2, 1, 32) >> shifts) & 3


def _q2_k(raw: Tensor) -> Tensor:
    scales, codes = raw[:, :16], _two_bits(raw[:, 16:80].contiguous()).reshape(-1, 16, 16).float()
    d = half(raw[:, 80:82]) * (scales & 15).float()
    minimum = half(raw[:, 82:84]) * (scales >> 4).float()
    return (d.unsqueeze(2) * codes - minimum.unsqueeze(2)).flatten(1)


def _q3_k(raw: Tensor) -> Tensor:
    high, low, packed, d = raw[:, :32], raw[:, 32:96], raw[:, 96:108], half(raw[:, 108:110])
    nibble = torch.cat((packed[:, :8] & 15, packed[:, :8] >> 4), dim=1)
    pairs = torch.cat([(packed[:, 8:12] >> shift) & 3 for shift in (0, 2, 4, 6)], dim=1)
    scales = (nibble | (pairs << 4)).to(torch.int8) - 32
    shifts = torch.arange(8, dtype=torch.uint8).view(1, 8, 1)
    missing = ((high.unsqueeze(1) >> shifts) & 1 ^ 1).view(-1, 2, 4, 32) << 2
    codes = _two_bits(low.contiguous()).to(torch.int8) - missing.to(torch.int8)
    return ((d * scales.float()).unsqueeze(2) * codes.reshape(-1, 16, 16).float()).flatten(1)


def _six_bit_scales(raw: Tensor) -> tuple[Tensor, Tensor]:
    """The 12 scale bytes of Q4_K and Q5_K -> scales [B, 8], minima [B, 8]."""
    low, mid, high = raw[:, :4], raw[:, 4:8], raw[:, 8:12]
    scales = torch.cat((low & 63, (high & 15) | ((low >> 2) & 0x30)), dim=1)
    minima = torch.cat((mid & 63, (high >> 4) | ((mid >> 2) & 0x30)), dim=1)
    return scales.float(), minima.float()


def _q4_k(raw: Tensor) -> Tensor:
    scales, minima = _six_bit_scales(raw[:, 4:16])
    d, minimum = half(raw[:, :2]) * scales, half(raw[:, 2:4]) * minima
    packed = raw[:, 16:].view(-1, 4, 1, 32)
    codes = torch.cat((packed & 15, packed >> 4), dim=2).reshape(-1, 8, 32).float()
    return (d.unsqueeze(2) * codes - minimum.unsqueeze(2)).flatten(1)


def _q5_k(raw: Tensor) -> Tensor:
    scales, minima = _six_bit_scales(raw[:, 4:16])
    d, minimum = half(raw[:, :2]) * scales, half(raw[:, 2:4]) * minima
    packed = raw[:, 48:].view(-1, 4, 1, 32)
    shifts = torch.arange(8, dtype=torch.uint8).view(1, 8, 1)
    high = ((raw[:, 16:48].unsqueeze(1) >> shifts) & 1) << 4
    codes = (torch.cat((packed & 15, packed >> 4), dim=2).reshape(-1, 8, 32) | high).float()
    return (d.unsqueeze(2) * codes - minimum.unsqueeze(2)).flatten(1)


def _q6_k(raw: Tensor) -> Tensor:
    low, high = raw[:, :128].view(-1, 2, 64), raw[:, 128:192].view(-1, 2, 1, 32)
    scales = raw[:, 192:208].view(torch.int8).float() * half(raw[:, 208:210])
    nibble = torch.cat((low & 15, low >> 4), dim=2).view(-1, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(1, 1, 4, 1)
    codes = (nibble | (((high >> shifts) & 3) << 4)).to(torch.int8) - 32
    return (scales.unsqueeze(2) * codes.reshape(-1, 16, 16).float()).flatten(1)


def _tq1_0(raw: Tensor) -> Tensor:
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8).view(1, 5, 1)

    def digits(packed: Tensor, count: int) -> Tensor:
        spread = packed.unsqueeze(1) * powers[:, :count]  # wraps modulo 256
        return ((spread.to(torch.int32) * 3) >> 8).flatten(1)

    trits = torch.cat((digits(raw[:, :32], 5), digits(raw[:, 32:48], 5), digits(raw[:, 48:52], 4)), dim=1)
    return half(raw[:, 52:54]) * (trits.float() - 1)


def _tq2_0(raw: Tensor) -> Tensor:
    return half(raw[:, 64:66]) * (_two_bits(raw[:, :64].contiguous()).flatten(1).float() - 1)


_MX = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.float32)


def _mxfp4(raw: Tensor) -> Tensor:
    exponent = raw[:, :1].to(torch.int32)
    # 2^(E-128); E below 2 gives the fp32 subnormals 2^-128 and 2^-127
    bits = torch.where(exponent < 2, 0x00200000 << exponent.clamp(max=1), (exponent - 1) << 23)
    return bits.to(torch.int32).view(torch.float32) * _MX[nibbles(raw[:, 1:]).int()]


def _nvfp4(raw: Tensor) -> Tensor:
    code = raw[:, :4]
    exponent, mantissa = ((code >> 3) & 15).float(), (code & 7).float()
    scale = torch.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * torch.exp2(exponent - 7)) * 0.5
    scale = scale.masked_fill((code == 0) | (code == 0x7F), 0.0)
    packed = raw[:, 4:].reshape(-1, 4, 8)
    values = _MX[torch.cat((packed & 15, packed >> 4), dim=2).int()]
    return (scale.unsqueeze(2) * values).flatten(1)


DEQUANTIZE: dict[str, Dequantize] = {
    "F32": _f32, "F16": _f16, "BF16": _bf16, "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1,
    "Q8_0": _q8_0, "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k, "TQ1_0": _tq1_0,
    "TQ2_0": _tq2_0, "MXFP4": _mxfp4, "NVFP4": _nvfp4, **iq.DEQUANTIZE,
}  # fmt: skip


def dequantize(kind: str, raw: Tensor) -> Tensor:
    """uint8 [rows, bytes a row] of a ggml type -> fp32 [rows, values a row]."""
    _, block, nbytes = GGML_TYPES[kind]
    rows = raw.shape[0]
    if block == 1:
        return DEQUANTIZE[kind](raw)
    return DEQUANTIZE[kind](raw.reshape(-1, nbytes)).view(rows, -1)
