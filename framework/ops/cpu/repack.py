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
# Bytes of a lane that are turned at a time: what is a power of two apart shares few places in the cache.
_TURNED_BYTES = 256
_LOW_NIBBLES = np.uint32(0x0F0F0F0F)
_SIGNS = np.uint32(0x88888888)

_Array = np.ndarray[Any, np.dtype[Any]]
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
    route, rows = _ROUTES[codes.carrier], out.numpy()
    for part in codes.parts:
        n, _ = part_shape(part, codes.carrier)
        target, rows = rows[:n].reshape(n // block, -1, block // route.rows), rows[n:]
        chunks = _along_n(part.numpy(), target, route.turned) if route.turned else _along_k(part.numpy(), target)
        for chunk, to in chunks:
            made = _transposed(_exchanged(chunk.view(np.uint32), route, codes.is_signed).view(np.uint8))
            np.copyto(to, made.reshape(to.shape))


def _along_k(part: _Array, target: _Array) -> Iterator[tuple[_Array, _Array]]:
    """Yield chunks of a file that runs along K, uint8 [blocks, lanes, bytes], and where they go: [.., bytes, lanes]."""
    blocks, length, count = target.shape
    lanes = part.view(np.uint8).reshape(blocks, count, length)
    columns = min(length, _CHUNK_BYTES // count)
    step = max(_CHUNK_BYTES // (count * columns), 1)
    for top in range(0, blocks, step):
        for left in range(0, length, columns):
            along = slice(left, left + columns)
            yield lanes[top : top + step, :, along], target[top : top + step, along]


def _along_n(part: _Array, target: _Array, turned: int) -> Iterator[tuple[_Array, _Array]]:
    """Turn a file that runs along N, and yield the same, images of few bytes a lane.

    Chunks are uint8 [images * blocks, lanes, bytes], and go to [images, blocks, bytes, lanes].
    """
    blocks, length, count = target.shape
    lines = part.view(np.uint8 if turned == 1 else np.float32)  # moved as they are
    longest = -(-length // -(-length // _TURNED_BYTES) // 8) * 8
    step = max(_CHUNK_BYTES // (count * longest), 1)
    for top in range(0, blocks, step):
        bottom, left = min(top + step, blocks), 0
        most = max(_CHUNK_BYTES // ((bottom - top) * count * longest), 1)
        while left < length:
            size = min(longest, length - left)
            images = min(most, (length - left) // size)
            right = left + images * size
            piece = np.ascontiguousarray(lines[left // turned : right // turned, top * count : bottom * count])
            chunk = _transposed(piece.reshape(images, size // turned, -1)).view(np.uint8)
            to = target[top:bottom, left:right].reshape(bottom - top, images, size, count).swapaxes(0, 1)
            yield chunk.reshape(-1, count, size), to
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


def _transposed(matrices: _Array) -> _Array:
    """Return [I, C, R] of contiguous matrices [I, R, C] of uint8 or fp32.

    A shuffle of channels is this, and torch does it in vector registers, ten times as fast as it copies a transposed
    view.
    """
    count, rows, columns = matrices.shape
    channels = rows * columns
    channels_last = torch.from_numpy(matrices).as_strided(
        (1, channels, count, 1), (count * channels, 1, channels, channels)
    )
    shuffled: _Array = torch.channel_shuffle(channels_last, rows).numpy()
    return shuffled.transpose(0, 2, 3, 1).reshape(count, columns, rows)
