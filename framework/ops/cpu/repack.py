"""From a file's words to the bytes of torch's int4 kernel: codes stay four bits wide.

The kernel takes blocks of rows. Byte j of column k of a block holds row j low and row j + half high: [blocks, K, half].
So of every file lanes are made first, the bytes along K of one row or of two that share bytes; lanes half a block apart
exchange nibbles; and each block of them is transposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from framework.ops.nibbles import Carrier, Nibbles, part_shape

# Bytes taken at a time: what is made of them stays in a core's cache.
_CHUNK_BYTES = 1 << 19
# Bytes of a lane that are turned at a time: longer ones come to lie in the same lines of the cache.
_TURNED_BYTES = 512
_LOW_NIBBLES = np.uint32(0x0F0F0F0F)
_SIGNS = np.uint32(0x88888888)

_Words = np.ndarray[Any, np.dtype[np.uint32]]


@dataclass(frozen=True, slots=True)
class _Route:
    """How one carrier's lanes come to be the kernel's.

    `lanes`: axes of a block's lanes as the file has them; h: half a block; w: whatever is left; every other letter: 2.
    `out`: the same as the kernel has them; n: what was in the low nibbles, then in the high ones. `rows`: of the
    weight, that share a byte. `turned`: bytes that stay together when a file that runs along N is turned, else 0.
    """

    lanes: str
    out: str
    rows: int
    turned: int = 0

    def low_and_high(self, lanes: _Words) -> _Words:
        """View words [I, lanes, W] of the file as [2, I, .., W], the first half of every block first."""
        return self._first("h", self.lanes, lanes)

    def even_and_odd(self, lanes: _Words) -> _Words:
        """View words [I, lanes, W] of the kernel as [2, I, .., W], what was in low nibbles first."""
        return self._first("n", self.out, lanes)

    def _first(self, axis: str, axes: str, lanes: _Words) -> _Words:
        images, count, words = lanes.shape
        sizes = [count >> len(axes) - 1 if each == "w" else 2 for each in axes]
        order = [1 + axes.index(each) for each in self.lanes.replace("h", "")]
        return lanes.reshape(images, *sizes, words).transpose(1 + axes.index(axis), 0, *order, 1 + len(axes))


_ROUTES = {
    Carrier.ALONG_K: _Route("hw", "nw", 1),
    Carrier.ALONG_K_FIRST: _Route("hw", "nw", 1, turned=4),
    Carrier.ROW_PAIRS: _Route("hw", "wn", 2),
    # a word's bytes hold rows 0 and 2, 4 and 6, 1 and 3, 5 and 7
    Carrier.ALONG_N: _Route("hwba", "wanb", 2, turned=1),
}


def can_repack(codes: Nibbles, block: int) -> bool:
    """Whether every part has whole blocks and whole words."""
    sizes = [part_shape(part, codes.carrier) for part in codes.parts]
    return all(n % block == 0 and k % 8 == 0 for n, k in sizes)


def repack(codes: Nibbles, out: Tensor, block: int) -> None:
    """Fill int4pack bytes uint8 [N, K/2] of codes that `can_repack`, chunk by chunk."""
    route, first = _ROUTES[codes.carrier], 0
    for part in codes.parts:
        n, _ = part_shape(part, codes.carrier)
        target = out[first : first + n].view(n // block, -1, block // route.rows)
        first += n
        for chunk, to in _along_n(part, target, route.turned) if route.turned else _along_k(part, target):
            made = _exchanged(chunk.numpy().view(np.uint32), route, codes.is_signed)
            to.copy_(_transposed(torch.from_numpy(made.view(np.uint8))).view(to.shape))


def _along_k(part: Tensor, target: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield chunks of a file that runs along K, uint8 [blocks, lanes, bytes], and where they go: [.., bytes, lanes]."""
    blocks, length, count = target.shape
    lanes = part.view(torch.uint8).view(blocks, count, length)
    columns = min(length, _CHUNK_BYTES // count)
    step = max(_CHUNK_BYTES // (count * columns), 1)
    for top in range(0, blocks, step):
        for left in range(0, length, columns):
            along = slice(left, left + columns)
            yield lanes[top : top + step, :, along], target[top : top + step, along]


def _along_n(part: Tensor, target: Tensor, turned: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Turn a file that runs along N, and yield the same, images of few bytes a lane.

    Chunks are uint8 [images * blocks, lanes, bytes], and go to [images, blocks, bytes, lanes].
    """
    blocks, length, count = target.shape
    lines = part.view(torch.uint8 if turned == 1 else torch.float32)  # moved as they are
    step = max(_CHUNK_BYTES // (count * _TURNED_BYTES), 1)
    for top in range(0, blocks, step):
        bottom, left = min(top + step, blocks), 0
        most = max(_CHUNK_BYTES // ((bottom - top) * count * _TURNED_BYTES), 1)
        while left < length:
            size = min(_TURNED_BYTES, length - left)
            images = min(most, (length - left) // size)
            right = left + images * size
            piece = lines[left // turned : right // turned, top * count : bottom * count].contiguous()
            chunk = _transposed(piece.view(images, size // turned, -1)).view(torch.uint8)
            to = target[top:bottom, left:right].unflatten(1, (images, size)).transpose(0, 1)
            yield chunk.view(-1, count, size), to
            left = right


def _exchanged(lanes: _Words, route: _Route, is_signed: bool) -> _Words:
    """Return words [I, lanes, W] whose low nibbles are of a block's first half, and whose high ones of the other."""
    made = np.empty_like(lanes, order="C")
    (low, high), (even, odd) = route.low_and_high(lanes), route.even_and_odd(made)
    differ = np.right_shift(low, 4)
    np.bitwise_xor(differ, high, out=differ)
    np.bitwise_and(differ, _LOW_NIBBLES, out=differ)
    np.bitwise_xor(differ, high, out=odd)
    np.left_shift(differ, 4, out=differ)
    np.bitwise_xor(differ, low, out=even)
    if is_signed:
        np.bitwise_xor(made, _SIGNS, out=made)
    return made


def _transposed(matrices: Tensor) -> Tensor:
    """Return [I, C, R] of contiguous matrices [I, R, C] of uint8 or fp32.

    A shuffle of channels is this, and torch does it in vector registers, ten times as fast as it copies a transposed
    view.
    """
    count, rows, columns = matrices.shape
    channels_last = matrices.view(1, count, 1, rows * columns).permute(0, 3, 1, 2)
    shuffled = torch.channel_shuffle(channels_last, rows)
    return shuffled.permute(0, 2, 3, 1).view(count, columns, rows)
