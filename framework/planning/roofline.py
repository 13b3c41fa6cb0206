"""Bounds on speed from bytes and operations per token (docs/performance.md derives them). Bounds, not forecasts."""

from __future__ import annotations

from typing import Any

from framework.planning.memory import kv_bytes_per_token, module_bytes, read_share
from framework.planning.plan import Plan
from framework.recipe.schema import Hardware


def roofline(plan: Plan, hardware: Hardware) -> dict[str, Any]:
    """Return the decode and prefill bounds of the slowest rank, each term beside them.

    decode, batch 1:   seconds >= (weight bytes read a token + KV bytes at full context) / bandwidth
    prefill:           seconds a token >= 2 * weights touched / peak operations
    A figure is None where the hardware's bandwidth or peak is not known.
    """
    dtype = plan.runtime.dtype
    weights: list[int] = []
    touched: list[int] = []
    for rank in range(plan.tp_size):
        held = [module_bytes(planned, rank, dtype) for planned in plan.modules]  # a tied head is read like any
        shares = [read_share(planned.module, plan.spec) for planned in plan.modules]
        weights.append(round(sum(size * share for size, share in zip(held, shares, strict=True))))
        touched.append(
            round(
                sum(
                    planned.shards[rank].size * planned.linears_on(rank) * share
                    for planned, share in zip(plan.modules, shares, strict=True)
                )
            )
        )
    kv = [
        kv_bytes_per_token(plan.spec, rank.heads, plan.runtime.cache_dtype) if plan.spec else 0 for rank in plan.ranks
    ]
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
            "each weight is read once a token at full bandwidth (of experts the chosen ones); kernels reach 45 to 60 %",
            "prefill as if every matrix product ran in bf16",
            "bandwidth and peak are conf/hardware figures of the tier, unknown where no source could be read",
        ],
    }
