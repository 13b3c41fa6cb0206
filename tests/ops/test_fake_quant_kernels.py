"""Shapes and dtypes of the quantizing operators without computing: fake kernels against the real ones."""

import pytest
import torch
from torch.library import opcheck

from framework import ops
from framework.ops import register
from framework.ops.cpu import mx

register.ensure_registered("cpu")

X = torch.randn(2, 3, 96)
ROWS = torch.randn(5, 96)
INT8 = torch.randint(-128, 128, (5, 96), dtype=torch.int8)
WEIGHT = torch.randint(-128, 128, (16, 96), dtype=torch.int8)
PACKED = torch.zeros(5, 12, dtype=torch.int32)
FP8, FP8_SCALE = mx.quantize(ROWS, "e4m3")
FP4, FP4_SCALE = mx.quantize(torch.randn(16, 96), "e2m1")
DUAL = ops.npu_dynamic_dual_level_mx_quant(ROWS)
TOKENS, SCALE = torch.rand(5), torch.rand(16)

CALLS = {
    "npu_quantize": [
        ((X, torch.ones(96), None, ops.INT8, -1, False), {}),
        ((X.bfloat16(), torch.ones(1).bfloat16(), torch.ones(1).bfloat16(), 16, -1, False), {}),
        ((X, torch.ones(3), None, 13), {}),
    ],
    "npu_dynamic_quant": [((X,), {}), ((ROWS,), {"dst_type": 16}), ((ROWS,), {"dst_type": 24})],
    "npu_trans_quant_param": [((SCALE,), {}), ((torch.ones(1), SCALE), {}), ((torch.ones(1, 4),), {})],
    "npu_quant_matmul": [
        ((INT8, WEIGHT.t(), SCALE), {}),
        ((INT8[None], WEIGHT.t(), SCALE), {"pertoken_scale": TOKENS, "output_dtype": 15}),
        ((INT8, WEIGHT.t(), SCALE), {"output_dtype": ops.INT32}),
        ((PACKED, torch.zeros(96, 2, dtype=torch.int32), SCALE), {"pertoken_scale": TOKENS, "output_dtype": 5}),
        ((PACKED, torch.zeros(16, 12, dtype=torch.int32).t(), SCALE), {"pertoken_scale": TOKENS, "output_dtype": 15}),
        (
            (INT8, torch.zeros(96, 2, dtype=torch.int32), torch.ones(3, 16).view(torch.int32).long()),
            {"pertoken_scale": TOKENS, "output_dtype": 15, "group_sizes": [0, 0, 32]},
        ),
        (
            (FP8, FP4.t(), FP4_SCALE.transpose(0, 1)),
            {"pertoken_scale": FP8_SCALE, "output_dtype": 6, "x2_dtype": 296, "group_sizes": [1, 1, 32]},
        ),
    ],
    "npu_dynamic_mx_quant": [((X,), {}), ((X,), {"dst_type": 24}), ((X,), {"axis": 0, "dst_type": 23})],
    "npu_anti_mx_quant": [
        ((FP8, FP8_SCALE), {}),
        ((FP4, FP4_SCALE), {"src_type": 296, "dst_type": 5}),
    ],
    "npu_dynamic_dual_level_mx_quant": [((X,), {}), ((torch.randn(2, 1056),), {"round_mode": "round"})],
    "npu_dual_level_quant_matmul": [((DUAL[0], DUAL[0], DUAL[1], DUAL[1].t(), DUAL[2], DUAL[2]), {})],
    "npu_dtype_cast": [((X, 15), {}), ((X, 296), {}), ((FP4, 6, 296), {})],
}
CASES = [(name, number) for name, calls in CALLS.items() for number in range(len(calls))]


@pytest.mark.parametrize(("name", "number"), CASES)
def test_fake_kernels_return_the_shapes_and_dtypes_of_the_real_ones(name, number):
    arguments, options = CALLS[name][number]
    # opcheck compares inputs before and after by arithmetic that fp8 has not.
    tests = ("test_faketensor",) if arguments[0] is FP8 else ("test_schema", "test_faketensor")
    opcheck(getattr(torch.ops.npu, name).default, arguments, options, test_utils=tests)


def test_torchs_own_dtypes_may_be_given_for_the_numbers():
    """The dispatcher hands a torch.dtype on as its number."""
    codes, _ = torch.ops.npu.npu_dynamic_mx_quant(ROWS, dst_type=torch.float8_e4m3fn)
    assert torch.equal(codes.float(), FP8.float())
    y = torch.ops.npu.npu_quant_matmul(INT8, WEIGHT.t(), SCALE, pertoken_scale=TOKENS, output_dtype=torch.bfloat16)
    assert y.dtype is torch.bfloat16
