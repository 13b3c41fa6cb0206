"""From a file's words to the bytes of torch's int4 kernel: codes stay four bits wide.

The kernel takes blocks of rows. Byte j of column k of a block holds row j low and row j + half high: [blocks, K, half].
Everything here works on int32, eight codes at a time, and is one exchange of bit fields, done for fields of 4, 8 and 16
bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framework.ops.nibbles import Carrier, Nibbles, part_shape

# Codes taken at a time: half a megabyte of words, so that temporaries stay in the cache.
_CHUNK_CODES = 1 << 20


def _int32(bits: int) -> int:
    return bits - (1 << 32) if bits >= 1 << 31 else bits


_LOW_FIELDS = {4: 0x0F0F0F0F, 8: 0x00FF00FF, 16: 0x0000FFFF}
# a half of a block along N: its words as one element, by its bytes over four
_WIDE = {4: torch.int64, 8: torch.complex128}
_SIGNS = _int32(0x88888888)


def can_repack(codes: Nibbles, block: int) -> bool:
    """Whether every part has whole blocks and whole words."""
    if codes.is_signed and codes.carrier is Carrier.ALONG_N:
        return False
    sizes = [part_shape(part, codes.carrier) for part in codes.parts]
    return all(n % block == 0 and k % 8 == 0 for n, k in sizes)


def repack(codes: Nibbles, out: Tensor, block: int) -> None:
    """Fill int4pack bytes uint8 [N, K/2] of codes that `can_repack`, chunk by chunk."""
    words, first = out.view(torch.int32), 0
    for part in codes.parts:
        n, k = part_shape(part, codes.carrier)
        # [blocks, K, half / 4]
        target = words[first : first + n].view(n // block, k, block // 8)
        first += n
        if codes.carrier is Carrier.ALONG_N:
            step = max(_CHUNK_CODES // n, 1)
            for column in range(0, k, step):
                _from_along_n(part[column : column + step], target[:, column : column + step])
            continue
        step = max(_CHUNK_CODES // k // block, 1)
        in_blocks = part.view(torch.int32).unflatten(0, (n // block, -1))
        for start in range(0, n // block, step):
            filled = target[start : start + step]
            _from_rows(in_blocks[start : start + step], codes.carrier, filled)
            if codes.is_signed:
                filled.bitwise_xor_(_SIGNS)


def _exchange(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Return [2, ..] of words: the even fields of both, field by field, then the odd ones; those of `low` are lower."""
    both = low.new_empty((2, *low.shape))
    even, odd = both
    moved = torch.bitwise_right_shift(low, bits, out=odd).bitwise_xor_(high).bitwise_and_(_LOW_FIELDS[bits])
    torch.bitwise_left_shift(moved, bits, out=even).bitwise_xor_(low)
    odd.bitwise_xor_(high)
    return both


def _from_rows(words: Tensor, carrier: Carrier, out: Tensor) -> None:
    """Words of rows -> out int32 [blocks, K, half / 4].

    Args:
        words: ALONG_K: [blocks, block, K/8]. ROW_PAIRS: [blocks, half, K/4].
        carrier: one of the two.
        out: filled; column k is 8 q + 4 r + 2 s + t of word q (ROW_PAIRS: 4 q + 2 r + s).
    """
    # of a row 4 i + 2 r + s: [2 halves, r, s, blocks, i, Q], of pairs without s
    fours = (-1, 2, 2) if carrier is Carrier.ALONG_K else (-1, 2)
    halves = words.unflatten(1, (2, *fours)).movedim((1, *range(3, 2 + len(fours))), tuple(range(len(fours))))
    # t in front: the even and the odd columns; of pairs it is s, the even and the odd rows
    nibbles = _exchange(*halves, 4)
    rows = nibbles if carrier is Carrier.ALONG_K else nibbles.transpose(0, 1).unsqueeze(0)
    columns = _exchange(*_exchange(*rows.unbind(2), 8).unbind(2), 16)
    r, s, t, blocks, quarter, q = range(6)
    shape = [columns.shape[axis] for axis in (blocks, q, r, s, t, quarter)]
    out.view(shape).copy_(columns.permute(blocks, q, r, s, t, quarter))


def _from_along_n(words: Tensor, out: Tensor) -> None:
    """Words [K, N/8] in AWQ's order -> out int32 [blocks, K, half / 4]."""
    blocks, k, quarter = out.shape
    # four words (two, of small blocks) move as one element: the halves of blocks come apart
    halves = words.view(_WIDE[quarter]).view(k, blocks, 2).permute(2, 1, 0).contiguous().view(torch.int32)
    # of eight columns, bytes of 0, 4, 1, 5 and of 2, 6, 3, 7
    nibbles = _exchange(*halves, 4)
    out.view(blocks, -1, 2).copy_(_exchange(*_exchange(*nibbles, 16), 8).movedim(0, -1).reshape(blocks, -1, 2))
