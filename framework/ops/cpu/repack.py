"""From a file's words to the bytes of torch's int4 kernel: codes stay four bits wide.

The kernel takes blocks of rows. Byte j of column k of a block holds row j low and row j + half high: [blocks, K, half].
Where a code stands is told by bits: of its nibble in a word of eight, and of its word's place. Row bits of a half block
are i.. r s, the lowest last, h is the half; column bits below those of Q are c2 c1 c0. The kernel's word holds h, s and
r. So words are dealt to planes by some of these bits; an exchange of bit fields between two planes swaps one bit of
the planes with one of the word; and the planes are written side by side.

In numpy: on half a megabyte, which stays in a core's cache, its passes take two thirds of torch's time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from framework.ops.nibbles import Carrier, Nibbles, part_shape

# Words taken at a time: half a megabyte, and as much again to exchange.
_CHUNK_WORDS = 1 << 17
_LOW_FIELDS = {4: 0x0F0F0F0F, 8: 0x00FF00FF, 16: 0x0000FFFF}
_SIGNS = np.uint32(0x88888888)

_Words = np.ndarray[Any, np.dtype[np.uint32]]


@dataclass(frozen=True, slots=True)
class _Route:
    """How one carrier's words come to be the kernel's.

    `source`, `out`: axes of the words of file and kernel; B: blocks, Q: words along K, every small letter but i: 2.
    `planes`: axes that are dealt to planes, then the others, in the order that both copies run fast in.
    `exchanges`: plane axis and bit of the word (4, 8, 16) that trade places, one after the other; an axis keeps its
    letter in `out` and stands for what it received. `between`: axes that the source is copied to first, so that both
    copies move long runs.
    """

    source: str
    planes: str
    exchanges: tuple[tuple[int, int], ...]
    out: str
    between: str = ""

    def sizes(self, n: int, k: int, block: int) -> dict[str, int]:
        """Length of every axis for codes [N, K]."""
        columns, rows = self.out.index("i") - 2, len(self.out) - self.out.index("i") - 1
        return dict.fromkeys(self.out, 2) | {"B": n // block, "Q": k >> columns, "i": block >> 3 + rows}


_ROUTES = {
    # words hold c0 c1 c2
    Carrier.ALONG_K: _Route("BhirsQ", "hsrBiQ", ((0, 4), (1, 8), (2, 16)), "BQrshi"),
    Carrier.ALONG_K_FIRST: _Route("QBhirs", "rshBQi", ((2, 4), (1, 8), (0, 16)), "BQrshi", "hBQirs"),
    # words hold s c0 c1: h goes in for s, which goes in for c0
    Carrier.ROW_PAIRS: _Route("BhirQ", "hrBiQ", ((0, 4), (0, 8), (1, 16)), "BQrhi"),
    # words hold r i0 s: h goes in for r, which goes in for s, which goes in for i0
    Carrier.ALONG_N: _Route("QBhi", "hBQi", ((0, 4), (0, 16), (0, 8)), "BQih"),
}


def can_repack(codes: Nibbles, block: int) -> bool:
    """Whether every part has whole blocks and whole words."""
    sizes = [part_shape(part, codes.carrier) for part in codes.parts]
    return all(n % block == 0 and k % 8 == 0 for n, k in sizes)


def repack(codes: Nibbles, out: Tensor, block: int) -> None:
    """Fill int4pack bytes uint8 [N, K/2] of codes that `can_repack`, chunk by chunk."""
    route = _ROUTES[codes.carrier]
    words, first = out.numpy().view(np.uint32), 0
    for part in codes.parts:
        n, k = part_shape(part, codes.carrier)
        sizes = route.sizes(n, k, block)
        source = part.numpy().view(np.uint32).reshape([sizes[axis] for axis in route.source])
        target = words[first : first + n].reshape([sizes[axis] for axis in route.out])
        target = _turned(target, route.out, route.planes)
        first += n
        axis, length = route.planes.index(route.source[0]), len(source)
        step = max(_CHUNK_WORDS * length // source.size, 1)
        scratch = np.empty((2, source.size * min(step, length) // length), np.uint32)
        for start in range(0, length, step):
            filled = target[(slice(None),) * axis + (slice(start, start + step),)]
            _fill(filled, source[start : start + step], scratch, route, codes.is_signed)


def _turned(words: _Words, axes: str, wanted: str) -> _Words:
    """Return the view along `wanted` of words along `axes`."""
    return words.transpose([axes.index(axis) for axis in wanted])


def _fill(target: _Words, source: _Words, scratch: _Words, route: _Route, is_signed: bool) -> None:
    """`target` runs along the route's planes; `scratch`: two rows, at least as long as both."""
    planes, other = scratch[:, : source.size].reshape(2, *target.shape)
    axes = route.source
    if route.between:
        turned = _turned(source, axes, route.between)
        source, axes = other.reshape(turned.shape), route.between
        _copy(source, turned)
    _copy(planes, _turned(source, axes, route.planes))
    for axis, bits in route.exchanges:
        _exchange(planes.swapaxes(0, axis), other.swapaxes(0, axis), bits)
        planes, other = other, planes
    if is_signed:
        planes ^= _SIGNS
    # one by one: else the shortest axes can come to be the innermost loop
    for plane in np.ndindex(target.shape[:-3]):
        _copy(target[plane], planes[plane])


def _copy(target: _Words, source: _Words) -> None:
    """Copy words four at a time where they lie so: numpy takes a loop for every run of the last axis."""
    if target.strides[-1] == source.strides[-1] == 4 and target.shape[-1] % 4 == 0:
        target, source = target.view(np.complex128), source.view(np.complex128)
    np.copyto(target, source)


def _exchange(planes: _Words, out: _Words, bits: int) -> None:
    """Fill `out` [2, ..] with the even fields of both planes, field by field, then with the odd ones."""
    (low, high), (even, odd) = planes, out
    distance, fields = np.uint32(bits), np.uint32(_LOW_FIELDS[bits])
    np.right_shift(low, distance, out=odd)
    np.bitwise_xor(odd, high, out=odd)
    np.bitwise_and(odd, fields, out=odd)
    np.left_shift(odd, distance, out=even)
    np.bitwise_xor(even, low, out=even)
    np.bitwise_xor(odd, high, out=odd)
