"""CPU kernels by operator name: exact semantics, and the fastest torch form behind the same name."""

from __future__ import annotations

from framework.ops.cpu import activation, attention, cache, matmul, norm, paged, rotary

KERNELS = {
    "npu::npu_rms_norm": norm.rms_norm,
    "npu::npu_gemma_rms_norm": norm.gemma_rms_norm,
    "npu::npu_add_rms_norm": norm.add_rms_norm,
    "npu::npu_rotary_mul": rotary.rotary_mul,
    "npu::npu_swiglu": activation.swiglu,
    "npu::npu_geglu": activation.geglu,
    "npu::npu_gelu_mul": activation.gelu_mul,
    "npu::npu_format_cast": matmul.format_cast,
    "npu::npu_format_cast.Tensor": matmul.format_cast_like,
    "npu::npu_convert_weight_to_int4pack": matmul.convert_weight_to_int4pack,
    "npu::npu_weight_quant_batchmatmul": matmul.weight_quant_batchmatmul,
    "npu::npu_fused_infer_attention_score": attention.fused_infer_attention_score,
    "atb::_npu_reshape_and_cache": cache.reshape_and_cache,
    "atb::_npu_paged_attention": paged.paged_attention,
}
