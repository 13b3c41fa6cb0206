"""npu_grouped_matmul: literal numpy loops over experts for every arithmetic, and whole expert MLPs."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from framework import ops
from framework.ops.layout import held_bytes, stack_experts, weight_operand
from framework.ops.quant_layout import int4_operand, int8_operand, mx_operand

CPU = torch.device("cpu")
COUNTS = [2, 0, 5, 1]  # and three rows after the last group
ROWS, E, K, N = 11, len(COUNTS), 64, 32
NUMBERS = {torch.bfloat16: ops.BFLOAT16, torch.float16: ops.FLOAT16, torch.float32: ops.FLOAT32}
EPSILON = {torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float32: 2**-20}


def generator(seed):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=generator(seed)).to(dtype)


def positive(*shape, seed=0, dtype=torch.float32):
    return (torch.rand(shape, generator=generator(seed)) * 0.01 + 0.001).to(dtype)


def integers(*shape, low=-128, high=128, seed=0):
    return torch.randint(low, high, shape, generator=generator(seed), dtype=torch.int8)


def packed_int4(codes):
    """int32 [.., N/8] of int8 codes [.., N], nibble by nibble."""
    nibbles = codes.numpy().astype(np.int64) & 15
    words = sum(nibbles[..., i::8] << 4 * i for i in range(8))
    return torch.from_numpy(words.astype(np.uint32).view(np.int32))


def bits(scale):
    """fp32 values as their bits in int64."""
    return torch.from_numpy(scale.numpy().view(np.uint32).astype(np.int64))


def call(x, weight, counts=COUNTS, kind=1, **operands):
    numbers = {0: list(itertools.accumulate(counts)), 1: counts, 2: list(enumerate(counts))}[kind]
    listed = {key: [value] if isinstance(value, torch.Tensor) else value for key, value in operands.items()}
    weights = [weight] if isinstance(weight, torch.Tensor) else weight
    (y,) = ops.npu_grouped_matmul(
        [x], weights, group_list=torch.tensor(numbers), split_item=2, group_type=0, group_list_type=kind, **listed
    )
    return y


def by_expert(x, counts, product):
    """The rows of each expert through `product(rows, e)`, in numpy; zeros after the last group."""
    parts, first = [], 0
    for e, count in enumerate(counts):
        if count:
            parts.append(product(x[first : first + count], e))
        first += count
    shape, dtype = (len(x) - first, parts[0].shape[1]), parts[0].dtype
    return np.concatenate([*parts, np.zeros(shape, dtype)])


def per_row(values, counts, rows):
    """values[e] for the expert of every row, anything after the last group."""
    experts = np.repeat(np.arange(len(counts)), counts)
    return values[np.concatenate([experts, np.zeros(rows - len(experts), int)])]


def close(y, expected, dtype, wide=1.0):
    assert y.dtype is dtype
    difference = np.abs(y.double().numpy() - expected).max()
    assert difference <= wide * EPSILON[dtype] * np.abs(expected).max()


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kind", [0, 1, 2])
def test_float_experts(dtype, biased, kind):
    x, weight = normal(ROWS, K, dtype=dtype), normal(E, N, K, seed=1, dtype=dtype)
    bias = normal(E, N, seed=2) if biased else torch.zeros(E, N)
    y = call(x, weight.transpose(1, 2), kind=kind, **({"bias": bias} if biased else {}))
    w, b = weight.double().numpy(), bias.double().numpy()
    close(y, by_expert(x.double().numpy(), COUNTS, lambda rows, e: rows @ w[e].T + b[e]), dtype)
    assert torch.equal(call(x, [part.t() for part in weight], kind=kind, **({"bias": list(bias)} if biased else {})), y)
    assert torch.allclose(call(x, weight.transpose(1, 2).contiguous()), call(x, weight.transpose(1, 2)), rtol=0.02)


def test_experts_without_rows_are_not_touched():
    """Their weights may be anything, here of the wrong shape."""
    weight = normal(K, N)
    y = call(normal(3, K), [torch.empty(0, 0), weight, torch.empty(0, 0)], counts=[0, 3, 0])
    torch.testing.assert_close(y, normal(3, K) @ weight)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=9), st.integers(0, 3), st.sampled_from([0, 1, 2]))
def test_any_division_of_the_rows_uses_each_expert_for_its_own(counts, extra, kind):
    """Weight e is e + 1 times one: the result names the expert."""
    rows = sum(counts) + extra
    weight = (torch.arange(1.0, len(counts) + 1)[:, None, None]).expand(-1, 2, 8)
    y = call(torch.full((rows, 2), 0.5), weight, counts=counts, kind=kind)
    expected = [e + 1.0 for e, count in enumerate(counts) for _ in range(count)] + [0.0] * extra
    assert y.shape == (rows, 8) and y[:, 3].tolist() == expected


@pytest.mark.parametrize(("kind", "numbers"), [(0, [3, 2, 4]), (1, [3, 3]), (1, [3, -1]), (2, [[0, 9]]), (3, [4])])
def test_groups_that_do_not_fit_the_rows_are_refused(kind, numbers):
    with pytest.raises(ValueError, match="group_list"):
        ops.npu_grouped_matmul(
            [normal(4, 8)], [normal(3, 8, 8)], group_list=torch.tensor(numbers), group_list_type=kind, split_item=2,
            group_type=0,
        )  # fmt: skip


@pytest.mark.parametrize("options", [{"split_item": 0}, {"group_type": -1}, {"act_type": 5}, {"group_list": None}])
def test_what_the_kernel_does_not_offer_is_refused(options):
    given_options = {"group_list": torch.tensor([4]), "split_item": 3, "group_type": 0} | options
    with pytest.raises(NotImplementedError, match="npu_grouped_matmul"):
        ops.npu_grouped_matmul([normal(4, 8)], [normal(1, 8, 8)], **given_options)


def integer_reference(x, weight, counts, scale, tokens, int_bias=None, float_bias=None):
    """int64 sums, then fp32 steps in the order of the specification. weight [E, N, K]."""
    w = weight.numpy().astype(np.int64)
    total = by_expert(x.numpy().astype(np.int64), counts, lambda rows, e: rows @ w[e].T)
    inside = sum(counts)
    if int_bias is not None:
        total[:inside] += per_row(int_bias.numpy(), counts, len(x))[:inside]
    y = total.astype(np.float32) * per_row(scale.float().numpy(), counts, len(x)) * tokens.numpy()[:, None]
    if float_bias is not None:
        y[:inside] += per_row(float_bias.float().numpy(), counts, len(x))[:inside]
    return total, y


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias_dtype", [None, torch.int32, torch.float32])
@pytest.mark.parametrize("k", [K, 4096])
def test_int8_experts(dtype, scale_dtype, bias_dtype, k):
    x, weight = integers(ROWS, k), integers(E, N, k, seed=1)
    scale, tokens = positive(E, N, dtype=scale_dtype), positive(ROWS, seed=1)
    bias = None if bias_dtype is None else (normal(E, N, seed=2) * 50).to(bias_dtype)
    biases = {} if bias is None else {"int_bias" if bias_dtype is torch.int32 else "float_bias": bias}
    operand = stack_experts([int8_operand(part, CPU) for part in weight])
    assert operand.transpose(1, 2).is_contiguous()
    given_bias = {} if bias is None else {"bias": bias}
    y = call(x, operand, scale=scale, per_token_scale=tokens, output_dtype=NUMBERS[dtype], **given_bias)
    total, expected = integer_reference(x, weight, COUNTS, scale, tokens, **biases)
    assert torch.equal(y, torch.from_numpy(expected).to(dtype))
    if bias_dtype is not torch.float32:
        sums = call(x, operand, output_dtype=ops.INT32, **given_bias)
        assert sums.dtype is torch.int32 and np.array_equal(sums.numpy(), total)


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("own_form", [False, True])
def test_int4_experts(dtype, own_form):
    x, weight = integers(ROWS, K, low=-8, high=8), integers(E, N, K, low=-8, high=8, seed=1)
    scale, tokens = positive(E, N), positive(ROWS, seed=1)
    operand = (
        stack_experts([int4_operand(part, CPU) for part in weight])
        if own_form
        else packed_int4(weight.transpose(1, 2).contiguous())
    )
    assert operand.shape == (E, K, N // 8) and operand.dtype is torch.int32
    y = call(packed_int4(x), operand, scale=bits(scale), per_token_scale=tokens, output_dtype=NUMBERS[dtype])
    _, expected = integer_reference(x, weight, COUNTS, scale, tokens)
    assert torch.equal(y, torch.from_numpy(expected).to(dtype))
    assert held_bytes(operand) == (E * N * K if own_form else operand.nbytes)


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("own_form", [False, True])
@pytest.mark.parametrize(("groups", "dims", "as_bits"), [(1, 3, True), (1, 2, True), (1, 3, False), (4, 3, True)])
@pytest.mark.parametrize("counts", [COUNTS, [0, 70, 0, 2]])
def test_int8_by_int4_experts_are_the_products_of_halves(dtype, own_form, groups, dims, as_bits, counts):
    """Hardware splits x into 16 * high + low + 8 and takes the last part from the bias."""
    x, weight = integers(sum(counts) + 3, K), integers(E, N, K, low=-8, high=8, seed=1)
    scale, tokens = positive(E, groups, N), positive(len(x), seed=1)
    values = weight.double().numpy() * np.repeat(scale.double().numpy().transpose(0, 2, 1), K // groups, 2)
    extra = normal(E, N, seed=3).double().numpy()
    bias = torch.from_numpy((8 * values.sum(2) + extra).astype(np.float32))
    high, low = x.numpy().astype(int) >> 4, (x.numpy().astype(int) & 15) - 8
    expected = by_expert(high, counts, lambda rows, e: 16 * rows @ values[e].T)
    expected += by_expert(low, counts, lambda rows, e: rows @ values[e].T + bias[e].double().numpy())
    expected *= tokens.double().numpy()[:, None]
    operand = (
        stack_experts([int4_operand(part, CPU) for part in weight])
        if own_form
        else packed_int4(weight.transpose(1, 2).contiguous())
    )
    given_scale = scale if dims == 3 else scale[:, 0].contiguous()
    for _ in range(2):  # the second call has the sums of the first
        y = call(
            x, operand, counts=counts, scale=bits(given_scale) if as_bits else given_scale, bias=bias,
            per_token_scale=tokens, output_dtype=NUMBERS[dtype],
        )  # fmt: skip
        close(y, expected, dtype, wide=2)


@pytest.mark.parametrize("name", ["gate_proj", "down_proj"])
@pytest.mark.parametrize("own_form", [False, True])
def test_experts_of_a_real_checkpoint_give_the_outputs_recorded_with_it(name, own_form):
    """ModelSlim W4A8 in groups of 64, its two scales merged; the file's own correction is rounded more coarsely."""
    folder = Path(__file__).parents[1] / "golden" / "tiny-qwen3-moe" / "modelslim-w4a8-dynamic-g64"
    prefix = f"model.layers.0.mlp.experts.0.{name}"
    with safe_open(next(folder.glob("*.safetensors")), "pt") as file:
        pairs, scale, second, correction = (
            file.get_tensor(f"{prefix}.{part}")
            for part in ("weight", "weight_scale", "weight_scale_second", "scale_bias")
        )
    recorded = np.load(folder / "linear.npz")
    x, y = torch.from_numpy(recorded[f"{prefix}.x"]), recorded[f"{prefix}.y_sim"]
    octets = pairs.numpy().astype(int)
    halves = (((octets & 15) ^ 8) - 8, octets >> 4)
    codes = torch.from_numpy(np.stack(halves, 1).reshape(-1, octets.shape[1]).astype(np.int8))
    merged = scale * second
    exact = 8 * (codes.double() * merged.double().repeat_interleave(64, 1)).sum(1).float()
    operand = (
        stack_experts([int4_operand(part, CPU) for part in (codes.flip(0), codes)])
        if own_form
        else torch.stack([packed_int4(part.t().contiguous()) for part in (codes.flip(0), codes)])
    )
    rows, tokens = ops.npu_dynamic_quant(x)
    for bias, tolerance in ((exact, 1e-6), (correction.sum(1), 2e-3)):
        product = call(
            rows, operand, counts=[0, len(x)], scale=bits(merged.t().contiguous()).repeat(2, 1, 1),
            bias=bias.repeat(2, 1), per_token_scale=tokens, output_dtype=ops.FLOAT32,
        )  # fmt: skip
        assert np.abs(product.numpy() - y).max() <= tolerance * np.abs(y).max()


def dequantized(codes, scale, offset, dtype):
    """[E, K, N] of codes [E, K, N], scale and offset [E, G, N]: both steps rounded to dtype."""

    def rows(parameter):
        return parameter.repeat_interleave(codes.shape[1] // parameter.shape[1], 1)

    values = codes.to(dtype) if offset is None else codes.to(dtype) + rows(offset.to(dtype))
    return values * rows(scale.to(dtype))


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("with_offset", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_weight_only_experts(dtype, width, groups, with_offset, biased):
    half = 1 << (width - 1)
    codes = integers(E, N, K, low=-half, high=half, seed=1).transpose(1, 2).contiguous()
    x, scale = normal(ROWS, K, dtype=dtype), positive(E, groups, N, dtype=dtype)
    offset = integers(E, groups, N, low=-4, high=5, seed=3).to(dtype) if with_offset else None
    bias = normal(E, N, seed=4) if biased else torch.zeros(E, N)
    values = dequantized(codes, scale, offset, dtype).double().numpy()
    expected = by_expert(x.double().numpy(), COUNTS, lambda rows, e: rows @ values[e] + bias[e].double().numpy())
    given_operands = {"antiquant_scale": scale if groups > 1 else scale[:, 0]}
    given_operands["antiquant_offset"] = [] if offset is None else [offset if groups > 1 else offset[:, 0]]
    if biased:
        given_operands["bias"] = bias
    close(call(x, packed_int4(codes) if width == 4 else codes, **given_operands), expected, dtype)
    own = stack_experts(
        [
            weight_operand(
                codes[e].t().contiguous(), bits=width, scale=scale[e].float(),
                offset=None if offset is None else offset[e].float(), dtype=dtype, device=CPU,
                values=lambda e=e: torch.from_numpy(values[e].T).float(),
            )
            for e in range(E)
        ]
    )  # fmt: skip
    # bf16: the kernel of the form rounds other things
    close(call(x, own, **given_operands), expected, dtype, wide=8)


@pytest.mark.parametrize("is_weight_only", [False, True])
def test_a_bias_is_added_before_the_only_rounding(is_weight_only):
    """Rounded first, the product would lose what the bias leaves of it."""
    x, bias = normal(ROWS, K, dtype=torch.bfloat16), normal(E, N, seed=2) * 0.1
    codes = integers(E, K, N, seed=1)
    weight = codes.bfloat16()
    given_operands = {"antiquant_scale": torch.ones(E, N).bfloat16()} if is_weight_only else {}
    y = call(x, codes if is_weight_only else weight, bias=bias, **given_operands)
    w, b = weight.double().numpy(), bias.double().numpy()
    expected = torch.from_numpy(by_expert(x.double().numpy(), COUNTS, lambda rows, e: rows @ w[e] + b[e]))
    assert (y != expected.bfloat16()).float().mean() < 0.01


E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def mx_values(codes, scale):
    """Float64 values of codes and byte pairs, by the definitions of the formats."""
    if codes.dtype is torch.uint8:
        octets = codes.numpy()
        values = E2M1[np.stack([octets & 15, octets >> 4], -1).reshape(*octets.shape[:-1], -1)]
    else:
        values = codes.float().double().numpy()
    powers = 2.0 ** (scale.numpy().astype(int).reshape(*scale.shape[:-2], -1) - 127)
    return values * np.repeat(powers, 32, -1)[..., : values.shape[-1]]


@pytest.mark.parametrize("dtype", NUMBERS)
@pytest.mark.parametrize(("activations", "weights"), [("e4m3", "e4m3"), ("e2m1", "e2m1"), ("e4m3", "e2m1")])
@pytest.mark.parametrize("own_form", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("k", [64, 96])
def test_mx_experts(dtype, activations, weights, own_form, biased, k):
    target = {"e4m3": ops.FLOAT8_E4M3FN, "e2m1": ops.FLOAT4_E2M1FN_X2}
    x, x_scale = ops.npu_dynamic_mx_quant(normal(ROWS, k), dst_type=target[activations])
    codes, scale = ops.npu_dynamic_mx_quant(normal(E, N, k, seed=1), dst_type=target[weights])
    bias = normal(E, N, seed=2) if biased else torch.zeros(E, N)
    if own_form:
        form_dtype = torch.bfloat16
        operand = stack_experts([mx_operand(codes[e], scale[e], weights, form_dtype, CPU) for e in range(E)])
        assert held_bytes(operand) == 2 * E * N * k
    else:
        operand = codes.transpose(1, 2)
    assert operand.shape == (E, k // (2 if weights == "e2m1" else 1), N)
    is_mixed = activations != weights
    given_scale = {"antiquant_scale" if is_mixed else "scale": scale.transpose(1, 2)}
    y = call(
        x, operand, per_token_scale=x_scale, output_dtype=NUMBERS[dtype],
        x_dtype=target[activations] if activations == "e2m1" or is_mixed else None,
        weight_dtype=target[weights] if weights == "e2m1" else None,
        scale_dtype=None if is_mixed else ops.FLOAT8_E8M0FNU, per_token_scale_dtype=ops.FLOAT8_E8M0FNU,
        **given_scale, **({"bias": bias} if biased else {}),
    )  # fmt: skip
    w = mx_values(codes, scale)
    expected = by_expert(
        mx_values(x, x_scale), COUNTS, lambda rows, e: rows @ w[e].T + biased * bias[e].double().numpy()
    )
    close(y, expected, dtype)


def test_operands_that_lack_a_scale_or_a_bias_are_refused():
    x, weight = integers(8, K), packed_int4(integers(E, K, N, low=-8, high=8))
    with pytest.raises(ValueError, match="needs a scale"):
        call(x, integers(E, K, N), output_dtype=ops.BFLOAT16)
    with pytest.raises(ValueError, match="needs a bias"):
        call(x, weight, scale=positive(E, 1, N), per_token_scale=positive(8), output_dtype=ops.BFLOAT16)
    with pytest.raises(ValueError, match="needs scales of both"):
        call(normal(8, K).to(torch.float8_e4m3fn), normal(E, K, N).to(torch.float8_e4m3fn), output_dtype=6)
    with pytest.raises(ValueError, match="296"):
        call(x.view(torch.uint8), weight, scale=positive(E, N), per_token_scale=positive(8), output_dtype=6)
    with pytest.raises(ValueError, match="output_dtype"):
        call(x, integers(E, K, N), scale=positive(E, N))
    with pytest.raises(ValueError, match="e8m0"):
        call(x, integers(E, K, N), scale=positive(E, N), output_dtype=ops.BFLOAT16, scale_dtype=ops.FLOAT32)


def naive_mlp(x, chosen, weights, gate_up, down):
    """Token by token, choice by choice, float64. gate_up [E, 2I, H], down [E, H, I]."""
    y = np.zeros(x.shape)
    for i, row in enumerate(x):
        for e, weight in zip(chosen[i], weights[i], strict=True):
            gate, up = np.split(gate_up[e] @ row, 2)
            y[i] += weight * (down[e] @ (gate / (1 + np.exp(-gate)) * up))
    return y


def first_version(x, chosen, weights, mlp):
    tokens, k = chosen.shape
    order = torch.arange(tokens * k, dtype=torch.int32).view(k, tokens).t().contiguous()
    rows, places, experts = ops.npu_moe_init_routing(x, order, chosen, tokens)
    ends = ops.npu_moe_compute_expert_tokens(experts, E).long()
    return ops.npu_moe_finalize_routing(mlp(rows, ends, 0), None, None, None, weights, places, chosen)


def second_version(x, chosen, weights, mlp):
    rows, places, counts, _ = ops.npu_moe_init_routing_v2(
        x, chosen, active_num=chosen.numel(), expert_num=E, expert_tokens_num_type=1, expert_tokens_num_flag=True,
        active_expert_range=[0, E],
    )  # fmt: skip
    return ops.npu_moe_token_unpermute(mlp(rows, counts, 1), places.abs(), weights)


@given(st.sampled_from([first_version, second_version]), st.integers(1, 9), st.integers(1, 3), st.booleans(),
       st.integers(0, 2**31 - 1))  # fmt: skip
def test_expert_mlps_of_both_conventions(version, tokens, k, few, seed):
    x, weights = normal(tokens, 16, seed=seed), torch.rand(tokens, k, generator=generator(seed + 1))
    available = k if few else E
    chosen = torch.stack([torch.randperm(available, generator=generator(seed + i))[:k] for i in range(tokens)]).int()
    gate_up, down = normal(E, 2 * 24, 16, seed=seed + 2), normal(E, 16, 24, seed=seed + 3)

    def mlp(rows, numbers, kind):
        options = {"group_list": numbers, "group_list_type": kind, "split_item": 2, "group_type": 0}
        (hidden,) = ops.npu_grouped_matmul([rows], [gate_up.transpose(1, 2)], **options)
        return ops.npu_grouped_matmul([ops.npu_swiglu(hidden)], [down.transpose(1, 2)], **options)[0]

    y = version(x, chosen, weights, mlp)
    expected = naive_mlp(*(t.double().numpy() for t in (x,)), chosen.numpy(), weights.double().numpy(),
                         gate_up.double().numpy(), down.double().numpy())  # fmt: skip
    close(y, expected, torch.float32, wide=4)
