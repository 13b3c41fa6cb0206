"""32-bit words to codes, scales and zero points: the decoding half that AWQ, GPTQ and auto-round share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from framework.checkpoint.faults import malformed
from framework.checkpoint.index import Index, TensorInfo
from framework.checkpoint.reader import Reader
from framework.errors import Problem, Refused
from framework.formats.base import Held
from framework.formats.names import stem
from framework.formats.plain import decode as plain
from framework.formats.words import Packing, is_quantized
from framework.geometry import Kind, Module, Rect
from framework.ops.nibbles import AWQ_FIELDS, Carrier, Nibbles, unpack_along_k, unpack_along_n
from framework.quantization.tensor import QuantTensor

Words = np.ndarray[Any, np.dtype[np.uint32]]

# Field of a word that holds column c of those that share it, lowest bits first (AutoAWQ's gemm packing).
FIELDS = {4: AWQ_FIELDS, 8: (0, 1, 2, 3)}
INTERLEAVED_BYTES = (0, 2, 1, 3)
# GPTQ v1 stores zero points minus one, subtracted from the word as a whole: a zero point of 0 borrows.
ONES = {4: 0x11111111, 8: 0x01010101}
HALVES = {bits: ones << bits - 1 for bits, ones in ONES.items()}
BITS = {"w4a16": 4, "w8a16": 8}
READ_BYTES = 4 << 20  # at a time, so that a network file system sees few and large reads
CHUNK_BYTES = 1 << 18  # of words, unpacked at a time: temporaries stay in cache
TABLE_BYTES = 1 << 20  # of scales in fp32, of as many modules as that is, decoded as one


def decode_words(
    modules: Sequence[Module],
    rect: Rect,
    scheme: str,
    index: Index,
    reader: Reader,
    held: Held,
    packing: Packing,
    *,
    dtype: torch.dtype,
) -> Iterator[QuantTensor]:
    """Yield a rectangle of the weight of each module, all of which the file holds like the first.

    float: (code - zero) * scale in fp32 (exact for scales of 16 bits), rounded to `dtype`; any rectangle. Else codes
    (-8..7 of 4 bits; packed as they are where the rectangle has whole words), scales fp32 [N, G], zero points
    int8 unless the file is symmetric; `order` where groups follow g_idx, whose columns cannot be cut.

    Raises:
        Refused: `zero-points`, a symmetric file whose words say otherwise.
        InputError: `file-malformed`, g_idx without whole groups, or not in order and cut.
    """
    if modules[0].kind is not Kind.LINEAR or not is_quantized(modules[0], index):
        yield from plain.decode_experts(modules, rect, scheme, index, reader, dtype=dtype)
        return
    sources = [_Source(stem(module, index), index, reader, held, packing, module.shape[1]) for module in modules]
    if scheme == "float":
        for source in sources:
            yield QuantTensor(source.values(rect, dtype))
        return
    first, last = sources[0].groups_of(rect)
    step = max(TABLE_BYTES // (4 * rect.shape[0] * (last - first)), 1)
    for start in range(0, len(sources), step):
        some = sources[start : start + step]
        zeros = _zeros(some, rect, first, last)
        for i, scale in enumerate(_scales(some, rect, first, last)):
            yield some[i].quantized(rect, scale, None if zeros is None else zeros[i])


def bias_of(module: Module, rect: Rect, index: Index, reader: Reader) -> Tensor:
    """Return rows n0..n1 of a module's bias in fp32."""
    return plain.bias(module, rect, index, reader)


@dataclass(frozen=True, slots=True)
class _Source:
    """The tensors of one linear of K input features."""

    name: str
    index: Index
    reader: Reader
    held: Held
    packing: Packing
    k: int

    @property
    def bits(self) -> int:
        return BITS[self.held.scheme]

    @property
    def half(self) -> int:
        return 1 << (self.bits - 1)

    def values(self, rect: Rect, dtype: torch.dtype) -> Tensor:
        """Dequantize a rectangle, chunk by chunk."""
        groups = self.groups()[rect.k0 : rect.k1]
        first, last = int(groups.min()), int(groups.max()) + 1
        scale, zeros = _scales([self], rect, first, last)[0], _zeros([self], rect, first, last)
        groups = groups - first
        middle = self.half + (torch.zeros_like(scale) if zeros is None else zeros[0].float())
        out = torch.empty(rect.shape, dtype=dtype)
        for rows, columns, codes in self.chunks(rect):
            values = codes.float()
            values -= _spread(middle[rows], groups[columns])
            out[rows, columns] = values.mul_(_spread(scale[rows], groups[columns]))
        return out

    def groups_of(self, rect: Rect) -> tuple[int, int]:
        """Half-open range of groups of a rectangle, where they are contiguous."""
        group = self.held.group
        return (rect.k0 // group, -(-rect.k1 // group)) if group else (0, 1)

    def quantized(self, rect: Rect, scale: Tensor, zero: Tensor | None) -> QuantTensor:
        """Return a rectangle's codes, with the scales and zero points [N, G] of it."""
        n, k = rect.shape
        group, order = self.held.group, self.order(rect)
        if order is None and (packed := self.packed(rect)) is not None:
            return QuantTensor(packed, scale, zero, group_size=group or k, bits=self.bits)
        # as the words run: along the output features, codes are the transposed view of [K, N]
        codes = torch.empty(n, k, dtype=torch.int8) if self.packing.along == "gptq" else _transposed(n, k)
        for rows, columns, chunk in self.chunks(rect):
            torch.add(chunk.view(torch.int8), -self.half, out=codes[rows, columns])
        if order is not None:
            # numpy's take: four times as fast as torch's
            codes = torch.from_numpy(codes.numpy().take(order.numpy(), axis=1))
        return QuantTensor(codes, scale, zero, group_size=group or k, bits=self.bits, order=order)

    def packed(self, rect: Rect) -> Nibbles | None:
        """Return codes of 4 bits as they lie in the file, where a rectangle has whole words."""
        info, (n0, n1, k0, k1) = self.info("qweight"), (rect.n0, rect.n1, rect.k0, rect.k1)
        if self.bits != 4:
            return None
        if self.packing.along == "gptq" and k0 % 8 == k1 % 8 == 0:
            return Nibbles((_signed(self.words(info, k0 // 8, k1 // 8, n0, n1)),), Carrier.ALONG_K_FIRST)
        if self.packing.along == "awq" and self.fields == AWQ_FIELDS and n0 % 8 == n1 % 8 == 0:
            return Nibbles((_signed(self.words(info, k0, k1, n0 // 8, n1 // 8)),), Carrier.ALONG_N)
        return None

    def info(self, suffix: str) -> TensorInfo:
        return self.index.tensors[f"{self.name}.{suffix}"]

    def groups(self) -> Tensor:
        """Group of each input feature, int32 [K], not to be written to."""
        size = self.held.group or self.k
        in_order = _groups_in_order(self.k, size)
        info = self.index.tensors.get(f"{self.name}.g_idx")
        if info is None or not self.held.group:
            return in_order
        groups = torch.from_numpy(self.reader.read(info, 0, 1)).view(torch.int32).flatten()
        if torch.equal(groups, in_order):
            return in_order
        if not torch.equal(groups.sort().values, in_order):
            raise malformed(info.file, f"{info.name} does not deal {self.k} input features to groups of {size}")
        return groups

    def order(self, rect: Rect) -> Tensor | None:
        """Return the input feature of each column once groups are contiguous; None where they are already."""
        groups = self.groups()
        if torch.equal(groups, _groups_in_order(self.k, self.held.group or self.k)):
            return None
        if rect.shape[1] != self.k:
            info = self.info("g_idx")
            raise malformed(info.file, f"{info.name} is in activation order, which the config does not say")
        return torch.argsort(groups, stable=True)

    def chunks(self, rect: Rect) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield rows and columns of the rectangle with their codes, uint8 [rows, columns], which may be overwritten."""
        info, per_word = self.info("qweight"), 32 // self.bits
        gptq = self.packing.along == "gptq"
        along_n, along_k = (1, per_word) if gptq else (per_word, 1)
        left, right = rect.n0 // along_n, -(-rect.n1 // along_n)
        top, bottom = rect.k0 // along_k, -(-rect.k1 // along_k)
        read_step = max(1, READ_BYTES // (4 * (right - left)))
        for row0 in range(top, bottom, read_step):
            row1 = min(row0 + read_step, bottom)
            block = _signed(self.words(info, row0, row1, left, right))
            if not gptq:
                rows, among = _within(rect.n0, rect.n1, left * along_n, right * along_n)
                step = max(1, CHUNK_BYTES // (4 * (right - left)))
                for low in range(row0, row1, step):
                    words = block[low - row0 : low - row0 + step]
                    columns = slice(low - rect.k0, low - rect.k0 + len(words))
                    yield rows, columns, unpack_along_n(words, self.bits, self.fields).t()[among]
                continue
            block = block.t()
            columns, inside = _within(rect.k0, rect.k1, row0 * along_k, row1 * along_k)
            step = max(1, CHUNK_BYTES // (4 * (row1 - row0)))
            for low in range(left, right, step):
                high = min(low + step, right)
                words = block[low - left : high - left].clone(memory_format=torch.contiguous_format)
                rows, among = _within(rect.n0, rect.n1, low * along_n, high * along_n)
                yield rows, columns, unpack_along_k(words, self.bits)[among, inside]

    def words(self, info: TensorInfo, row0: int, row1: int, column0: int, column1: int) -> Words:
        """A rectangle of words."""
        return self.reader.read(info, row0, row1, 4 * column0, 4 * column1).view(np.uint32)

    @property
    def fields(self) -> tuple[int, ...]:
        """Field of each column among those that share a word."""
        if self.packing.along == "gptq":
            return tuple(range(32 // self.bits))
        return INTERLEAVED_BYTES if self.packing.variant == "interleaved" else FIELDS[self.bits]

    def disagreement(self, found: int) -> Problem:
        read = {"v1": "with one added (v1)", "v2": "as they are (v2)"}.get(self.packing.variant, "as they are")
        return Problem(
            "zero-points",
            f"{self.name} is symmetric by its config, and its zero points are {found}, not {self.half}",
            self.info("qzeros").file.name,
            f"they were read {read}: label and words disagree",
            "mend checkpoint_format (GPTQ), packing_format (auto-round) or zero_point (AWQ) in the checkpoint's config",
        )


def _zeros(sources: Sequence[_Source], rect: Rect, first: int, last: int) -> Tensor | None:
    """Zero points of signed codes, int8 [modules, N, G]; None where the file is symmetric.

    Raises:
        Refused: `zero-points`, the file is symmetric by its config and not by its words.
    """
    own = sources[0]
    per_word = 32 // own.bits
    left, right = rect.n0 // per_word, -(-rect.n1 // per_word)
    words = np.stack([source.words(source.info("qzeros"), first, last, left, right) for source in sources])
    if own.packing.variant == "v1":
        words += np.uint32(ONES[own.bits])
    if own.held.symmetric and (words == HALVES[own.bits]).all():
        return None
    fields = unpack_along_n(_signed(words.reshape(-1, right - left)), own.bits, own.fields).numpy()
    fields = fields.reshape(*words.shape[:2], -1)[:, :, rect.n0 - left * per_word : rect.n1 - left * per_word]
    if not own.held.symmetric:
        return torch.from_numpy((fields - np.uint8(own.half)).view(np.int8)).transpose(1, 2)  # modulo 256
    if (others := fields != own.half).any():
        raise Refused(sources[others.nonzero()[0][0]].disagreement(int(fields[others][0])))
    return None


def _scales(sources: Sequence[_Source], rect: Rect, first: int, last: int) -> Tensor:
    """Scales fp32 [modules, N, G], the transposed view of [modules, G, N]."""
    read = []
    for source in sources:
        info = source.info("scales")
        kind = plain.TYPES[info.dtype]
        raw = source.reader.read(info, first, last, rect.n0 * kind.itemsize, rect.n1 * kind.itemsize)
        read.append(torch.from_numpy(raw).view(kind))
    return torch.stack(read).float().transpose(1, 2)


def _within(first: int, last: int, start: int, stop: int) -> tuple[slice, slice]:
    """Where first..last and start..stop meet, counted from `first` and from `start`."""
    low, high = max(first, start), min(last, stop)
    return slice(low - first, high - first), slice(low - start, high - start)


@lru_cache(maxsize=8)
def _groups_in_order(k: int, size: int) -> Tensor:
    """Group of each of K features, int32 [K], where groups of `size` are contiguous."""
    return torch.arange(k, dtype=torch.int32) // size


def _signed(words: Words) -> Tensor:
    """Words as torch has them."""
    return torch.from_numpy(words.view(np.int32))


def _transposed(n: int, k: int) -> Tensor:
    return torch.empty(k, n, dtype=torch.int8).t()


def _spread(table: Tensor, groups: Tensor) -> Tensor:
    """A value by group [N, G] to one by column; [N, 1] is left to broadcast."""
    return table if table.shape[1] == 1 else table.index_select(1, groups)
