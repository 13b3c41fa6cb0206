"""ModelSlim tensors to QuantTensors (layouts: framework/formats/modelslim/types.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from framework.checkpoint.index import Index, TensorInfo
from framework.checkpoint.reader import Reader
from framework.errors import Problem, Refused
from framework.formats.base import one_by_one
from framework.formats.modelslim.layout import entry, factor
from framework.formats.modelslim.types import TYPES, QuantType
from framework.formats.plain import decode as plain
from framework.geometry import Kind, Module, Rect
from framework.ops.nibbles import Carrier, Nibbles
from framework.quantization.tensor import MX_BLOCK, MX_OUTER_BLOCK, QuantTensor

CONTAINERS = {
    "I8": torch.int8, "U8": torch.uint8, "I32": torch.int32, "I64": torch.int64, "F32": torch.float32,
    "BF16": torch.bfloat16, "F16": torch.float16, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


def decode(
    module: Module,
    rect: Rect,
    scheme: str,
    index: Index,
    reader: Reader,
    *,
    dtype: torch.dtype = torch.float32,
) -> QuantTensor:
    """Return a rectangle of a module's weight; its values in `dtype` where the scheme is float.

    Raises:
        Refused: `format-feature`, a second scale with an offset.
    """
    name, label = entry(module, index)
    kind = TYPES.get(label) if module.kind is Kind.LINEAR else None
    if kind is None:
        return plain.decode(module, rect, scheme, index, reader, dtype=dtype)
    source = _Source(name, index, reader, factor(module, index))
    if scheme == "float":
        # whole words and groups are read, then cut
        wide = _aligned(rect, module, kind, source)
        values = _quantized(module, wide, kind, source, static=False)
        weight = values.dequantize()
        if "mul_scale" in values.columns:
            weight = weight * values.columns["mul_scale"]
        n0, k0 = rect.n0 - wide.n0, rect.k0 - wide.k0
        n, k = rect.shape
        return QuantTensor(weight[n0 : n0 + n, k0 : k0 + k].to(dtype))
    packed = _nibbles(module, rect, source) if scheme == kind.scheme == "w4a16" else None
    return _quantized(module, rect, kind, source, static=scheme == "w8a8_static", packed=packed)


decode_experts = one_by_one(decode)


def bias(module: Module, rect: Rect, index: Index, reader: Reader) -> Tensor:
    """Return rows n0..n1 of a module's float bias in fp32."""
    if module.kind is not Kind.LINEAR:
        return plain.bias(module, rect, index, reader)
    source = _Source(entry(module, index)[0], index, reader, None)
    return source.vector("bias")[rect.n0 : rect.n1].float()


class _Source:
    """The tensors of one linear, by suffix."""

    def __init__(self, name: str, index: Index, reader: Reader, factor_name: str | None) -> None:
        self.name, self.tensors, self.reader, self.factor_name = name, index.tensors, reader, factor_name

    def info(self, suffix: str) -> TensorInfo | None:
        return self.tensors.get(f"{self.name}.{suffix}")

    def vector(self, suffix: str) -> Tensor:
        """All values, flattened."""
        info = self.info(suffix)
        if info is None:
            raise KeyError(f"{self.name}.{suffix}")
        return self._read(info).flatten()

    def factor(self) -> Tensor | None:
        return None if self.factor_name is None else self._read(self.tensors[self.factor_name]).flatten().float()

    def rows(self, suffix: str, n0: int, n1: int, k0: int = 0, k1: int | None = None) -> Tensor:
        """Rows n0..n1 and columns k0..k1 (of the tensor as stored, trailing dimensions flattened)."""
        info = self.info(suffix)
        if info is None:
            raise KeyError(f"{self.name}.{suffix}")
        container = CONTAINERS[info.dtype]
        if len(info.shape) != 2:  # [N], or [N, D, 1]: small
            values = self._read(info).reshape(info.shape[0], -1)
            return values[n0:n1, k0:k1]
        end = info.shape[1] if k1 is None else k1
        raw = self.reader.read(info, n0, n1, k0 * container.itemsize, end * container.itemsize)
        return torch.from_numpy(raw).view(container)

    def _read(self, info: TensorInfo) -> Tensor:
        rows = 1
        for extent in info.shape[:-1]:
            rows *= extent
        return torch.from_numpy(self.reader.read(info, 0, rows)).view(CONTAINERS[info.dtype])


def _packing(module: Module, source: _Source) -> tuple[int, int]:
    """Codes a byte along N and along K."""
    info = source.info("weight")
    assert info is not None
    return module.shape[0] // info.shape[0], module.shape[1] // info.shape[1]


def _group(module: Module, kind: QuantType, source: _Source) -> int:
    """Input features that share a scale."""
    if kind.block:
        return kind.block
    info = source.info("weight_scale_second") or source.info("weight_scale")
    groups = info.shape[1] if info is not None and len(info.shape) == 2 else 1
    return -(-module.shape[1] // groups)


def _aligned(rect: Rect, module: Module, kind: QuantType, source: _Source) -> Rect:
    along_n, along_k = _packing(module, source)
    group = MX_OUTER_BLOCK if source.info("weight_dual_scale") else _group(module, kind, source)
    step = max(group if group < module.shape[1] else 1, along_k)
    n, k = module.shape
    return Rect(
        rect.n0 // along_n * along_n,
        min(-(-rect.n1 // along_n) * along_n, n),
        rect.k0 // step * step,
        min(-(-rect.k1 // step) * step, k),
    )


def _quantized(
    module: Module, rect: Rect, kind: QuantType, source: _Source, *, static: bool, packed: Nibbles | None = None
) -> QuantTensor:
    """Decode codes, if they are not there `packed`, and scales; with `static` also what belongs to one input scale."""
    codes = _codes(module, rect, kind, source) if packed is None else packed
    factor_values = source.factor()
    columns = {} if factor_values is None else {"mul_scale": factor_values[rect.k0 : rect.k1]}
    if kind.element != "int":
        return _mx(rect, kind, source, codes, columns)
    group = _group(module, kind, source)
    g0, g1 = (rect.k0 // group, -(-rect.k1 // group)) if group < module.shape[1] else (0, 1)
    rows: dict[str, Tensor] = {}
    whole: dict[str, Tensor] = {}
    zero = None
    if source.info("deq_scale"):
        deq_scale = _deq_scale(source)[rect.n0 : rect.n1]
        scale = (deq_scale / source.vector("input_scale").float()).unsqueeze(1)
        if static:
            rows = {"deq_scale": deq_scale, "quant_bias": source.vector("quant_bias")[rect.n0 : rect.n1]}
            whole = {name: source.vector(name).float() for name in ("input_scale", "input_offset")}
    if source.info("weight_scale"):
        two_stage = source.info("weight_scale_second") is not None
        first = slice(0, 1) if two_stage else slice(g0, g1)
        scale = source.rows("weight_scale", rect.n0, rect.n1).float()[:, first]
        if two_stage:
            scale = scale * source.rows("weight_scale_second", rect.n0, rect.n1, g0, g1).float()
            _no_second_offset(source, rect)
        if source.info("weight_offset"):
            offset = source.rows("weight_offset", rect.n0, rect.n1).float()[:, first]
            zero = offset if bool(offset.any()) else None
    size = group if group < module.shape[1] else rect.k1 - rect.k0
    return QuantTensor(codes, scale, zero, group_size=size, bits=kind.bits, rows=rows, columns=columns, whole=whole)


def _no_second_offset(source: _Source, rect: Rect) -> None:
    """Refuse offsets of the second stage, which the tool writes as zeros and no operator takes."""
    info = source.info("weight_offset_second")
    if info is not None and bool(source.rows("weight_offset_second", rect.n0, rect.n1).any()):
        raise Refused(
            Problem(
                "format-feature",
                f"{info.name} is not zero",
                info.file.name,
                "codes of two stages are symmetric in the second",
                "quantize symmetrically",
            )
        )


def _deq_scale(source: _Source) -> Tensor:
    """fp32 [N]; int64 holds the bits of an fp32 (models that are not bf16)."""
    stored = source.vector("deq_scale")
    return stored.to(torch.int32).view(torch.float32) if stored.dtype is torch.int64 else stored.float()


def _mx(rect: Rect, kind: QuantType, source: _Source, codes: Tensor, columns: dict[str, Tensor]) -> QuantTensor:
    blocks = (rect.k0 // MX_BLOCK, -(-rect.k1 // MX_BLOCK))
    scale = source.rows("weight_scale", rect.n0, rect.n1, *blocks)
    outer = None
    if source.info("weight_dual_scale"):
        outer = source.rows("weight_dual_scale", rect.n0, rect.n1, rect.k0 // MX_OUTER_BLOCK,
                            -(-rect.k1 // MX_OUTER_BLOCK)).float()  # fmt: skip
    return QuantTensor(
        codes, scale, group_size=MX_BLOCK, bits=kind.bits, element=kind.element, outer=outer, columns=columns
    )


def _nibbles(module: Module, rect: Rect, source: _Source) -> Nibbles | None:
    """Return codes of four bits as they lie in the file, where there are two a byte and whole bytes and words."""
    along_n, along_k = _packing(module, source)
    if (along_n, along_k) == (1, 1) or rect.n0 % along_n or rect.n1 % along_n or rect.k0 % 8 or rect.k1 % 8:
        return None
    stored = source.rows("weight", rect.n0 // along_n, rect.n1 // along_n, rect.k0 // along_k, rect.k1 // along_k)
    if along_n == 1:
        return Nibbles((stored.view(torch.int32),), Carrier.ALONG_K, is_signed=True)
    return Nibbles((stored.view(torch.uint8),), Carrier.ROW_PAIRS, is_signed=True)


def _codes(module: Module, rect: Rect, kind: QuantType, source: _Source) -> Tensor:
    """Codes [N, K] of the rectangle, one an element."""
    along_n, along_k = _packing(module, source)
    stored = source.rows("weight", rect.n0 // along_n, -(-rect.n1 // along_n), rect.k0 // along_k,
                         -(-rect.k1 // along_k))  # fmt: skip
    if along_n == along_k == 1:
        return stored
    if kind.element == "e2m1":
        low, high = stored & 15, stored >> 4
    else:
        low, high = (stored << 4) >> 4, stored >> 4  # arithmetic: the sign of a nibble is kept
    codes = torch.stack((low, high), dim=1 if along_n == 2 else 2)
    n, k = rect.shape
    return codes.reshape(n, k)
