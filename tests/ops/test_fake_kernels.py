"""Shapes and dtypes without computing: the fake kernels against the real ones, by torch.library.opcheck."""

import pytest
import torch
from torch.library import opcheck

from framework.ops import register

register.ensure_registered("cpu")

X = torch.randn(3, 2, 16)
CODES = torch.randint(-8, 8, (32, 16), dtype=torch.int32)
PACKED = torch.zeros(32, 2, dtype=torch.int32)
QUERY = torch.randn(5, 4, 8)
KEYS = torch.randn(5, 2, 8)
CACHE = torch.randn(3, 4, 2, 8)
MASK = torch.ones(2048, 2048, dtype=torch.bool).triu(1)
TABLE = torch.tensor([[0, 1]], dtype=torch.int32)
TND = {"num_heads": 4, "num_key_value_heads": 2, "input_layout": "TND"}
BATCH = {"num_heads": 4, "num_key_value_heads": 2, "input_layout": "BSND", "softmax_lse_flag": True}

CALLS = {
    "npu_rms_norm": [((X, torch.ones(16)), {}), ((X.bfloat16(), torch.ones(2, 16).bfloat16(), 1e-5), {})],
    "npu_gemma_rms_norm": [((X, torch.ones(16)), {})],
    "npu_add_rms_norm": [((X, X, torch.ones(16)), {}), ((X[:1, :1], X[:1, :1], torch.ones(16)), {})],
    "npu_rotary_mul": [((X, torch.ones(1, 1, 16), torch.ones(1, 1, 16)), {})],
    "npu_swiglu": [((X,), {}), ((X, 1), {})],
    "npu_geglu": [((X,), {"activate_left": True})],
    "npu_gelu_mul": [((X,), {"approximate": "tanh"})],
    "npu_convert_weight_to_int4pack": [((CODES,), {})],
    "npu_weight_quant_batchmatmul": [
        ((torch.randn(3, 32), PACKED, torch.ones(1, 16)), {}),
        ((torch.randn(3, 16), PACKED.t(), torch.ones(1, 32)), {}),
        ((torch.randn(3, 32), CODES.to(torch.int8), torch.ones(1, 16)), {}),
    ],
    "npu_fused_infer_attention_score": [
        ((QUERY, KEYS, KEYS), TND),
        ((QUERY, KEYS, KEYS), TND | {"softmax_lse_flag": True}),
        (
            (QUERY, CACHE.flatten(2), CACHE.flatten(2)),
            TND
            | {
                "block_table": TABLE,
                "actual_seq_lengths": [5],
                "actual_seq_lengths_kv": [7],
                "atten_mask": MASK,
                "sparse_mode": 3,
            },
        ),
        ((QUERY[None], KEYS[None], KEYS[None]), BATCH),
        ((QUERY.transpose(0, 1)[None], *2 * (KEYS.transpose(0, 1)[None],)), BATCH | {"input_layout": "BNSD"}),
        ((QUERY.flatten(1)[None], *2 * (KEYS.flatten(1)[None],)), BATCH | {"input_layout": "BSH"}),
    ],
}
CASES = [(name, number) for name, calls in CALLS.items() for number in range(len(calls))]


@pytest.mark.parametrize(("name", "number"), CASES)
def test_fake_kernels_return_the_shapes_and_dtypes_of_the_real_ones(name, number):
    arguments, options = CALLS[name][number]
    operator = getattr(torch.ops.npu, name).default
    opcheck(operator, arguments, options, test_utils=("test_schema", "test_faketensor"))


def test_fake_format_cast_keeps_shape_and_dtype():
    """opcheck refuses an operator that returns its input, which is what the stand-in does."""
    cast = torch.ops.npu.npu_format_cast
    on_meta = torch.empty(4, 6, dtype=torch.int8, device="meta")
    assert cast(on_meta, 29).shape == (4, 6)
    assert cast.Tensor(on_meta, on_meta).dtype is torch.int8


def test_cache_operators_only_write_what_their_schema_says():
    slots = torch.tensor([3, 7], dtype=torch.int32)
    rows = torch.randn(2, 2, 8)
    opcheck(
        torch.ops.atb._npu_reshape_and_cache.default,
        (rows, rows, CACHE.clone(), CACHE.clone(), slots),
        test_utils=("test_schema", "test_faketensor"),
    )
    opcheck(
        torch.ops.npu.npu_scatter_pa_kv_cache.default,
        (rows, rows, CACHE.clone(), CACHE.clone(), slots),
        {"cache_mode": "Norm"},
        test_utils=("test_schema", "test_faketensor"),
    )
    lengths = torch.tensor([6], dtype=torch.int32)
    opcheck(
        torch.ops.atb._npu_paged_attention.default,
        (torch.randn(1, 4, 8), CACHE, CACHE, 2, 4, 0.5, TABLE, lengths, torch.empty(1, 4, 8)),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_the_dispatcher_reaches_the_kernel_that_the_package_binds():
    from framework import ops

    x, gamma = torch.randn(2, 16), torch.randn(16)
    for direct, dispatched in zip(ops.npu_rms_norm(x, gamma), torch.ops.npu.npu_rms_norm(x, gamma), strict=True):
        assert torch.equal(direct, dispatched)
