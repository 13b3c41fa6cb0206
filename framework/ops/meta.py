"""Shape functions of the operators: what a kernel returns, without computing it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from framework.ops import meta_moe, meta_quant


def _norm(input: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    lead = input.dim() - gamma.dim()
    rstd_shape = [*input.shape[:lead], *(1 for _ in range(gamma.dim()))]
    return torch.empty_like(input), input.new_empty(rstd_shape, dtype=torch.float32)


def _add_norm(x1: Tensor, x2: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor, Tensor]:
    y, rstd = _norm(x1, gamma, epsilon)
    return y, rstd, torch.empty_like(x1)


def _rotary_mul(
    input: Tensor, r1: Tensor, r2: Tensor, rotary_mode: str = "half", rotate: Tensor | None = None
) -> Tensor:
    return input.new_empty(input.shape)


def _halved(input: Tensor, dim: int) -> Tensor:
    shape = list(input.shape)
    shape[dim] //= 2
    return input.new_empty(shape)


def _swiglu(input: Tensor, dim: int = -1) -> Tensor:
    return _halved(input, dim)


def _geglu(input: Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False) -> tuple[Tensor, Tensor]:
    return _halved(input, dim), _halved(input, dim)


def _gelu_mul(input: Tensor, *, approximate: str = "none") -> Tensor:
    return _halved(input, -1)


def _format_cast(
    input: Tensor, acl_format: int, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    return torch.empty_like(input)


def _format_cast_like(
    input: Tensor, dst: Tensor, *, customize_dtype: int | None = None, input_dtype: int | None = None
) -> Tensor:
    return torch.empty_like(input)


def _convert_weight_to_int4pack(weight: Tensor, inner_k_tiles: int = 0) -> Tensor:
    return weight.new_empty((*weight.shape[:-1], weight.shape[-1] // 8))


def _weight_quant_batchmatmul(
    x: Tensor,
    weight: Tensor,
    antiquant_scale: Tensor,
    antiquant_offset: Tensor | None = None,
    quant_scale: Tensor | None = None,
    quant_offset: Tensor | None = None,
    bias: Tensor | None = None,
    antiquant_group_size: int = 0,
    inner_precise: int = 0,
    weight_dtype: int | None = None,
) -> Tensor:
    features = weight.shape[-1]
    if weight.dtype == torch.int32 and weight.shape[-2] == x.shape[-1]:
        features *= 8
    dtype = x.dtype if quant_scale is None else torch.int8
    return x.new_empty((*x.shape[:-1], features), dtype=dtype)


def _reshape_and_cache(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_indices: Tensor
) -> None:
    return None


def _scatter_pa_kv_cache(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    *,
    compress_lens: Tensor | None = None,
    compress_seq_offsets: Tensor | None = None,
    seq_lens: Tensor | None = None,
    cache_mode: str | None = "PA_NZ",
) -> None:
    return None


def _paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    num_kv_heads: int,
    num_heads: int,
    scale_value: float,
    block_table: Tensor,
    context_lens: Tensor,
    out: Tensor,
    *,
    workspace: Tensor | None = None,
) -> None:
    return None


def _fused_infer_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    block_table: Tensor | None = None,
    num_heads: int = 1,
    num_key_value_heads: int = 0,
    input_layout: str = "BSH",
    softmax_lse_flag: bool = False,
    **_: Any,  # noqa: ANN401
) -> tuple[Tensor, Tensor]:
    kv_heads = num_key_value_heads or num_heads
    shape = list(query.shape)
    if input_layout == "BSH":
        head_size = value.shape[-1] // kv_heads
        shape[-1] = num_heads * head_size
    elif block_table is not None and value.dim() == 3:
        shape[-1] = value.shape[-1] // kv_heads
    else:
        shape[-1] = value.shape[-1]
    lse_shape: tuple[int, ...] = (1,)
    if softmax_lse_flag:
        if input_layout == "TND":
            lse_shape = (query.shape[0], num_heads, 1)
        else:
            rows = query.shape[2] if input_layout == "BNSD" else query.shape[1]
            lse_shape = (query.shape[0], num_heads, rows, 1)
    return query.new_empty(shape), query.new_empty(lse_shape, dtype=torch.float32)


KERNELS = {
    "npu::npu_rms_norm": _norm,
    "npu::npu_gemma_rms_norm": _norm,
    "npu::npu_add_rms_norm": _add_norm,
    "npu::npu_rotary_mul": _rotary_mul,
    "npu::npu_swiglu": _swiglu,
    "npu::npu_geglu": _geglu,
    "npu::npu_gelu_mul": _gelu_mul,
    "npu::npu_format_cast": _format_cast,
    "npu::npu_format_cast.Tensor": _format_cast_like,
    "npu::npu_convert_weight_to_int4pack": _convert_weight_to_int4pack,
    "npu::npu_weight_quant_batchmatmul": _weight_quant_batchmatmul,
    "npu::npu_fused_infer_attention_score": _fused_infer_attention_score,
    "npu::npu_scatter_pa_kv_cache": _scatter_pa_kv_cache,
    "atb::_npu_reshape_and_cache": _reshape_and_cache,
    "atb::_npu_paged_attention": _paged_attention,
    **meta_quant.KERNELS,
    **meta_moe.KERNELS,
}
