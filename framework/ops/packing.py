"""Codes below one byte in their carriers, and shared exponents as bytes.

int4: eight in an int32 along the last dimension, the first in the low bits. fp4 (e2m1): two in a byte, the first
in the low bits; code = sign << 3 | magnitude. e8m0: byte b is 2^(b - 127), 255 is NaN, 0 is 2^-127.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framework.ops import dtypes

FP4_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_VALUES = torch.tensor([sign * value for sign in (1.0, -1.0) for value in FP4_MAGNITUDES])
_OCTETS = torch.arange(256)
# Both values of a byte, moved as one element.
_FP4_PAIRS = torch.stack((_FP4_VALUES[_OCTETS & 15], _FP4_VALUES[_OCTETS >> 4]), dim=-1).view(torch.complex64).view(-1)
_FP8_VALUES = {dtype: _OCTETS.to(torch.uint8).view(dtype).float() for dtype in (torch.float8_e4m3fn, torch.float8_e5m2)}

_CARRIERS = {
    dtypes.FLOAT32: torch.float32,
    dtypes.FLOAT16: torch.float16,
    dtypes.BFLOAT16: torch.bfloat16,
    dtypes.INT8: torch.int8,
    dtypes.UINT8: torch.uint8,
    dtypes.INT32: torch.int32,
    dtypes.INT4: torch.int32,
    dtypes.FLOAT8_E4M3FN: torch.float8_e4m3fn,
    dtypes.FLOAT8_E5M2: torch.float8_e5m2,
    dtypes.FLOAT8_E8M0FNU: torch.uint8,
    dtypes.FLOAT4_E2M1FN_X2: torch.uint8,
}


def carrier(number: int) -> torch.dtype:
    """Return the torch dtype that holds values of a dtype number, torch_npu's or torch's own.

    Raises:
        NotImplementedError: no CPU kernel knows the format.
    """
    try:
        return _CARRIERS[dtypes.canonical(number)]
    except KeyError:
        raise NotImplementedError(f"no CPU kernel for values of dtype number {number}") from None


def pack_int4(codes: Tensor) -> Tensor:
    """Return int32 [.., N/8] of int8 or int32 codes [.., N]; codes beyond four bits are masked, not saturated."""
    return _pack((codes & 15).to(torch.uint8)).view(torch.int32)


def unpack_int4(packed: Tensor) -> Tensor:
    """Return the int8 codes -8..7 [.., N] of int32 carriers [.., N/8]."""
    octets = packed.contiguous().view(torch.uint8)
    codes = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)
    return codes.bitwise_xor_(8).view(torch.int8).sub_(8)


def pack_fp4(codes: Tensor) -> Tensor:
    """Return uint8 [.., N/2] of uint8 codes 0..15 [.., N]."""
    return _pack(codes)


def fp4_values(packed: Tensor) -> Tensor:
    """Return the fp32 values [.., N] of bytes [.., N/2] (any byte dtype)."""
    pairs = _FP4_PAIRS.index_select(0, packed.view(torch.uint8).flatten().int())
    return pairs.view(torch.float32).view(*packed.shape[:-1], 2 * packed.shape[-1])


def fp8_values(codes: Tensor) -> Tensor:
    """Return the fp32 values of e4m3 or e5m2 codes: by table, which costs a quarter of torch's cast."""
    octets = codes.view(torch.uint8)
    return _FP8_VALUES[codes.dtype].index_select(0, octets.flatten().int()).view(codes.shape)


def e8m0_values(octets: Tensor) -> Tensor:
    """Return fp32 2^(b - 127) of bytes b; NaN for 255."""
    return octets.view(torch.float8_e8m0fnu).float()


def e8m0_bytes(powers: Tensor) -> Tensor:
    """Return the bytes of fp32 powers of two 2^-127..2^127 and NaN: the exponent field, nothing is rounded."""
    return (powers.view(torch.int32) >> 23).to(torch.uint8)


def _pack(nibbles: Tensor) -> Tensor:
    """Two to a byte, the first low."""
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4
