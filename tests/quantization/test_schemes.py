import pytest
import torch

from framework import ops
from framework.quantization.registry import SCHEMES
from framework.quantization.schemes.weight_only import signed
from framework.quantization.tensor import QuantTensor, concat

CPU = torch.device("cpu")
N, K, GROUP = 32, 96, 32
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def uniform(*shape, seed):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def q4_0():
    """Unsigned nibbles, zero 8, signed scales."""
    codes = torch.randint(0, 16, (N, K), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    scale = (uniform(N, K // GROUP, seed=1) - 0.5).half().float() / 8
    return QuantTensor(codes, scale, zero=torch.full_like(scale, 8), group_size=GROUP, bits=4)


def q4_1(*, flat_groups=False):
    """Unsigned nibbles and a minimum; a group of equal values has scale 0."""
    codes = torch.randint(0, 16, (N, K), generator=torch.Generator().manual_seed(2), dtype=torch.int8)
    scale = (uniform(N, K // GROUP, seed=3) / 8).half().float()
    minimum = (-uniform(N, K // GROUP, seed=4)).half().float()
    if flat_groups:
        scale[3, 1] = scale[7, 0] = 0
        minimum[7, 0] = 0
    return QuantTensor(codes, scale, minimum=minimum, group_size=GROUP, bits=4)


def q8_0():
    """Signed bytes."""
    codes = torch.randint(-128, 128, (N, K), generator=torch.Generator().manual_seed(5), dtype=torch.int8)
    return QuantTensor(codes, (uniform(N, K // GROUP, seed=6) / 128).half().float(), group_size=GROUP, bits=8)


def per_channel(bits):
    half = 1 << (bits - 1)
    codes = torch.randint(-half, half, (N, K), generator=torch.Generator().manual_seed(7), dtype=torch.int8)
    return QuantTensor(codes, uniform(N, 1, seed=8) / half, group_size=K, bits=bits)


WEIGHTS = {
    "q4_0": (q4_0, "w4a16"),
    "q4_1": (q4_1, "w4a16"),
    "q4_1 with flat groups": (lambda: q4_1(flat_groups=True), "w4a16"),
    "4 bits per channel": (lambda: per_channel(4), "w4a16"),
    "q8_0": (q8_0, "w8a16"),
    "8 bits per channel": (lambda: per_channel(8), "w8a16"),
}


def values_by_definition(weight):
    """Each weight on its own: scale * code + minimum, or scale * (code - zero), in double."""
    values = torch.empty(weight.codes.shape, dtype=torch.float64)
    for n in range(values.shape[0]):
        for k in range(values.shape[1]):
            group = k // weight.group_size
            code, scale = float(weight.codes[n, k]), float(weight.scale[n, group])
            zero = 0.0 if weight.zero is None else float(weight.zero[n, group])
            minimum = 0.0 if weight.minimum is None else float(weight.minimum[n, group])
            values[n, k] = scale * (code - zero) + minimum
    return values


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_prepared_weight_multiplies_as_its_values_do(name, dtype, rows):
    make, scheme = WEIGHTS[name]
    weight = make()
    x = torch.randn(rows, K, generator=torch.Generator().manual_seed(9)).to(dtype)
    operands = SCHEMES[scheme].prepare(weight, dtype=dtype, device=CPU)
    y = SCHEMES[scheme].linear(x, operands)
    expected = x.double() @ values_by_definition(weight).t()
    assert y.dtype is dtype
    assert y.shape == (rows, N)
    assert float((y.double() - expected).abs().max()) <= TOLERANCE[dtype] * float(expected.abs().max())


@pytest.mark.parametrize("name", WEIGHTS)
def test_in_fp32_the_product_is_that_of_the_formats_own_values(name):
    """The reference mode: bit for bit what a plain linear over the dequantized weight gives."""
    make, scheme = WEIGHTS[name]
    weight = make()
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(9))
    operands = SCHEMES[scheme].prepare(weight, dtype=torch.float32, device=CPU)
    expected = torch.nn.functional.linear(x, weight.dequantize())
    assert torch.equal(SCHEMES[scheme].linear(x, operands), expected)


@pytest.mark.parametrize("name", WEIGHTS)
def test_signed_codes_offset_and_scale_give_the_same_values(name):
    weight = WEIGHTS[name][0]()
    codes, scale, offset = signed(weight)
    half = 1 << (weight.bits - 1)
    assert int(codes.min()) >= -half
    assert int(codes.max()) < half
    by_row = scale.t().double().repeat_interleave(weight.group_size, 1)
    shift = 0 if offset is None else offset.t().double().repeat_interleave(weight.group_size, 1)
    torch.testing.assert_close((codes.double() + shift) * by_row, values_by_definition(weight), rtol=1e-5, atol=1e-6)


def test_q4_0_needs_no_offset_but_the_zero_that_the_shift_takes_up():
    _, _, offset = signed(q4_0())
    assert torch.equal(offset, torch.zeros(K // GROUP, N))


def test_a_group_of_scale_0_holds_its_minimum_with_codes_0_and_offset_1():
    weight = q4_1(flat_groups=True)
    codes, scale, offset = signed(weight)
    assert not codes[3, 32:64].any()
    assert scale[1, 3] == weight.minimum[3, 1]
    assert offset[1, 3] == 1
    assert (scale[0, 7], offset[0, 7]) == (0, 1)


def test_codes_that_do_not_fit_their_bits_are_refused():
    weight = QuantTensor(torch.full((16, 32), -9, dtype=torch.int8), torch.ones(16, 1), group_size=32, bits=4)
    with pytest.raises(ValueError, match="4 bits"):
        signed(weight)


def test_a_scheme_refuses_another_width():
    for scheme, weight in (("w4a16", q8_0()), ("w8a16", q4_0())):
        with pytest.raises(ValueError, match="codes of"):
            SCHEMES[scheme].prepare(weight, dtype=torch.bfloat16, device=CPU)


def test_operands_have_the_shapes_the_operator_documents():
    operands = SCHEMES["w4a16"].prepare(q4_1(), dtype=torch.bfloat16, device=CPU)
    assert (operands.weight.shape, operands.weight.dtype) == ((K, N // 8), torch.int32)
    assert operands.scale.shape == operands.offset.shape == (K // GROUP, N)
    assert operands.scale.dtype is operands.offset.dtype is torch.bfloat16
    assert operands.group_size == GROUP
    operands = SCHEMES["w8a16"].prepare(per_channel(8), dtype=torch.float16, device=CPU)
    assert (operands.weight.shape, operands.weight.dtype) == ((K, N), torch.int8)
    assert operands.offset is None
    assert operands.group_size == 0


def test_nbytes_counts_what_is_held():
    parameters = 2 * (K // GROUP) * N * 2
    packed_pairs = parameters
    operands = SCHEMES["w4a16"].prepare(q4_1(), dtype=torch.bfloat16, device=CPU)
    assert operands.nbytes == N * K // 2 + packed_pairs + parameters
    operands = SCHEMES["w4a16"].prepare(q4_1(), dtype=torch.float16, device=CPU)
    assert operands.nbytes == N * K // 2 + parameters
    operands = SCHEMES["float"].prepare(QuantTensor(torch.randn(N, K)), dtype=torch.bfloat16, device=CPU)
    assert operands.nbytes == N * K * 2


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_float_casts_a_plain_weight_and_dequantizes_another(dtype):
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(10)).to(dtype)
    plain = torch.randn(N, K, generator=torch.Generator().manual_seed(11)).bfloat16()
    for weight, values in ((QuantTensor(plain), plain.double()), (q4_1(), values_by_definition(q4_1()))):
        operands = SCHEMES["float"].prepare(weight, dtype=dtype, device=CPU)
        assert operands.weight.dtype is dtype
        y = SCHEMES["float"].linear(x, operands)
        expected = x.double() @ values.t()
        assert float((y.double() - expected).abs().max()) <= TOLERANCE[dtype] * float(expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_slices_and_fused_weights_are_prepared_as_any_other(dtype):
    weight = q4_1()
    parts = [weight.slice(0, 16, 32, 96), weight.slice(16, 32, 32, 96)]
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(12)).to(dtype)
    operands = SCHEMES["w4a16"].prepare(concat(parts), dtype=dtype, device=CPU)
    expected = x.double() @ values_by_definition(weight)[:, 32:].t()
    y = SCHEMES["w4a16"].linear(x, operands)
    assert float((y.double() - expected).abs().max()) <= TOLERANCE[dtype] * float(expected.abs().max())


def test_the_operands_run_through_the_registered_operator():
    operands = SCHEMES["w4a16"].prepare(q4_1(), dtype=torch.bfloat16, device=CPU)
    x = torch.randn(2, K, generator=torch.Generator().manual_seed(13)).bfloat16()
    dispatched = torch.ops.npu.npu_weight_quant_batchmatmul.default(
        x, operands.weight, operands.scale, operands.offset, antiquant_group_size=operands.group_size
    )
    assert torch.equal(dispatched, SCHEMES["w4a16"].linear(x, operands))
    assert callable(ops.npu_weight_quant_batchmatmul)
