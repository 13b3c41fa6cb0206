"""Limits of the ops against cases typed from the op reference: what runs as it is, how, and what does not."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.capability.limits import fit, read_limits
from framework.capability.storage import STORAGE
from framework.recipe.compose import conf_dir
from tests.capability.support import TABLES

LIMITS = read_limits(conf_dir() / "ops")
SAME, FLOAT, REFUSED = "same", "float", "refused"

# scheme, layer type, N, K, group (0: one scale a row) -> as it is, float at load, refused, or a number of calls
CASES = [
    # npu_weight_quant_batchmatmul: groups of 32 .. K-1 in steps of 32, or one scale a row; K, N up to 65535
    ("w4a16", "linear", 256, 256, 128, SAME),
    ("w4a16", "linear", 256, 256, 32, SAME),
    ("w4a16", "linear", 256, 256, 96, SAME),
    ("w4a16", "linear", 256, 256, 224, SAME),
    ("w4a16", "linear", 256, 256, 0, SAME),
    ("w4a16", "linear", 256, 256, 256, SAME),  # G17: a group that spans K is one scale a row
    ("w4a16", "linear", 256, 128, 256, SAME),
    ("w4a16", "linear", 256, 24, 32, SAME),
    ("w4a16", "linear", 256, 256, 16, FLOAT),
    ("w4a16", "linear", 256, 256, 48, FLOAT),
    ("w4a16", "linear", 252, 256, 128, FLOAT),  # eight codes a word along N
    ("w4a16", "linear", 65528, 65535, 128, SAME),
    ("w4a16", "linear", 65536, 256, 128, 2),
    ("w4a16", "linear", 256, 65536, 128, FLOAT),
    ("w8a16", "linear", 256, 256, 128, SAME),
    ("w8a16", "linear", 252, 256, 128, SAME),
    ("w8a16", "linear", 256, 256, 0, SAME),
    ("w8a16", "linear", 256, 256, 256, SAME),
    ("w8a16", "linear", 256, 256, 16, FLOAT),
    ("w8a16", "linear", 65536, 256, 0, 2),
    # npu_grouped_matmul: int4 by row or whole groups of any size, int8 by row only (G26)
    ("w4a16", "moe", 256, 256, 128, SAME),
    ("w4a16", "moe", 256, 256, 16, SAME),
    ("w4a16", "moe", 256, 256, 0, SAME),
    ("w4a16", "moe", 256, 128, 128, SAME),
    ("w4a16", "moe", 256, 192, 128, FLOAT),
    ("w4a16", "moe", 252, 256, 128, FLOAT),
    ("w4a16", "moe", 256, 65536, 128, FLOAT),
    ("w8a16", "moe", 256, 256, 0, SAME),
    ("w8a16", "moe", 256, 256, 256, SAME),
    ("w8a16", "moe", 256, 256, 64, FLOAT),
    ("w8a16", "moe", 256, 256, 128, FLOAT),
    # int8 by int8: nothing but the 16 bits of a dimension
    ("w8a8_static", "linear", 250, 250, 0, SAME),
    ("w8a8_static", "linear", 65536, 256, 0, 2),
    ("w8a8_dynamic", "linear", 250, 250, 0, SAME),
    ("w8a8_dynamic", "linear", 65535, 65535, 0, SAME),
    ("w8a8_dynamic", "linear", 256, 65536, 0, REFUSED),
    ("w8a8_dynamic", "linear", 151936, 256, 0, 3),
    ("w8a8_dynamic", "linear", 151936, 65536, 0, REFUSED),
    ("w8a8_mix", "linear", 65536, 256, 0, 2),
    ("w8a8_dynamic", "moe", 250, 250, 0, SAME),
    ("w8a8_dynamic", "moe", 256, 65536, 0, REFUSED),
    # int4 by int4: N and K in eights, one scale a row
    ("w4a4_dynamic", "linear", 256, 256, 0, SAME),
    ("w4a4_dynamic", "linear", 252, 256, 0, REFUSED),
    ("w4a4_dynamic", "linear", 256, 252, 0, REFUSED),
    ("w4a4_dynamic", "linear", 256, 256, 128, REFUSED),
    ("w4a4_dynamic", "linear", 256, 65536, 0, REFUSED),
    ("w4a4_dynamic", "moe", 256, 256, 0, SAME),
    ("w4a4_dynamic", "moe", 252, 256, 0, REFUSED),
    ("w4a4_dynamic", "moe", 256, 252, 0, REFUSED),
    # int8 by int4: groups of 256 (G56), the grouped op one scale a row too; a scale can be repeated, not split
    ("w4a8_dynamic", "linear", 256, 1024, 256, SAME),
    ("w4a8_dynamic", "linear", 256, 1024, 512, SAME),
    ("w4a8_dynamic", "linear", 256, 1024, 0, SAME),
    ("w4a8_dynamic", "linear", 256, 256, 0, SAME),
    ("w4a8_dynamic", "linear", 256, 1024, 128, 8),
    ("w4a8_dynamic", "linear", 256, 1024, 64, 16),
    ("w4a8_dynamic", "linear", 65544, 1024, 128, 16),
    ("w4a8_dynamic", "linear", 256, 640, 0, 1),  # no groups of 256: one call of int8 codes
    ("w4a8_dynamic", "linear", 252, 1024, 256, REFUSED),
    ("w4a8_dynamic", "moe", 256, 1024, 256, SAME),
    ("w4a8_dynamic", "moe", 256, 1024, 0, SAME),
    ("w4a8_dynamic", "moe", 256, 128, 128, SAME),
    ("w4a8_dynamic", "moe", 256, 256, 64, 4),
    ("w4a8_dynamic", "moe", 252, 1024, 0, REFUSED),
    # MX: blocks of 32, in pairs where the op or the grouped layout has no half pair (G10)
    ("mxfp8", "linear", 256, 96, 32, SAME),
    ("mxfp8", "linear", 250, 256, 32, SAME),
    ("mxfp8", "linear", 256, 80, 32, REFUSED),
    ("mxfp8", "moe", 256, 128, 32, SAME),
    ("mxfp8", "moe", 256, 96, 32, REFUSED),
    ("mxfp4", "linear", 256, 96, 32, SAME),
    ("mxfp4", "linear", 256, 81, 32, REFUSED),
    ("mxfp4", "moe", 256, 128, 32, SAME),
    ("mxfp4", "moe", 256, 96, 32, REFUSED),
    ("mxfp4_dualscale", "linear", 256, 256, 32, SAME),
    ("mxfp4_dualscale", "linear", 256, 544, 32, SAME),
    ("w4a8_mxfp", "linear", 256, 128, 32, SAME),
    ("w4a8_mxfp", "linear", 256, 96, 32, REFUSED),
    ("w4a8_mxfp", "moe", 256, 128, 32, SAME),
    ("w4a8_mxfp", "moe", 256, 96, 32, REFUSED),
    ("mxfp8", "linear", 65536, 256, 32, 2),
    ("mxfp8", "linear", 256, 65536, 32, REFUSED),
    ("mxfp8", "moe", 65536, 256, 32, REFUSED),
    # float
    ("float", "linear", 151936, 70001, 0, SAME),
    ("float", "moe", 255, 255, 0, SAME),
    ("float", "moe", 256, 65536, 0, REFUSED),
]  # fmt: skip

# the calls of each scheme, dense and grouped, as the op reference's table of schemes has them
OPS = {
    ("float", "linear"): "matmul",
    ("float", "moe"): "npu_grouped_matmul",
    ("w8a8_static", "linear"): "npu_quantize + npu_quant_matmul",
    ("w8a8_dynamic", "linear"): "npu_dynamic_quant + npu_quant_matmul",
    ("w8a8_dynamic", "moe"): "npu_dynamic_quant + npu_grouped_matmul",
    ("w8a8_mix", "linear"): "npu_dynamic_quant + npu_quant_matmul",
    ("w4a4_dynamic", "linear"): "npu_dynamic_quant + npu_quant_matmul",
    ("w4a4_dynamic", "moe"): "npu_dynamic_quant + npu_grouped_matmul",
    ("w4a8_dynamic", "linear"): "npu_dynamic_quant + npu_quant_matmul",
    ("w4a8_dynamic", "moe"): "npu_dynamic_quant + npu_grouped_matmul",
    ("w4a16", "linear"): "npu_weight_quant_batchmatmul",
    ("w4a16", "moe"): "npu_grouped_matmul",
    ("w8a16", "linear"): "npu_weight_quant_batchmatmul",
    ("w8a16", "moe"): "npu_grouped_matmul",
    ("mxfp8", "linear"): "npu_dynamic_mx_quant + npu_quant_matmul",
    ("mxfp8", "moe"): "npu_dynamic_mx_quant + npu_grouped_matmul",
    ("mxfp4", "linear"): "npu_dynamic_mx_quant + npu_quant_matmul",
    ("mxfp4", "moe"): "npu_dynamic_mx_quant + npu_grouped_matmul",
    ("mxfp4_dualscale", "linear"): "npu_dynamic_dual_level_mx_quant + npu_dual_level_quant_matmul",
    ("w4a8_mxfp", "linear"): "npu_dynamic_mx_quant + npu_quant_matmul",
    ("w4a8_mxfp", "moe"): "npu_dynamic_mx_quant + npu_grouped_matmul",
}  # fmt: skip

# rows and columns at which a shard may begin
GRAINS = {
    ("w4a16", "linear"): (8, 1),
    ("w8a16", "linear"): (1, 1),
    ("w8a8_static", "linear"): (1, 1),
    ("w8a8_dynamic", "moe"): (1, 1),
    ("w4a4_dynamic", "linear"): (8, 8),
    ("w4a4_dynamic", "moe"): (8, 8),
    ("w4a8_dynamic", "moe"): (8, 1),
    ("mxfp8", "linear"): (1, 64),
    ("mxfp8", "moe"): (1, 64),
    ("mxfp4", "linear"): (1, 64),
    ("mxfp4_dualscale", "linear"): (1, 512),
    ("w4a8_mxfp", "moe"): (1, 64),
}


@pytest.mark.parametrize(("scheme", "layer", "n", "k", "group", "outcome"), CASES)
def test_how_a_shard_runs(scheme, layer, n, k, group, outcome):
    made = fit(LIMITS, scheme, layer, n, k, group)
    assert made.refused == (outcome == REFUSED)
    assert made.scheme == ("float" if outcome == FLOAT else scheme)
    assert made.pieces == (outcome if isinstance(outcome, int) else 1)
    assert made.op == OPS[("float", layer) if outcome == FLOAT else (scheme, layer)]
    assert (made.reason == "") == (outcome == SAME)
    assert (made.bits == 8) == (scheme == "w4a8_dynamic" and group % 256 + k % 256 > 0 and isinstance(outcome, int))
    if outcome != SAME:
        limit = LIMITS[scheme, layer]
        assert limit.op in made.reason and any(str(value) in made.reason for value in (n, k, group or k))


def test_every_scheme_has_its_calls():
    assert {key: limit.ops for key, limit in LIMITS.items()} == OPS


@pytest.mark.parametrize(("key", "grain"), GRAINS.items())
def test_where_a_shard_may_begin(key, grain):
    assert LIMITS[key].grain((1, 1)) == grain
    assert LIMITS[key].grain((3, 5)) == tuple(
        held if step == 1 else held * step for held, step in zip((3, 5), grain, strict=True)
    )


@pytest.mark.parametrize("name", TABLES)
def test_every_row_has_limits_and_a_size(name):
    for row, (_, scheme, layer, _, _) in TABLES[name].items():
        assert (scheme, layer) in LIMITS, row
        assert scheme in STORAGE, row


@given(
    st.sampled_from(sorted(LIMITS)),
    st.integers(1, 200_000),
    st.integers(1, 200_000),
    st.one_of(st.just(0), st.integers(1, 4096)),
)
def test_any_shape_is_answered(key, n, k, group):
    made = fit(LIMITS, *key, n, k, group)
    assert made.pieces >= 1 and made.op
    assert not (made.refused and made.scheme != key[0])
    assert bool(made.reason) == (made.refused or made.pieces > 1 or made.bits > 0 or made.scheme != key[0])
