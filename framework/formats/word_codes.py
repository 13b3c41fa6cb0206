"""32-bit words to codes, scales and zero points: the decoding half that AWQ, GPTQ and auto-round share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from framework.checkpoint.index import Index, TensorInfo
from framework.checkpoint.reader import Reader
from framework.errors import Problem, Refused
from framework.formats.base import Held
from framework.formats.names import stem
from framework.formats.plain import decode as plain
from framework.formats.words import Packing, is_quantized
from framework.geometry import Kind, Module, Rect
from framework.quantization.tensor import QuantTensor

Words = np.ndarray[Any, np.dtype[np.uint32]]
Codes = np.ndarray[Any, np.dtype[np.uint8]]

# Column that field i of a word holds, among those that share the word (AutoAWQ's gemm packing).
AWQ_FIELDS = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 1, 2, 3)}
INTERLEAVED_BYTES = (0, 2, 1, 3)
# GPTQ v1 stores zero points minus one, subtracted from the word as a whole: a zero point of 0 borrows.
ONES = {4: 0x11111111, 8: 0x01010101}
BITS = {"w4a16": 4, "w8a16": 8}


def decode_words(
    module: Module,
    rect: Rect,
    scheme: str,
    index: Index,
    reader: Reader,
    held: Held,
    packing: Packing,
    *,
    dtype: torch.dtype,
) -> QuantTensor:
    """Return a rectangle of a module's weight; its values in `dtype` where the scheme is float.

    Raises:
        Refused: `zero-points`, a symmetric file whose words say otherwise.
    """
    if module.kind is not Kind.LINEAR or not is_quantized(module, index):
        return plain.decode(module, rect, scheme, index, reader, dtype=dtype)
    source = _Source(stem(module, index), index, reader, BITS[held.scheme], packing)
    order = source.order(held)
    if scheme != "float":
        return source.quantized(rect, held, module.shape[1], order)
    step = module.shape[1] if order is not None or not held.group else held.group
    wide = Rect(rect.n0, rect.n1, rect.k0 // step * step, min(-(-rect.k1 // step) * step, module.shape[1]))
    weight = source.quantized(wide, held, module.shape[1], order).dequantize()
    return QuantTensor(weight[:, rect.k0 - wide.k0 : rect.k1 - wide.k0].to(dtype))


def bias_of(module: Module, rect: Rect, index: Index, reader: Reader) -> Tensor:
    """Return rows n0..n1 of a module's bias in fp32."""
    return plain.bias(module, rect, index, reader)


@dataclass(frozen=True, slots=True)
class _Source:
    """The tensors of one linear."""

    name: str
    index: Index
    reader: Reader
    bits: int
    packing: Packing

    def quantized(self, rect: Rect, held: Held, k: int, order: Tensor | None) -> QuantTensor:
        half = 1 << (self.bits - 1)
        codes = torch.from_numpy(np.ascontiguousarray(self.codes(rect)))
        groups = (0, 1) if not held.group else (rect.k0 // held.group, -(-rect.k1 // held.group))
        scale, zero = self.scales(rect, groups), torch.from_numpy(np.ascontiguousarray(self.zeros(rect, groups)))
        if held.symmetric and self.packing.along == "gptq" and not bool((zero == half).all()):
            raise Refused(self.disagreement(int(zero.flatten()[(zero != half).flatten().int().argmax()])))
        if order is not None:
            codes = codes[:, order]
        size = held.group or rect.k1 - rect.k0
        if bool((zero == half).all()):
            signed = (codes.to(torch.int16) - half).to(torch.int8)
            return QuantTensor(signed, scale, group_size=size, bits=self.bits, order=order)
        return QuantTensor(codes, scale, zero.float(), group_size=size, bits=self.bits, order=order)

    def info(self, suffix: str) -> TensorInfo:
        return self.index.tensors[f"{self.name}.{suffix}"]

    def order(self, held: Held) -> Tensor | None:
        """Return the input feature of each column once groups are contiguous; None where they are already."""
        info = self.index.tensors.get(f"{self.name}.g_idx")
        if info is None or not held.group:
            return None
        groups = torch.from_numpy(self.reader.read(info, 0, 1).reshape(-1).view(np.int32).astype(np.int64))
        if bool((groups[1:] >= groups[:-1]).all()):
            return None
        return torch.argsort(groups, stable=True)

    def codes(self, rect: Rect) -> Codes:
        """Codes [N, K] of the rectangle."""
        info, per_word = self.info("qweight"), 32 // self.bits
        if self.packing.along == "gptq":
            first = rect.k0 // per_word
            words = self.words(info, first, -(-rect.k1 // per_word), rect.n0, rect.n1)
            fields = unpack(words.T, self.bits)
            return fields[:, rect.k0 - first * per_word : rect.k1 - first * per_word]
        first = rect.n0 // per_word
        words = self.words(info, rect.k0, rect.k1, first, -(-rect.n1 // per_word))
        fields = self.in_order(unpack(words, self.bits))
        return fields[:, rect.n0 - first * per_word : rect.n1 - first * per_word].T

    def zeros(self, rect: Rect, groups: tuple[int, int]) -> Codes:
        """Zero points [N, G]."""
        per_word = 32 // self.bits
        first = rect.n0 // per_word
        words = self.words(self.info("qzeros"), *groups, first, -(-rect.n1 // per_word))
        if self.packing.variant == "v1":
            words = words + np.uint32(ONES[self.bits])
        fields = unpack(words, self.bits)
        if self.packing.along == "awq":
            fields = self.in_order(fields)
        return fields[:, rect.n0 - first * per_word : rect.n1 - first * per_word].T

    def scales(self, rect: Rect, groups: tuple[int, int]) -> Tensor:
        """Scales [N, G] in fp32."""
        info = self.info("scales")
        kind = plain.TYPES[info.dtype]
        raw = self.reader.read(info, *groups, rect.n0 * kind.itemsize, rect.n1 * kind.itemsize)
        return torch.from_numpy(raw).view(kind).float().t().contiguous()

    def words(self, info: TensorInfo, row0: int, row1: int, column0: int, column1: int) -> Words:
        """A rectangle of words."""
        return self.reader.read(info, row0, row1, 4 * column0, 4 * column1).view(np.uint32)

    def in_order(self, fields: Codes) -> Codes:
        """Put the columns of AWQ's words in order."""
        order = AWQ_FIELDS[self.bits] if self.packing.variant != "interleaved" else INTERLEAVED_BYTES
        per_word = len(order)
        inverse = [order.index(column) for column in range(per_word)]
        return fields.reshape(fields.shape[0], -1, per_word)[:, :, inverse].reshape(fields.shape)

    def disagreement(self, found: int) -> Problem:
        half = 1 << (self.bits - 1)
        other = "v2 (as they are)" if self.packing.variant == "v1" else "v1 (minus one)"
        return Problem(
            "zero-points",
            f"{self.name} is symmetric by its config, and its zero points are {found}, not {half}",
            self.info("qzeros").file.name,
            f"they were read as {self.packing.variant}; read as {other} they may be right: label and words disagree",
            "mend checkpoint_format (GPTQ) or packing_format (auto-round) in the checkpoint's config",
        )


def unpack(words: Words, bits: int) -> Codes:
    """[R, W] words -> [R, W * 32 / bits] fields, the lowest bits first."""
    count = 32 // bits
    out = np.empty((*words.shape, count), np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for field in range(count):
        out[..., field] = (words >> np.uint32(bits * field)) & mask
    return out.reshape(words.shape[0], -1)
