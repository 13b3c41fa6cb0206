"""compressed-tensors to QuantTensors: integer codes of 4 and 8 bits, a byte each, in words, or in pairs of rows.

Tensors and their meaning: compressed-tensors 0.20 (pack-quantized, int-quantized), cann-recipes-infer (pairs, clip).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from framework.checkpoint.faults import malformed
from framework.checkpoint.index import Index, TensorInfo
from framework.checkpoint.reader import Reader
from framework.errors import Problem, Refused
from framework.formats.base import one_by_one
from framework.formats.compressed_tensors.layout import CompressedTensorsLayout
from framework.formats.plain import decode as plain
from framework.geometry import Module, Rect
from framework.ops.nibbles import Carrier, Nibbles, unpack_along_k
from framework.quantization.tensor import QuantTensor

LAYOUT = CompressedTensorsLayout()
# a 64-bit scale is read as two fp32, the first of which it is
CONTAINERS = plain.TYPES | {"I8": torch.int8, "I32": torch.int32, "I64": torch.float32, "U64": torch.float32}
READ_BYTES = 4 << 20  # at a time, so that a network file system sees few and large reads
CHUNK_VALUES = 1 << 18  # unpacked at a time: temporaries stay in cache
# `bias` of paired rows is 8 * sum_k value, rounded in fp32; the bound is a part of 8 * sum_k |value|
SHIFT, TOLERANCE = 8.0, 1e-3


def decode(
    module: Module,
    rect: Rect,
    scheme: str,
    index: Index,
    reader: Reader,
    *,
    dtype: torch.dtype = torch.float32,
) -> QuantTensor:
    """Return a rectangle of a module's weight.

    float: (code - zero) * scale in fp32 (exact for scales of 16 bits), rounded to `dtype`; any rectangle. Else codes
    int8 [N, K] (-8..7 of 4 bits), scales and zero points fp32 [N, G], `order` where groups follow g_idx; `whole` has
    `input_scale` and `input_offset` fp32 [1] for w8a8_static, `alpha` fp32 [1] for w4a8_dynamic with clip (inputs are
    clamped to alpha times the largest of their token). Codes of w4a16 stay packed where the rectangle has whole words.

    Raises:
        Refused: `compensation`, a bias of paired rows that is not that of their codes.
        InputError: `file-malformed`, g_idx without whole groups; `file-truncated`, `file-missing`, `file-unreadable`.
    """
    held = LAYOUT.held(module, index)
    if held.scheme == "float":
        return plain.decode(module, rect, scheme, index, reader, dtype=dtype)
    infos = {spec.role: index.tensors[spec.name] for spec in held.tensors}
    source = _Source(infos, reader, module.shape, int(held.scheme[1]), held.group)
    return QuantTensor(source.values(rect, dtype)) if scheme == "float" else source.quantized(rect, scheme)


decode_experts = one_by_one(decode)


def bias(module: Module, rect: Rect, index: Index, reader: Reader) -> Tensor:
    """Return rows n0..n1 of a module's float bias in fp32."""
    return plain.bias(module, rect, index, reader)


@dataclass(frozen=True, slots=True)
class _Form:
    """How codes lie in bytes: rows and columns a byte, and bytes [R, C] to int8 codes."""

    rows: int
    columns: int
    unpack: Callable[[Tensor], Tensor]


def _nibbles_along_k(raw: Tensor) -> Tensor:
    """The lower half of a byte is the earlier column; both halves are code + 8."""
    return unpack_along_k(raw, 4).view(torch.int8).sub_(8)


def _nibbles_along_n(raw: Tensor) -> Tensor:
    """The lower half of a byte is the earlier row; both halves are two's complement."""
    signed = raw.view(torch.int8)
    return torch.stack(((signed << 4) >> 4, signed >> 4), dim=1).flatten(0, 1)


BYTES = _Form(1, 1, lambda raw: raw.view(torch.int8))
PAIRS = _Form(2, 1, _nibbles_along_n)
# little-endian words with the earliest code lowest are bytes in order
WORDS = {4: _Form(1, 2, _nibbles_along_k), 8: _Form(1, 1, lambda raw: (raw ^ 128).view(torch.int8))}


@dataclass(frozen=True, slots=True)
class _Source:
    """The tensors of one linear [N, K] by role, its bits, and features a scale (0: all)."""

    infos: dict[str, TensorInfo]
    reader: Reader
    shape: tuple[int, int]
    bits: int
    group: int

    @property
    def form(self) -> _Form:
        if "weight_packed" in self.infos:
            return WORDS[self.bits]
        return BYTES if self.infos["weight"].shape[0] == self.shape[0] else PAIRS

    @property
    def groups(self) -> int:
        """Scales of a row."""
        return -(-self.shape[1] // self.group) if self.group else 1

    def columns(self, rect: Rect) -> tuple[int, int]:
        """Columns of the scales that a rectangle needs."""
        return (rect.k0 // self.group, -(-rect.k1 // self.group)) if self.groups > 1 else (0, 1)

    def values(self, rect: Rect, dtype: torch.dtype) -> Tensor:
        """Dequantize a rectangle by chunks of rows."""
        g_idx, (first, last) = self.g_idx(), self.columns(rect)
        if g_idx is not None:
            first, last = 0, self.groups
        scale, zero = self.table("weight_scale", rect, first, last), self.zeros(rect, first, last)

        def spread(table: Tensor) -> Tensor:
            if self.groups == 1:
                return table
            if g_idx is not None:
                return table.index_select(1, g_idx[rect.k0 : rect.k1])
            begin = first * self.group
            return table.repeat_interleave(self.group, dim=1)[:, rect.k0 - begin : rect.k1 - begin]

        out = torch.empty(rect.shape, dtype=dtype)
        for start, stop, codes in self.chunks(rect):
            values = codes.float()
            if zero is not None:
                values -= spread(zero[start:stop])
            out[start:stop] = values.mul_(spread(scale[start:stop]))
        return out

    def quantized(self, rect: Rect, scheme: str) -> QuantTensor:
        """Return a rectangle's codes with all that they mean."""
        k = rect.shape[1]
        order = self.order()
        if order is not None and k != self.shape[1]:
            raise ValueError("columns in activation order cannot be cut")
        codes = self.packed(rect) if scheme == "w4a16" and order is None else None
        first, last = self.columns(rect)
        return QuantTensor(
            self.unpacked(rect, order) if codes is None else codes,
            self.table("weight_scale", rect, first, last),
            self.zeros(rect, first, last),
            group_size=self.group if self.groups > 1 else k,
            bits=self.bits,
            order=order,
            whole=self.whole(scheme),
        )

    def packed(self, rect: Rect) -> Nibbles | None:
        """Return codes of 4 bits as they lie in the file, where a rectangle has whole words."""
        if self.form is not WORDS[4] or rect.k0 % 8 or rect.k1 % 8:
            return None
        raw = self.reader.read(self.infos["weight_packed"], rect.n0, rect.n1, rect.k0 // 2, rect.k1 // 2)
        return Nibbles((torch.from_numpy(raw).view(torch.int32),), Carrier.ALONG_K)

    def unpacked(self, rect: Rect, order: Tensor | None) -> Tensor:
        """Codes int8 [N, K], groups contiguous."""
        codes = torch.empty(rect.shape, dtype=torch.int8)
        for start, stop, chunk in self.chunks(rect):
            # numpy's take: four times as fast as torch's
            part = chunk if order is None else torch.from_numpy(chunk.numpy().take(order.numpy(), axis=1))
            codes[start:stop] = part
        return codes

    def whole(self, scheme: str) -> dict[str, Tensor]:
        """What a scheme takes of its inputs."""
        if scheme == "w8a8_static":
            offset = self.single("input_zero_point") if "input_zero_point" in self.infos else torch.zeros(1)
            return {"input_scale": self.single("input_scale"), "input_offset": offset}
        return {"alpha": self.single("alpha")} if scheme == "w4a8_dynamic" and "alpha" in self.infos else {}

    def chunks(self, rect: Rect) -> Iterator[tuple[int, int, Tensor]]:
        """Yield ranges of the rectangle's rows with their codes, int8 [rows, columns]."""
        form = self.form
        info = self.infos.get("weight_packed") or self.infos["weight"]
        first, last = rect.k0 // form.columns, -(-rect.k1 // form.columns)
        top, bottom = rect.n0 // form.rows, -(-rect.n1 // form.rows)
        step = max(1, CHUNK_VALUES // ((last - first) * form.columns * form.rows))
        read_step = max(1, READ_BYTES // ((last - first) * step)) * step
        wanted = self.compensation(rect) if form is PAIRS else None
        for row0 in range(top, bottom, read_step):
            row1 = min(row0 + read_step, bottom)
            raw = torch.from_numpy(self.reader.read(info, row0, row1, first, last))
            for low in range(row0, row1, step):
                high = min(low + step, row1)
                start, stop = max(low * form.rows, rect.n0), min(high * form.rows, rect.n1)
                codes = form.unpack(raw[low - row0 : high - row0])
                codes = codes[start - low * form.rows : stop - low * form.rows]
                codes = codes[:, rect.k0 - first * form.columns : rect.k1 - first * form.columns]
                start, stop = start - rect.n0, stop - rect.n0
                if wanted is not None:
                    self.confirm(codes, *(each[start:stop] for each in wanted))
                yield start, stop, codes

    def table(self, role: str, rect: Rect, first: int, last: int) -> Tensor:
        """Columns first..last of a rectangle's rows, fp32; of a tensor with one value, that, every row."""
        info = self.infos[role]
        n = rect.shape[0]
        if prod(info.shape) == 1:
            return self.single(role).expand(n, 1).contiguous()
        size = info.nbytes // prod(info.shape)
        raw = torch.from_numpy(self.reader.read(info, rect.n0, rect.n1, first * size, last * size))
        return raw.view(CONTAINERS[info.dtype])[:, : last - first].float()

    def zeros(self, rect: Rect, first: int, last: int) -> Tensor | None:
        """Zero points [N, G] of signed codes; words hold them along N, the earliest row lowest."""
        info = self.infos.get("weight_zero_point")
        if info is None or info.dtype != "I32":
            return None if info is None else self.table("weight_zero_point", rect, first, last)
        count, half = 32 // self.bits, 1 << (self.bits - 1)
        top = rect.n0 // count
        raw = self.reader.read(info, top, -(-rect.n1 // count), 4 * first, 4 * last)
        shifts = torch.arange(0, 32, self.bits, dtype=torch.int32).unsqueeze(1)
        fields = (torch.from_numpy(raw).view(torch.int32).unsqueeze(1) >> shifts) & (2 * half - 1)
        return (fields.flatten(0, 1)[rect.n0 - top * count : rect.n1 - top * count] - half).float()

    def single(self, role: str) -> Tensor:
        """A value of the weight as a whole, fp32 [1]."""
        info = self.infos[role]
        return torch.from_numpy(self.reader.read(info, 0, 1)).view(CONTAINERS[info.dtype]).flatten()[:1].float()

    def g_idx(self) -> Tensor | None:
        """Group of each column, int64 [K]; None where the tensor is not there or was left at -1."""
        info = self.infos.get("weight_g_idx")
        if info is None or self.groups == 1:
            return None
        groups = torch.from_numpy(self.reader.read(info, 0, 1)).view(torch.int32).flatten().long()
        if bool((groups == -1).all()):
            return None
        members = torch.arange(self.shape[1]) // self.group
        if not torch.equal(groups.sort().values, members):
            raise malformed(info.file, f"{info.name} does not deal {self.shape[1]} columns to groups of {self.group}")
        return groups

    def order(self) -> Tensor | None:
        """Columns by group; None where they are already."""
        groups = self.g_idx()
        if groups is None or bool((groups[1:] >= groups[:-1]).all()):
            return None
        return torch.argsort(groups, stable=True)

    def compensation(self, rect: Rect) -> tuple[Tensor, Tensor] | None:
        """Stored bias and scale [N] of paired rows; None for part of the columns, whose sum nothing tells."""
        if rect.shape[1] != self.shape[1]:
            return None
        info = self.infos["bias"]
        stored = torch.from_numpy(self.reader.read(info, 0, 1)).view(CONTAINERS[info.dtype]).flatten().float()
        return stored[rect.n0 : rect.n1], self.table("weight_scale", rect, 0, 1).flatten()

    def confirm(self, codes: Tensor, stored: Tensor, scale: Tensor) -> None:
        """Refuse paired rows whose bias is that of other codes: nibbles are not where they are looked for."""
        total, most = codes.sum(1, dtype=torch.int32), codes.abs().sum(1, dtype=torch.int32)
        right = (stored - SHIFT * scale * total).abs() <= TOLERANCE * SHIFT * scale * most
        if not bool(right.all()):
            info = self.infos["bias"]
            raise Refused(
                Problem(
                    "compensation",
                    f"{info.name} is not 8 times the row sums of its weight",
                    info.file.name,
                    f"{int((~right).sum())} of {len(right)} rows differ: the codes are packed otherwise, "
                    "or the tensor is a bias of the model",
                    "convert the weights again with the tool that declares activation_use_clip",
                )
            )
