"""From a file's words to the bytes of torch's int4 kernel: codes stay four bits wide.

The kernel takes blocks of rows. Byte j of column k of a block holds row j low and row j + half high: [blocks, K, half].
Everything here works on int32, eight codes at a time.
"""

from __future__ import annotations

import torch
from torch import Tensor

from framework.ops.nibbles import Carrier, Nibbles, part_shape

# Codes taken at a time: 256 kB of words, so that temporaries stay in the cache.
_CHUNK_CODES = 1 << 19


def _int32(bits: int) -> int:
    return bits - (1 << 32) if bits >= 1 << 31 else bits


_LOW_NIBBLES, _HIGH_NIBBLES = 0x0F0F0F0F, _int32(0xF0F0F0F0)
_EVEN_BYTES, _ODD_BYTES = 0x00FF00FF, _int32(0xFF00FF00)
_LOW_HALF, _HIGH_HALF = 0x0000FFFF, _int32(0xFFFF0000)
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
            rows = _rows(in_blocks[start : start + step], codes.carrier)
            _transpose(rows.bitwise_xor_(_SIGNS) if codes.is_signed else rows, target[start : start + step])


def _rows(words: Tensor, carrier: Carrier) -> Tensor:
    """Words of blocks -> their int4pack bytes by rows, int32 [P, blocks, half, Q]; column (Q, 4, P).

    Args:
        words: ALONG_K: [blocks, block, K/8], even and odd columns become two parts. ROW_PAIRS: [blocks, half, K/4].
        carrier: one of the two.
    """
    both = _merge(*words.unflatten(1, (2, -1)).unbind(1))
    if carrier is Carrier.ALONG_K:
        return both
    return both.permute(1, 2, 0, 3).flatten(1, 2).unsqueeze(0)


def _merge(low: Tensor, high: Tensor) -> Tensor:
    """Return [2, ..] of words: their even nibbles, then their odd ones, those of `low` in the low half of each byte."""
    both = low.new_empty((2, *low.shape))
    even, odd = both
    torch.bitwise_and(high, _LOW_NIBBLES, out=even).bitwise_left_shift_(4).bitwise_or_(low & _LOW_NIBBLES)
    torch.bitwise_right_shift(low, 4, out=odd).bitwise_and_(_LOW_NIBBLES).bitwise_or_(high & _HIGH_NIBBLES)
    return both


def _transpose(rows: Tensor, out: Tensor) -> None:
    """Bytes of rows int32 [P, blocks, half, Q] -> out int32 [blocks, K, half / 4], columns in the order (Q, 4, P).

    Four rows become words of four rows by swaps within pairs, and these are transposed as they are.
    """
    parts, blocks, half, words = rows.shape
    first, second, third, fourth = rows.view(parts, blocks, half // 4, 4, words).unbind(3)
    lower, upper = _zip_bytes(first, second), _zip_bytes(third, fourth)
    columns = rows.new_empty((4, parts, blocks, half // 4, words))
    for i, (low, high) in enumerate(zip(lower, upper, strict=True)):
        torch.bitwise_left_shift(high, 16, out=columns[i]).bitwise_or_(low & _LOW_HALF)
        torch.bitwise_right_shift(low, 16, out=columns[i + 2]).bitwise_and_(_LOW_HALF).bitwise_or_(high & _HIGH_HALF)
    out.view(blocks, words, 4, parts, half // 4).copy_(columns.permute(2, 4, 0, 1, 3))


def _zip_bytes(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the even bytes of two rows side by side, and the odd ones."""
    even = (high & _EVEN_BYTES).bitwise_left_shift_(8).bitwise_or_(low & _EVEN_BYTES)
    odd = (low >> 8).bitwise_and_(_EVEN_BYTES).bitwise_or_(high & _ODD_BYTES)
    return even, odd


def _from_along_n(words: Tensor, out: Tensor) -> None:
    """Words [K, N/8] in AWQ's order -> out int32 [blocks, K, half / 4]."""
    blocks, k, quarter = out.shape
    # four words (two, of small blocks) move as one element: the halves of blocks come apart
    halves = words.view(_WIDE[quarter]).view(k, blocks, 2).permute(2, 1, 0).contiguous().view(torch.int32)
    # of eight columns, bytes of 0, 4, 1, 5 and of 2, 6, 3, 7
    even, odd = _merge(*halves)
    pairs = out.view(blocks, -1, 2)
    pairs[..., 0] = _low_bytes(even, odd)
    pairs[..., 1] = _low_bytes(even.bitwise_right_shift_(8), odd.bitwise_right_shift_(8))


def _low_bytes(even: Tensor, odd: Tensor) -> Tensor:
    """Return words of bytes 0 and 2 of `even`, then those of `odd`."""
    low, high = even & _EVEN_BYTES, odd & _EVEN_BYTES
    low.bitwise_or_(low >> 8).bitwise_and_(_LOW_HALF)
    return high.bitwise_or_(high >> 8).bitwise_left_shift_(16).bitwise_or_(low)
