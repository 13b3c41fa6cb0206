"""QuantTensor: a cut, a stack and a fused weight hold the values that they were made from."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.ops.nibbles import Carrier, Nibbles
from framework.quantization.online import quantize
from framework.quantization.tensor import QuantTensor, concat, fusable
from tests.quantization.weights import CASES, spread, values, weight

N, K = 12, 1024
# columns that a cut may start and end at: whole groups and blocks
STEP = {0: 1, 32: 32, 64: 64, 256: 256}


def step_of(scheme, group):
    return 512 if scheme == "mxfp4_dualscale" else STEP[group]


@st.composite
def cut_weights(draw):
    """A weight with what follows its rows and columns, and a cut of it."""
    scheme, group = draw(st.sampled_from(CASES))
    held = weight(scheme, N, K, group, draw(st.integers(0, 3)))
    if held.scale is not None:
        rows, columns = {"quant_bias": torch.arange(N)}, {"mul_scale": torch.arange(K)}
        held = replace(held, rows=rows, columns=columns)
    if held.element == "int" and not held.is_float:
        extra = draw(st.sampled_from(["zero", "minimum", None]))
        if extra:
            held = replace(held, **{extra: torch.arange(held.scale.numel()).view_as(held.scale) / 7.0})
    step = step_of(scheme, group)
    n0, n1 = sorted(draw(st.tuples(st.integers(0, N), st.integers(0, N)).filter(lambda p: p[0] != p[1])))
    k0, k1 = sorted(draw(st.tuples(*2 * [st.integers(0, K // step)]).filter(lambda p: p[0] != p[1])))
    return held, (n0, n1, k0 * step, k1 * step)


@settings(deadline=None, max_examples=120)
@given(cut_weights())
def test_a_cut_holds_its_part_of_the_values(case):
    held, (n0, n1, k0, k1) = case
    part = held.slice(n0, n1, k0, k1)
    assert part.shape == (n1 - n0, k1 - k0)
    np.testing.assert_allclose(part.dequantize().numpy(), values(held)[n0:n1, k0:k1], rtol=1e-6, atol=1e-6)
    if held.rows:
        assert torch.equal(part.rows["quant_bias"], torch.arange(n0, n1))
        assert torch.equal(part.columns["mul_scale"], torch.arange(k0, k1))


@settings(deadline=None, max_examples=60)
@given(cut_weights())
def test_rows_cut_and_stacked_are_the_weight_again(case):
    held, (n0, n1, k0, k1) = case
    ends = sorted({0, n0, n1, N})
    parts = [held.slice(a, b, k0, k1) for a, b in pairwise(ends)]
    assert all(fusable(parts[0], part) and fusable(part, parts[0]) for part in parts)
    again = concat(parts)
    assert torch.equal(again.dequantize(), held.slice(0, N, k0, k1).dequantize())
    if held.rows:
        assert torch.equal(again.rows["quant_bias"], torch.arange(N))


@pytest.mark.parametrize(("scheme", "group"), [case for case in CASES if step_of(*case) > 1])
@pytest.mark.parametrize("inner", [(0.5, 2), (0, 1.5)])
def test_a_cut_through_a_group_is_refused(scheme, group, inner):
    step = step_of(scheme, group)
    k = max(K, 3 * step)
    k0, k1 = (int(end * step) for end in inner)
    with pytest.raises(ValueError, match="cut a group"):
        weight(scheme, N, k, group).slice(0, N, k0, k1)


def test_columns_in_activation_order_are_put_back_and_cannot_be_cut():
    order = torch.randperm(K, generator=torch.Generator().manual_seed(0))
    held = replace(weight("w4a16", N, K, 64), order=order)
    expected = np.empty((N, K))
    expected[:, order.numpy()] = values(held)
    np.testing.assert_allclose(held.dequantize().numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(held.slice(2, 5, 0, K).dequantize().numpy(), expected[2:5], rtol=1e-6)
    with pytest.raises(ValueError, match="activation order"):
        held.slice(0, N, 0, 512)


def test_zero_points_of_one_part_alone_are_kept_when_weights_are_stacked():
    parts = [weight("w8a16", 6, 64, 32, seed=1), weight("w8a16", 4, 64, 32, seed=2, zeros=True)]
    for pair in (parts, parts[::-1]):
        assert np.array_equal(values(concat(pair)), np.concatenate([values(part) for part in pair]))


def test_weights_of_different_kinds_are_not_stacked():
    plain = weight("w8a16", 4, 64, 32)
    odd = {"order": torch.arange(64).flip(0)}, {"whole": {"alpha": torch.ones(1)}}, {"bits": 4}
    for change in odd:
        with pytest.raises(ValueError, match="different kinds"):
            concat([plain, replace(plain, **change)])


def test_weights_that_differ_in_what_the_input_passes_are_not_fused():
    held = weight("w8a8_static", N, K)
    grouped = weight("w4a16", N, K, 64)
    others = [
        (held, replace(held, whole=held.whole | {"input_scale": torch.tensor([0.04])})),
        (held, replace(held, columns={"mul_scale": torch.ones(K)})),
        (held, replace(held, zero=torch.zeros(N, 1))),
        (held, replace(held, rows={"quant_bias": torch.zeros(N)})),
        (held, replace(held, bits=4)),
        (grouped, weight("w4a16", N, K)),
        (grouped, replace(grouped, order=torch.arange(K))),
        (replace(grouped, order=torch.arange(K)), replace(grouped, order=torch.arange(K).flip(0))),
        (weight("float", N, K), held),
    ]
    for one, other in others:
        assert not fusable(one, other) and not fusable(other, one)
    assert fusable(held, replace(held, stored=-held.codes, scale=held.scale * 2))


def rounded(weight, most, size):
    """Codes and scales by definition, one group after another."""
    n, k = weight.shape
    codes, scales = np.empty((n, k)), np.empty((n, k // size), np.float32)
    for row in range(n):
        for g in range(k // size):
            part = weight[row, g * size : (g + 1) * size].astype(np.float32)
            largest = np.abs(part).max()
            scales[row, g] = np.float32(largest) / np.float32(most) if largest else 1
            codes[row, g * size : (g + 1) * size] = np.rint(part / scales[row, g])
    return codes, scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("scheme", "most", "group"),
    [("w8a8_dynamic", 127, 0), ("w8a16", 127, 0), ("w8a16", 127, 128), ("w4a16", 7, 0), ("w4a16", 7, 32)],
)
def test_online_integers_are_the_rounded_quotients(scheme, most, group, dtype):
    w = torch.randn(6, 256, generator=torch.Generator().manual_seed(1)).to(dtype)
    w[2], w[3, :128] = 0, 0
    made = quantize(w, scheme, group)
    codes, scales = rounded(w.float().numpy(), most, group or 256)
    assert np.array_equal(made.codes.numpy(), codes) and np.array_equal(made.scale.numpy(), scales)
    assert (made.bits, made.group_size) == (8 if most == 127 else 4, group or 256)
    assert made.codes.dtype is torch.int8 and made.zero is None


@pytest.mark.parametrize(("scheme", "element", "emax", "most"), [("mxfp8", "e4m3", 8, 448), ("mxfp4", "e2m1", 2, 6)])
def test_online_mx_is_the_nearest_value_under_the_blocks_power_of_two(scheme, element, emax, most):
    w = torch.randn(6, 96, generator=torch.Generator().manual_seed(2)) * torch.logspace(-3, 3, 6).unsqueeze(1)
    w[1, 32:64] = 0
    made = quantize(w, scheme, 0)
    assert (made.element, tuple(made.scale.shape)) == (element, (6, 3))
    largest = w.double().view(6, 3, 32).abs().amax(-1).numpy()
    exponents = np.where(largest == 0, 0, np.floor(np.log2(np.where(largest == 0, 1, largest))) - emax + 127)
    assert np.array_equal(made.scale.numpy(), exponents)
    power = 2.0 ** (spread(made.scale, 32, 96) - 127)
    table = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()
    table = table[np.isfinite(table)] if scheme == "mxfp8" else np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    table = np.abs(table)
    wanted = np.minimum(np.abs(w.double().numpy()) / power, most)
    best = np.abs(wanted[..., None] - table).min(-1)
    found = np.abs(values(made)) / power
    np.testing.assert_allclose(np.abs(found - wanted), best, atol=1e-12)
    signs = np.sign(values(made)) * np.sign(w.numpy())
    assert (signs >= 0).all()


def test_a_float_weight_is_cut_as_it_is():
    w = torch.randn(4, 6)
    assert torch.equal(QuantTensor(w).slice(1, 3, 2, 5).codes, w[1:3, 2:5])
    assert QuantTensor(w).is_float


def test_packed_codes_are_joined_with_packed_and_with_single_ones():
    words = torch.randint(-(2**31), 2**31, (3, 8, 4), generator=torch.Generator().manual_seed(0)).int()
    scale = torch.ones(8, 1)
    held = [QuantTensor(Nibbles((each,), Carrier.ALONG_K), scale, group_size=32, bits=4) for each in words]
    single = [replace(each, stored=each.codes) for each in held]
    expected = torch.cat([each.codes for each in single])
    for parts in (held, [held[0], single[1], held[2]], [single[0], held[1], held[2]], single):
        assert fusable(parts[0], parts[1])
        assert torch.equal(concat(parts).codes, expected)
    assert isinstance(concat(held).stored, Nibbles)
