"""The torch_npu operators under their own names, on an NPU or on the CPU.

`ops.npu_rms_norm(...)` is `torch.ops.npu.npu_rms_norm`; `ops._npu_paged_attention(...)` is the ATB operator.
A process that runs on an NPU calls `register.ensure_registered("npu")` before the first use of an operator;
without that call the first use registers the CPU kernels. Importing this package imports no torch.
"""

from __future__ import annotations

from typing import Any

from framework.ops.dtypes import (
    ACL_FORMAT_FRACTAL_NZ,
    ACL_FORMAT_ND,
    BFLOAT16,
    FLOAT4_E1M2FN_X2,
    FLOAT4_E2M1FN_X2,
    FLOAT8_E4M3FN,
    FLOAT8_E5M2,
    FLOAT8_E8M0FNU,
    FLOAT16,
    FLOAT32,
    HIFLOAT8,
    INT4,
    INT8,
    INT32,
    INT64,
    UINT8,
)
from framework.ops.schema import OPERATORS

__all__ = [
    "ACL_FORMAT_FRACTAL_NZ",
    "ACL_FORMAT_ND",
    "BFLOAT16",
    "FLOAT4_E1M2FN_X2",
    "FLOAT4_E2M1FN_X2",
    "FLOAT8_E4M3FN",
    "FLOAT8_E5M2",
    "FLOAT8_E8M0FNU",
    "FLOAT16",
    "FLOAT32",
    "HIFLOAT8",
    "INT4",
    "INT8",
    "INT32",
    "INT64",
    "UINT8",
]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in OPERATORS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from framework.ops import register

    operator = register.operator(name)
    globals()[name] = operator
    return operator
