"""The schemes by name."""

from __future__ import annotations

from functools import partial

from framework.quantization.schemes import float_, mx, w4a4, w4a8, w4a16, w8a8, w8a16, weight_only
from framework.quantization.schemes.base import Operands, Scheme

__all__ = ["SCHEMES", "Operands", "Scheme"]

_ALL = (
    Scheme("float", float_.prepare, float_.linear, float_.prepare_experts, float_.grouped),
    Scheme("w8a8_static", w8a8.prepare_static, w8a8.linear_static),
    Scheme("w8a8_dynamic", w8a8.prepare_dynamic, w8a8.linear_dynamic, w8a8.prepare_experts, w8a8.grouped),
    Scheme("w8a8_mix", w8a8.prepare_dynamic, w8a8.linear_dynamic),
    Scheme("w4a4_dynamic", w4a4.prepare, w4a4.linear, w4a4.prepare_experts, w4a4.grouped),
    Scheme("w4a8_dynamic", w4a8.prepare, w4a8.linear, w4a8.prepare_experts, w4a8.grouped),
    Scheme("w4a16", w4a16.prepare, w4a16.linear, weight_only.prepare_experts, weight_only.grouped),
    Scheme("w8a16", w8a16.prepare, w8a16.linear, weight_only.prepare_experts, weight_only.grouped),
    Scheme("mxfp8", mx.prepare, mx.linear_fp8, mx.prepare_experts, mx.grouped_fp8),
    Scheme("mxfp4", mx.prepare, mx.linear_fp4, mx.prepare_experts, mx.grouped_fp4),
    Scheme("mxfp4_dualscale", mx.prepare_dual, mx.linear_dual),
    Scheme(
        "w4a8_mxfp",
        partial(mx.prepare, beside_fp8=True),
        mx.linear_fp8_fp4,
        partial(mx.prepare_experts, beside_fp8=True),
        mx.grouped_fp8_fp4,
    ),
)
SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _ALL}
