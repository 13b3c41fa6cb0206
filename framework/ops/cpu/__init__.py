"""CPU kernels by operator name: exact semantics, and the fastest torch form behind the same name."""

from __future__ import annotations

from framework.ops.cpu import activation, attention, cache, matmul, mx, norm, paged, quant_matmul, quantize, rotary

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
    "npu::npu_quantize": quantize.quantize,
    "npu::npu_dynamic_quant": quantize.dynamic_quant,
    "npu::npu_trans_quant_param": quantize.trans_quant_param,
    "npu::npu_quant_matmul": quant_matmul.quant_matmul,
    "npu::npu_dynamic_mx_quant": mx.dynamic_mx_quant,
    "npu::npu_anti_mx_quant": mx.anti_mx_quant,
    "npu::npu_dynamic_dual_level_mx_quant": mx.dynamic_dual_level_mx_quant,
    "npu::npu_dual_level_quant_matmul": mx.dual_level_quant_matmul,
    "npu::npu_dtype_cast": mx.dtype_cast,
    "npu::npu_fused_infer_attention_score": attention.fused_infer_attention_score,
    "atb::_npu_reshape_and_cache": cache.reshape_and_cache,
    "atb::_npu_paged_attention": paged.paged_attention,
}
