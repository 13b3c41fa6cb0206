"""Integer and fp8 activation quantization, and the packed scale parameter of the matmuls."""

from __future__ import annotations

import torch
from torch import Tensor

from framework.ops import packing
from framework.ops.dtypes import FLOAT8_E4M3FN, FLOAT8_E5M2, INT4, INT8, UINT8, canonical

_RANGES = {INT8: (-128, 127), UINT8: (0, 255), INT4: (-8, 7)}
_STATIC_TARGETS = {True: (INT8, UINT8), False: (INT8, INT4)}
_LARGEST = {INT8: 127.0, INT4: 7.0, FLOAT8_E4M3FN: 448.0, FLOAT8_E5M2: 57344.0}
_SMALLEST = 2.0**-149

_SCALE_BITS = 0xFFFFE000
_SCALE_MARK = 1 << 46
_OFFSET_SHIFT = 37
_OFFSET_BITS = 0x1FF


def quantize(
    input: Tensor, scales: Tensor, zero_points: Tensor | None, dtype: int, axis: int = 1, div_mode: bool = True
) -> Tensor:
    """Return saturate(round_even(x * scales + zero_points)), with div_mode x / scales; arithmetic in fp32.

    Args:
        input: [.., K] fp16, bf16 or fp32.
        scales: [K] or [1].
        zero_points: shape of scales, or None.
        dtype: div_mode false: int8 or quint4x2; true: int8 or quint8.
        axis: the dimension of the parameters; div_mode false: -2, anything else means the last.
        div_mode: divide by the scales.

    Returns:
        int8 or uint8 [.., K]; quint4x2: int32 [.., K/8].
    """
    target = canonical(dtype)
    if target not in _STATIC_TARGETS[div_mode]:
        raise NotImplementedError(f"npu_quantize: no CPU kernel for dtype number {dtype} with div_mode={div_mode}")
    trailing = (input.dim() - 1 - axis % input.dim()) if div_mode else int(axis == -2)
    scales = _along(scales, trailing)
    y = input.float() / scales if div_mode else input.float() * scales
    if zero_points is not None:
        y += _along(zero_points, trailing)
    return _integers(y, target, *_RANGES[target])


def dynamic_quant(
    input: Tensor,
    *,
    smooth_scales: Tensor | None = None,
    group_index: Tensor | None = None,
    dst_type: int | None = None,
    quant_mode: str = "pertoken",
    dst_type_max: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Quantize every row by its own largest magnitude: scale = amax / QMAX, y = round_even(x / scale).

    Args:
        input: [.., K] fp16, bf16 or fp32.
        smooth_scales: [K] factors of the columns; with `group_index` [E, K].
        group_index: int32 [E] cumulative row ends: row r has the factors of the first e with end > r.
        dst_type: None or int8, quint4x2, float8_e4m3fn, float8_e5m2.
        quant_mode: `pertoken`.
        dst_type_max: 0.

    Returns:
        Codes [.., K] (quint4x2: int32 [.., K/8]) in -QMAX..QMAX, and fp32 scales [..]. A row of zeros has scale 0
        and codes 0; a row with NaN or Inf has that for its scale.
    """
    target = INT8 if dst_type is None else canonical(dst_type)
    if target not in _LARGEST or quant_mode != "pertoken" or dst_type_max:
        raise NotImplementedError(f"npu_dynamic_quant: {dst_type=}, {quant_mode=}, {dst_type_max=}")
    x = input.float()
    if smooth_scales is not None:
        x = x * _smooth_rows(smooth_scales, group_index, x)
    largest = _LARGEST[target]
    scale = x.abs().amax(-1, keepdim=True).mul_(1.0 / largest)
    y = x / scale.clamp_min(_SMALLEST)
    if target in _RANGES:
        return _integers(y, target, -largest, largest), scale.squeeze(-1)
    return y.clamp_(-largest, largest).to(packing.carrier(target)), scale.squeeze(-1)


def trans_quant_param(scale: Tensor, offset: Tensor | None = None, round_mode: int | None = 0) -> Tensor:
    """Return int64 words: the 19 high bits of the fp32 scale, a mark, and the offset in nine bits.

    Args:
        scale: fp32 [1], [N], [1, N] or grouped.
        offset: fp32, the shape of scale or [1]; saturates at -256..255.
        round_mode: 0: the scale is truncated.
    """
    if round_mode:
        raise NotImplementedError("npu_trans_quant_param: round_mode 1 has no CPU kernel")
    words = (scale.contiguous().view(torch.int32).long() & _SCALE_BITS) | _SCALE_MARK
    if offset is None:
        return words
    return words | (nine_bits(offset).long() & _OFFSET_BITS) << _OFFSET_SHIFT


def scale_of(words: Tensor) -> Tensor:
    """Return the fp32 scale in int64 words, truncated to 19 bits whether or not it was."""
    return (words & _SCALE_BITS).to(torch.int32).view(torch.float32)


def offset_of(words: Tensor) -> Tensor:
    """Return the fp32 offset -256..255 in int64 words."""
    bits = words >> _OFFSET_SHIFT & _OFFSET_BITS
    return ((bits ^ 256) - 256).float()


def nine_bits(values: Tensor) -> Tensor:
    """Return fp32 values rounded and saturated to -256..255."""
    return values.round().clamp_(-256, 255)


def _integers(y: Tensor, target: int, lowest: float, highest: float) -> Tensor:
    """Round and saturate fp32 values in place, into the carrier of `target`."""
    y.round_().clamp_(lowest, highest)
    return packing.pack_int4(y.to(torch.int8)) if target == INT4 else y.to(packing.carrier(target))


def _along(parameter: Tensor, trailing: int) -> Tensor:
    """[K] -> fp32 [K, 1, ..] with as many trailing dimensions."""
    return parameter.float().view(-1, *(1,) * trailing)


def _smooth_rows(smooth: Tensor, group_index: Tensor | None, x: Tensor) -> Tensor:
    if group_index is None:
        return smooth.float()
    rows = torch.arange(x.shape[:-1].numel(), dtype=group_index.dtype)
    group = torch.bucketize(rows, group_index, right=True).clamp_(max=smooth.shape[0] - 1)
    return smooth.float()[group].view(x.shape)
