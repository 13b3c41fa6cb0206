"""torch_npu's dtype numbers (256 + ACL number) and ACL tensor formats, as integers."""

from __future__ import annotations

FLOAT32 = 256
FLOAT16 = 257
INT8 = 258
INT32 = 259
UINT8 = 260
INT16 = 262
INT64 = 265
BOOL = 268
BFLOAT16 = 283
INT4 = 285
HIFLOAT8 = 290
FLOAT8_E5M2 = 291
FLOAT8_E4M3FN = 292
FLOAT8_E8M0FNU = 293
FLOAT4_E2M1FN_X2 = 296
FLOAT4_E1M2FN_X2 = 297

ACL_FORMAT_ND = 2
ACL_FORMAT_FRACTAL_NZ = 29

# torch's ScalarType numbers, which the dispatcher makes of a torch.dtype given for an integer argument.
_OF_TORCH = {
    1: INT8,
    3: INT32,
    5: FLOAT16,
    6: FLOAT32,
    12: INT8,
    13: UINT8,
    14: INT32,
    15: BFLOAT16,
    16: INT4,
    23: FLOAT8_E5M2,
    24: FLOAT8_E4M3FN,
    44: FLOAT8_E8M0FNU,
}


def canonical(number: int) -> int:
    """Return torch_npu's number for torch's own (int8, qint8, quint4x2, ...); others stay, 45 (fp4) among them."""
    return _OF_TORCH.get(number, number)
