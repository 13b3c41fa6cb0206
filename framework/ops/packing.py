"""Codes below one byte in their carriers, and shared exponents as bytes.

int4: eight in an int32 along the last dimension, the first in the low bits. fp4 (e2m1): two in a byte, the first
in the low bits; code = sign << 3 | magnitude. e8m0: byte b is 2^(b - 127), 255 is NaN, 0 is 2^-127.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framework.ops import dtypes

ROUND_MODES = ("rint", "round", "floor")
FP4_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_FP4_VALUES = torch.tensor([sign * value for sign in (1.0, -1.0) for value in FP4_MAGNITUDES])
_OCTETS = torch.arange(256)
# Both values of a byte, moved as one element.
_FP4_PAIRS = torch.stack((_FP4_VALUES[_OCTETS & 15], _FP4_VALUES[_OCTETS >> 4]), dim=-1).view(torch.complex64).view(-1)
_INT4_PAIRS = torch.stack((_OCTETS, _OCTETS >> 4), dim=-1).bitwise_and(15).bitwise_xor(8).sub(8).to(torch.int8)
_INT4_PAIRS = _INT4_PAIRS.view(torch.int16).view(-1)
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


# Where rounding to fp4 changes, in quarters: all starts of the magnitudes 1..7 are whole.
_QUARTERS = 24
_TIES = (1, 3, 5, 7, 10, 14, 20)
_VALUES = tuple(int(4 * value) for value in FP4_MAGNITUDES)


def _fp4_table(round_mode: str) -> Tensor:
    """Code by floor(q) + ceil(q) + 48 for a value of q quarters: twice q if it is whole, else odd between."""
    places = torch.arange(-2 * _QUARTERS, 2 * _QUARTERS + 1)
    negative = places < 0
    twice = 2 * torch.tensor(_TIES)
    match round_mode:
        case "rint":
            # A tie goes to the even code: up to the even magnitudes, down from the odd ones.
            starts = twice + torch.arange(7).remainder(2).eq(0)
            codes = torch.bucketize(places.abs(), starts, right=True)
        case "round":
            codes = torch.bucketize(places.abs(), twice, right=True)
        case "floor":
            grid = 2 * torch.tensor(_VALUES)
            towards_zero = torch.bucketize(places.abs(), grid[1:], right=True)
            codes = torch.where(negative, torch.bucketize(places.abs(), grid[:-1]), towards_zero)
    return (codes | negative.int() << 3).to(torch.uint8)


_FP4_TABLES = {mode: _fp4_table(mode) for mode in ROUND_MODES}


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
    return _pack(codes.to(torch.int8)).view(torch.int32)


def unpack_int4(packed: Tensor) -> Tensor:
    """Return the int8 codes -8..7 [.., N] of int32 carriers [.., N/8]."""
    pairs = _INT4_PAIRS.index_select(0, packed.contiguous().view(torch.uint8).flatten().int())
    return pairs.view(torch.int8).view(*packed.shape[:-1], 8 * packed.shape[-1])


def fp4_codes(x: Tensor, round_mode: str = "rint") -> Tensor:
    """Return uint8 e2m1 codes 0..15 of fp32 x, saturated; a negative value that rounds to zero is 8 (-0)."""
    quarters = (x * 4).clamp_(-_QUARTERS, _QUARTERS).nan_to_num_()
    places = (quarters.floor() + quarters.ceil()).add_(2 * _QUARTERS).int()
    codes = _FP4_TABLES[round_mode].index_select(0, places.flatten()).view(x.shape)
    return codes.bitwise_or_(quarters.signbit().view(torch.uint8) << 3)


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


def _pack(codes: Tensor) -> Tensor:
    """The low four bits of one-byte codes, two to a byte, the first low."""
    pairs = codes.contiguous().view(torch.int16)
    return (pairs & 15 | pairs >> 4 & 240).to(torch.uint8)
