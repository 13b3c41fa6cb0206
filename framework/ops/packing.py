"""int4 codes in int32 carriers: eight along the last dimension, the first in the low bits."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_int4(codes: Tensor) -> Tensor:
    """Return int32 [.., N/8] of int32 codes [.., N]; codes beyond four bits are masked, not saturated."""
    nibbles = (codes & 15).unflatten(-1, (-1, 8))
    packed = nibbles[..., 0].clone()
    for position in range(1, 8):
        packed |= nibbles[..., position] << (4 * position)
    return packed


def unpack_int4(packed: Tensor) -> Tensor:
    """Return the int8 codes -8..7 [.., N] of int32 carriers [.., N/8]."""
    octets = packed.contiguous().view(torch.uint8)
    codes = torch.stack((octets & 15, octets >> 4), dim=-1).flatten(-2)
    return codes.bitwise_xor_(8).view(torch.int8).sub_(8)
