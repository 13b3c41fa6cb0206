"""Weight codes of 4 bits as their file packs them: the CPU's matmul is made from these, everyone else unpacks them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from torch import Tensor

# Field of a word that holds column c of the eight that share it, lowest bits first (AutoAWQ's gemm packing).
AWQ_FIELDS = (0, 4, 1, 5, 2, 6, 3, 7)


class Carrier(Enum):
    """Which codes share a carrier.

    ALONG_K: int32 [N, K/8], column c of eight in field c (compressed-tensors).
    ALONG_K_FIRST: the same words as int32 [K/8, N] (GPTQ).
    ALONG_N: int32 [K, N/8], row c of eight in field AWQ_FIELDS[c] (AWQ).
    ROW_PAIRS: uint8 [N/2, K], the earlier row in the low half (ModelSlim).
    """

    ALONG_K = "along k"
    ALONG_K_FIRST = "along k, columns first"
    ALONG_N = "along n"
    ROW_PAIRS = "row pairs"


@dataclass(frozen=True, slots=True, eq=False)
class Nibbles:
    """A matrix [N, K] of codes -8..7, its rows in one or several parts, each contiguous in its carriers.

    `is_signed`: the file has two's complement, else code + 8.
    """

    parts: tuple[Tensor, ...]
    carrier: Carrier
    is_signed: bool = False

    @property
    def shape(self) -> torch.Size:
        """[N, K]."""
        rows = [part_shape(part, self.carrier) for part in self.parts]
        return torch.Size((sum(n for n, _ in rows), rows[0][1]))

    def unpack(self) -> Tensor:
        """Return int8 [N, K]; of words along N the transposed view of [K, N]."""
        match self.carrier:
            case Carrier.ALONG_K:
                codes = torch.cat([unpack_along_k(part, 4) for part in self.parts])
            case Carrier.ALONG_K_FIRST:
                words = torch.cat(self.parts, 1).t()
                # not `contiguous`, which leaves one word a row as it is
                codes = unpack_along_k(words.clone(memory_format=torch.contiguous_format), 4)
            case Carrier.ALONG_N:
                codes = torch.cat([unpack_along_n(part, 4, AWQ_FIELDS) for part in self.parts], 1).t()
            case Carrier.ROW_PAIRS:
                codes = torch.cat([torch.stack((part & 15, part >> 4), dim=1).flatten(0, 1) for part in self.parts])
        codes = codes.bitwise_xor_(8) if self.is_signed else codes
        return codes.view(torch.int8).sub_(8)


def join(stacked: Sequence[Tensor | Nibbles]) -> Nibbles | None:
    """Return the rows of all, or None where they are not packed alike."""
    nibbles = [each for each in stacked if isinstance(each, Nibbles)]
    if len(nibbles) < len(stacked) or len({(each.carrier, each.is_signed) for each in nibbles}) > 1:
        return None
    first = nibbles[0]
    return Nibbles(tuple(part for each in nibbles for part in each.parts), first.carrier, first.is_signed)


def part_shape(part: Tensor, carrier: Carrier) -> tuple[int, int]:
    """N and K of one part."""
    rows, columns = part.shape
    match carrier:
        case Carrier.ALONG_K:
            return rows, 8 * columns
        case Carrier.ALONG_K_FIRST:
            return columns, 8 * rows
        case Carrier.ALONG_N:
            return 8 * columns, rows
        case Carrier.ROW_PAIRS:
            return 2 * rows, columns


def unpack_along_k(words: Tensor, bits: int) -> Tensor:
    """Words [R, W], contiguous -> uint8 [R, W * 32 / bits], the lowest bits first."""
    raw = words.view(torch.uint8)
    if bits == 8:
        return raw
    # in numpy: half of torch's time on few words, a tenth less on many
    wide = raw.numpy().astype(np.uint16)
    wide |= wide << np.uint16(4)
    wide &= np.uint16(0x0F0F)
    return torch.from_numpy(wide.view(np.uint8))


def unpack_along_n(words: Tensor, bits: int, fields: tuple[int, ...]) -> Tensor:
    """Words [R, W] -> uint8 [R, W * 32 / bits]; column c of a word is field `fields[c]`."""
    if fields == AWQ_FIELDS:
        return unpack_along_k(_in_order(words), bits)
    codes = unpack_along_k(words, bits)
    if list(fields) == sorted(fields):
        return codes
    return codes.unflatten(1, (-1, len(fields)))[:, :, list(fields)].flatten(1)


def _in_order(words: Tensor) -> Tensor:
    """Return int32 words whose field c is the given ones' AWQ_FIELDS[c]: a perfect shuffle of the halves of each word.

    By swaps of the middle bytes, then of the middle nibbles of each half: twelve passes that run at full width, where
    eight fields one by one take a cast and a strided copy each.
    """
    out = words.numpy().view(np.uint32).copy()
    for distance, middle in ((8, 0x0000FF00), (4, 0x00F000F0)):
        differ = out >> np.uint32(distance)
        differ ^= out
        differ &= np.uint32(middle)
        out ^= differ
        differ <<= np.uint32(distance)
        out ^= differ
    return torch.from_numpy(out.view(np.int32))
