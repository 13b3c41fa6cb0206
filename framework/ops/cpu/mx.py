"""MX block formats: blocks of 32 along K share a power of two (OCP MX 1.0 scales, exponent-field form).

Scale bytes are [.., ceil(K/64), 2]: block j at [j // 2, j % 2], an odd number of blocks has one byte 0 more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from framework.ops import packing
from framework.ops.cpu import packed
from framework.ops.dtypes import (
    BFLOAT16,
    FLOAT4_E2M1FN_X2,
    FLOAT8_E4M3FN,
    FLOAT8_E5M2,
    canonical,
)
from framework.ops.linear import linear

BLOCK = 32
LEVEL0_BLOCK = 512
# Weights widened at a time: 1 MB of fp32, which the matmul then reads from the cache.
_CHUNK_WEIGHTS = 1 << 18


@dataclass(frozen=True, slots=True)
class Element:
    """An element format. `emax`: exponent of its largest value; `dtype` None: fp4, two codes in a byte."""

    name: str
    emax: int
    largest: float
    dtype: torch.dtype | None = None


ELEMENTS = {
    element.name: element
    for element in (
        Element("e4m3", 8, 448.0, torch.float8_e4m3fn),
        Element("e5m2", 15, 57344.0, torch.float8_e5m2),
        Element("e2m1", 2, 6.0),
    )
}
ELEMENT_OF_DTYPE = {element.dtype: element for element in ELEMENTS.values() if element.dtype is not None}
_ELEMENT_OF_NUMBER = {
    FLOAT8_E4M3FN: ELEMENTS["e4m3"],
    FLOAT8_E5M2: ELEMENTS["e5m2"],
    FLOAT4_E2M1FN_X2: ELEMENTS["e2m1"],
}

# By what a value is multiplied before rounding, by scale byte.
_RECIPROCALS = torch.tensor([0.0, *(2.0 ** (127 - byte) for byte in range(1, 255)), float("nan")])


@dataclass(frozen=True, slots=True)
class Operand:
    """Codes [R, K] (fp4 [R, K/2]) with scale bytes [R, ceil(K/64), 2]; `level0` fp32 [R, ceil(K/512)].

    `form` of a weight without `level0`: its values in bf16.
    """

    codes: Tensor
    scale: Tensor
    element: Element
    level0: Tensor | None = None
    form: packed.CpuWeight | None = None

    def values(self, rows: slice = slice(None)) -> Tensor:
        """The fp32 values of some rows."""
        if self.form is not None:
            return self.form.codes[rows].float()
        factors = packing.e8m0_values(self.scale[rows].contiguous()).flatten(-2)
        if self.level0 is not None:
            # A product with a power of two: exact, so the level costs no rounding of its own.
            per_block = self.level0[rows].repeat_interleave(LEVEL0_BLOCK // BLOCK, -1)
            factors = factors * per_block[..., : factors.shape[-1]]
        return _times(_decoded(self.codes[rows], self.element), factors)


def quantize(x: Tensor, element: str, round_mode: str = "rint") -> tuple[Tensor, Tensor]:
    """Return codes and scale bytes of x in blocks of 32 along the last dimension.

    A byte is the largest exponent field of its block less the element's emax, at least 0, 255 for a block with
    NaN or Inf (whose product is NaN). Byte 0 makes all codes of its block 0. Values beyond the range saturate.

    Args:
        x: [.., K] float; K even for e2m1.
        element: `e4m3`, `e5m2` or `e2m1`.
        round_mode: `rint` to nearest even; e2m1 also `round` (half away from zero) and `floor`.

    Returns:
        Codes in the fp8 dtype [.., K], or uint8 [.., K/2]; uint8 [.., ceil(K/64), 2].
    """
    codes, scale = _quantize(x, ELEMENTS[element], round_mode)
    return (codes if ELEMENTS[element].dtype is not None else packing.pack_fp4(codes)), scale


def dequantize(codes: Tensor, scale_bytes: Tensor, element: str) -> Tensor:
    """Return code * 2^(byte - 127) in fp32. `quantize`'s codes and bytes -> [.., K]."""
    return Operand(codes, scale_bytes, ELEMENTS[element]).values()


def multiply(x: Operand, weight: Operand, bias: Tensor | None, output: torch.dtype) -> Tensor:
    """Return x @ weight^T + bias of the dequantized operands, accumulated in fp32. [M, N] in `output`.

    Element times power of two is exact in bf16, so bf16 output without bias is one bf16 matmul if the
    weight has a form; else weights are widened to fp32 by parts.
    """
    values = x.values()
    if weight.form is not None and bias is None and output is torch.bfloat16:
        return linear(values.bfloat16(), weight.form.codes)
    y = _by_parts(values, weight)
    return (y if bias is None else y.add_(bias)).to(output)


def dynamic_mx_quant(
    input: Tensor,
    *,
    axis: int = -1,
    round_mode: str = "rint",
    dst_type: int = FLOAT4_E2M1FN_X2,
    block_size: int = BLOCK,
    scale_alg: int | None = 0,
    dst_type_max: float = 0.0,
    max_low_bound: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Quantize in blocks of 32 along `axis`; see `quantize`.

    Args:
        input: fp16, bf16 or fp32.
        axis: the dimension of the blocks.
        round_mode: fp8: `rint`; fp4: `rint`, `round` or `floor`.
        dst_type: float4_e2m1fn_x2, float8_e4m3fn or float8_e5m2.
        block_size: 32.
        scale_alg: 0 (OCP).
        dst_type_max: 0.
        max_low_bound: 0.

    Returns:
        Codes like the input (fp4: the last dimension halved, uint8), and uint8 scales: `axis` has ceil(n/64)
        pairs, which are the last dimension.
    """
    element = _ELEMENT_OF_NUMBER.get(canonical(dst_type))
    if element is None or block_size != BLOCK or scale_alg or dst_type_max or max_low_bound:
        raise NotImplementedError(f"npu_dynamic_mx_quant: {dst_type=}, {block_size=}, {scale_alg=}, {dst_type_max=}")
    codes, scale = _quantize(input.movedim(axis, -1), element, round_mode)
    codes = codes.movedim(-1, axis).contiguous()
    scale = scale.movedim(-2, axis % input.dim()).contiguous()
    return (codes if element.dtype is not None else packing.pack_fp4(codes)), scale


def anti_mx_quant(
    x: Tensor, mxscale: Tensor, *, axis: int | None = -1, dst_type: int | None = 15, src_type: int | None = 292
) -> Tensor:
    """Return the values of `dynamic_mx_quant`'s outputs in `dst_type`. `src_type` names the elements."""
    element = _ELEMENT_OF_NUMBER.get(canonical(FLOAT8_E4M3FN if src_type is None else src_type))
    if element is None:
        raise NotImplementedError(f"npu_anti_mx_quant: {src_type=}")
    axis = -1 if axis is None else axis
    factors = packing.e8m0_values(mxscale.movedim(axis % x.dim(), -2).contiguous()).flatten(-2)
    y = _times(_decoded(x, element).movedim(axis, -1), factors).movedim(-1, axis)
    return y.contiguous().to(packing.carrier(BFLOAT16 if dst_type is None else dst_type))


def dynamic_dual_level_mx_quant(
    input: Tensor, *, smooth_scale: Tensor | None = None, round_mode: str = "rint"
) -> tuple[Tensor, Tensor, Tensor]:
    """Scale blocks of 512 to the range of fp4 (s0 = amax / 6), then quantize x / s0 as MX fp4.

    Args:
        input: [.., K] fp16, bf16 or fp32, K even; x / s0 is rounded to its dtype.
        smooth_scale: None.
        round_mode: `rint`, `round` or `floor`.

    Returns:
        uint8 [.., K/2]; s0 fp32 [.., ceil(K/512)]; uint8 [.., ceil(K/64), 2]. A block of zeros has s0 = 0.
    """
    if smooth_scale is not None:
        raise NotImplementedError("npu_dynamic_dual_level_mx_quant: smooth_scale has no CPU kernel")
    blocks = _blocks(input.float(), LEVEL0_BLOCK, LEVEL0_BLOCK)
    level0 = blocks.abs().amax(-1) / 6.0
    scaled = (blocks / level0.masked_fill(level0 == 0, 1.0).unsqueeze(-1)).flatten(-2)[..., : input.shape[-1]]
    codes, level1 = quantize(scaled.to(input.dtype), "e2m1", round_mode)
    return codes, level0, level1


def dual_level_quant_matmul(
    x1: Tensor,
    x2: Tensor,
    x1_level0_scale: Tensor,
    x2_level0_scale: Tensor,
    x1_level1_scale: Tensor,
    x2_level1_scale: Tensor,
    *,
    bias: Tensor | None = None,
    output_dtype: int = 15,
) -> Tensor:
    """Return the fp32 product of two fp4 operands with both levels of scales, + bias.

    Args:
        x1: bytes [M, K/2].
        x2: bytes [N, K/2], uint8 or int8, not transposed.
        x1_level0_scale: fp32 [M, ceil(K/512)].
        x2_level0_scale: fp32 [ceil(K/512), N].
        x1_level1_scale: uint8 [M, ceil(K/64), 2].
        x2_level1_scale: uint8 [N, ceil(K/64), 2].
        bias: fp32 [N].
        output_dtype: bf16, fp16 or fp32.

    Returns:
        [M, N].
    """
    x = Operand(x1, x1_level1_scale, ELEMENTS["e2m1"], x1_level0_scale)
    weight = Operand(x2.view(torch.uint8), x2_level1_scale, ELEMENTS["e2m1"], x2_level0_scale.t())
    return multiply(x, weight, bias, packing.carrier(output_dtype))


def dtype_cast(input: Tensor, dtype: int, input_dtype: int | None = None) -> Tensor:
    """Cast between dtypes; fp4 (296) is two codes in a uint8, so it halves or doubles the last dimension."""
    from_fp4 = input_dtype is not None and canonical(input_dtype) == FLOAT4_E2M1FN_X2
    values = packing.fp4_values(input) if from_fp4 else input
    if canonical(dtype) == FLOAT4_E2M1FN_X2:
        return packing.pack_fp4(packing.fp4_codes(values.float()))
    return values.to(packing.carrier(dtype))


def _quantize(x: Tensor, element: Element, round_mode: str) -> tuple[Tensor, Tensor]:
    """Codes [.., K], fp4 not packed, and scale bytes."""
    if round_mode not in (packing.ROUND_MODES if element.dtype is None else ("rint",)):
        raise ValueError(f"MX {element.name} has no round_mode {round_mode!r}")
    blocks = _blocks(x.float(), BLOCK, 2 * BLOCK)
    exponents = blocks.abs().amax(-1).view(torch.int32) >> 23
    scale = torch.where(exponents == 255, exponents, (exponents - element.emax).clamp_(min=0))
    reciprocals = _RECIPROCALS.index_select(0, scale.flatten()).view(*scale.shape, 1)
    scaled = (blocks * reciprocals).flatten(-2)[..., : x.shape[-1]]
    if element.dtype is None:
        codes = packing.fp4_codes(scaled, round_mode)
    else:
        codes = scaled.clamp(-element.largest, element.largest).to(element.dtype)
    return codes, scale.to(torch.uint8).view(*scale.shape[:-1], -1, 2)


def _decoded(codes: Tensor, element: Element) -> Tensor:
    """The elements as fp32 [.., K], a new tensor."""
    return packing.fp4_values(codes) if element.dtype is None else packing.fp8_values(codes.view(element.dtype))


def _blocks(x: Tensor, size: int, multiple: int) -> Tensor:
    """[.., K] padded with zeros to a multiple -> [.., blocks, size]."""
    short = -x.shape[-1] % multiple
    padded = functional.pad(x, (0, short)) if short else x
    return padded.reshape(*x.shape[:-1], -1, size)


def _times(values: Tensor, factors: Tensor) -> Tensor:
    """New values [.., K] times a factor for every block, in place if K is a multiple of 32."""
    k = values.shape[-1]
    if k % BLOCK:
        return values * factors.repeat_interleave(BLOCK, -1)[..., :k]
    blocks = values.reshape(*values.shape[:-1], -1, BLOCK)
    return blocks.mul_(factors[..., : k // BLOCK, None]).flatten(-2)


def _by_parts(x: Tensor, weight: Operand) -> Tensor:
    """fp32 x [M, K] times the rows of a weight, whose values are made when they are needed."""
    n = weight.codes.shape[0]
    step = max(_CHUNK_WEIGHTS // x.shape[1], 1)
    y = x.new_empty((x.shape[0], n))
    for first in range(0, n, step):
        part = slice(first, first + step)
        y[:, part] = functional.linear(x, weight.values(part))
    return y
