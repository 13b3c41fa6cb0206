"""Shapes and dtypes of the operators of expert layers without computing: fake kernels against the real ones."""

import pytest
import torch
from torch.library import opcheck

from framework import ops
from framework.ops import register
from framework.ops.cpu import mx

register.ensure_registered("cpu")

X = torch.randn(5, 96)
SCORES = torch.randn(5, 8)
CHOSEN = torch.tensor([[3, 1], [0, 1], [2, 3], [1, 0], [3, 2]], dtype=torch.int32)
ORDER = torch.arange(10, dtype=torch.int32).view(2, 5).t().contiguous()
PLACES = torch.randperm(10).int()
COUNTS = torch.tensor([2, 0, 1, 2])
INT8 = torch.randint(-128, 128, (5, 96), dtype=torch.int8)
WEIGHT = torch.randint(-128, 128, (4, 96, 32), dtype=torch.int8)
INT4 = torch.zeros(4, 96, 4, dtype=torch.int32)
SCALE, TOKENS = torch.rand(4, 32), torch.rand(5)
FP4, FP4_SCALE = mx.quantize(torch.randn(4, 32, 96), "e2m1")
X4, X4_SCALE = mx.quantize(X, "e2m1")
GROUPS = {"group_list": COUNTS, "group_list_type": 1, "split_item": 2, "group_type": 0}
MX = {"x_dtype": 296, "weight_dtype": 296}

CALLS = {
    "npu_moe_gating_top_k_softmax": [((SCORES, None, 3), {}), ((SCORES.bfloat16(),), {})],
    "npu_moe_gating_top_k": [((SCORES, 3), {}), ((SCORES.half(), 2), {"norm_type": 1, "out_flag": True})],
    "npu_moe_init_routing_v2": [
        ((X, CHOSEN), {"expert_num": 4}),
        ((X, CHOSEN), {"expert_num": 4, "quant_mode": 1, "active_expert_range": [1, 3], "active_num": 7}),
        ((X, CHOSEN), {"expert_num": 4, "quant_mode": 3, "expert_tokens_num_type": 2}),
    ],
    "npu_moe_init_routing": [((X, ORDER, CHOSEN, 5), {}), ((X, ORDER, CHOSEN, 3), {})],
    "npu_moe_compute_expert_tokens": [((CHOSEN.flatten().sort().values, 6), {})],
    "npu_moe_finalize_routing": [
        ((torch.randn(10, 96), None, None, None, torch.rand(5, 2), PLACES, CHOSEN), {}),
        ((torch.randn(10, 96), None, None, None, None, PLACES, None), {"k": 2, "drop_pad_mode": 2}),
    ],
    "npu_moe_token_unpermute": [
        ((torch.randn(10, 96), PLACES), {}),
        ((torch.randn(10, 96).bfloat16(), PLACES, torch.rand(5, 2)), {}),
    ],
    "npu_grouped_matmul": [
        (([X], [torch.randn(4, 96, 32)]), GROUPS),
        (([INT8], [WEIGHT]), GROUPS | {"output_dtype": ops.INT32}),
        (([INT8], [WEIGHT]), GROUPS | {"scale": [SCALE], "per_token_scale": [TOKENS], "output_dtype": ops.BFLOAT16}),
        (([X], [INT4]), GROUPS | {"antiquant_scale": [SCALE]}),
        (
            ([torch.zeros(5, 12, dtype=torch.int32)], [INT4]),
            GROUPS | {"scale": [SCALE], "per_token_scale": [TOKENS], "output_dtype": ops.BFLOAT16},
        ),
        (
            ([X4], [FP4.transpose(1, 2)]),
            GROUPS | MX | {"scale": [FP4_SCALE.transpose(1, 2)], "per_token_scale": [X4_SCALE], "output_dtype": 15},
        ),
    ],
    "npu_grouped_matmul_swiglu_quant_v2": [
        ((INT8, [WEIGHT], [SCALE], TOKENS, COUNTS), {"group_list_type": 1}),
        (
            (X4, [FP4.transpose(1, 2)], [FP4_SCALE.transpose(1, 2)], X4_SCALE, COUNTS),
            MX | {"group_list_type": 1, "quant_mode": 2, "quant_dtype": 296},
        ),
    ],
    "npu_dequant_swiglu_quant": [((X,), {"quant_mode": 1})],
}
CASES = [(name, number) for name, calls in CALLS.items() for number in range(len(calls))]


@pytest.mark.parametrize(("name", "number"), CASES)
def test_fake_kernels_return_the_shapes_and_dtypes_of_the_real_ones(name, number):
    arguments, options = CALLS[name][number]
    opcheck(getattr(torch.ops.npu, name).default, arguments, options, test_utils=("test_schema", "test_faketensor"))
