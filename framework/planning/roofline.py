"""Bounds on speed from bytes and operations per token (docs/performance.md derives them). Bounds, not forecasts."""

from __future__ import annotations

from typing import Any

from framework.geometry import Rect
from framework.planning.memory import is_read_every_token, kv_bytes_per_token, module_bytes
from framework.planning.plan import Plan
from framework.recipe.schema import Hardware


def roofline(plan: Plan, hardware: Hardware) -> dict[str, Any]:
    """Return the decode and prefill bounds of the slowest rank, each term beside them.

    decode, batch 1:   seconds >= (weight bytes read a token + KV bytes at full context) / bandwidth
    prefill:           seconds a token >= 2 * weights touched / peak operations
    A figure is None where the hardware's bandwidth or peak is not known.
    """
    dtype = plan.runtime.dtype
    weights, touched = [], []
    for rank in range(plan.tp_size):
        read = params = 0
        for planned in plan.modules:
            if not is_read_every_token(planned.module):
                continue
            rect: Rect = planned.shards[rank]
            read += module_bytes(planned.module, planned.scheme, rect, dtype)
            params += rect.size
        weights.append(read)
        touched.append(params)
    kv = [kv_bytes_per_token(plan.spec, rank.heads, plan.runtime.cache_dtype) for rank in plan.ranks]
    bandwidth = hardware.bandwidth_tb_s
    peak = hardware.peak_tflops.get("bf16")
    slowest = max(range(plan.tp_size), key=lambda r: weights[r])
    step_s = weights[slowest] / (bandwidth * 1e12) if bandwidth else None
    return {
        "weight_bytes_per_token": weights,
        "kv_bytes_per_token_of_context": kv,
        "bandwidth_tb_s": bandwidth,
        "peak_tflops_bf16": peak,
        "decode_s_at_best": step_s,
        "decode_tok_s_at_best": 1 / step_s if step_s else None,
        "prefill_tok_s_at_best": peak * 1e12 / (2 * touched[slowest]) if peak else None,
        "assumptions": [
            "batch 1, empty context, communication not counted",
            "each weight is read once a token at full bandwidth; real kernels reach 45 to 60 % of it",
            "bandwidth and peak are conf/hardware figures of the tier, unknown where no source could be read",
        ],
    }
