"""Routers and routing: literal loops in float64, the routers of transformers, and round trips."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from framework import ops

SEEDS = st.integers(0, 2**31 - 1)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def generator(seed):
    return torch.Generator().manual_seed(seed)


def column_order(tokens, k):
    return torch.tensor([[j * tokens + i for j in range(k)] for i in range(tokens)], dtype=torch.int32)


def best(values, k, allowed=None):
    """The places of the k largest, the lower place first among equals, by repeated scans."""
    left = list(range(len(values))) if allowed is None else list(allowed)
    found = []
    for _ in range(k):
        place = left[0]
        for candidate in left:
            if values[candidate] > values[place]:
                place = candidate
        found.append(place)
        left.remove(place)
    return found


def softmax(row):
    powers = [np.exp(value - max(row)) for value in row]
    return [power / sum(powers) for power in powers]


def literal_gate(row, k, bias, groups, kept, best_of, sigmoid, scaling, eps=1e-20):
    """One token's choice, step by step. Returns experts and float64 weights."""
    p = [1 / (1 + np.exp(-value)) for value in row] if sigmoid else softmax(row)
    choice = [value + extra for value, extra in zip(p, bias, strict=True)]
    size = len(row) // groups
    scores = [sum(sorted(choice[g * size : (g + 1) * size])[-best_of:]) for g in range(groups)]
    allowed = [g * size + member for g in sorted(best(scores, kept)) for member in range(size)]
    experts = best(choice, k, allowed)
    weights = [p[expert] for expert in experts]
    if sigmoid:
        total = sum(weights) + eps
        weights = [weight / total for weight in weights]
    return experts, [weight * scaling for weight in weights]


@pytest.mark.parametrize("dtype", DTYPES)
def test_softmax_gating_takes_the_largest_probabilities(dtype):
    scores = torch.randn(7, 24, generator=generator(0)).to(dtype)
    weights, experts, row_index = ops.npu_moe_gating_top_k_softmax(scores, k=5)
    for i, row in enumerate(scores.double().numpy()):
        expected = softmax(row)
        assert experts[i].tolist() == best(expected, 5)
        torch.testing.assert_close(
            weights[i].double(),
            torch.tensor([expected[e] for e in experts[i]], dtype=torch.float64),
            rtol=2 * torch.finfo(dtype).eps,
            atol=0,
        )
    assert weights.dtype is dtype and experts.dtype is torch.int32
    assert torch.equal(row_index, column_order(7, 5))


@given(st.integers(1, 4), st.sampled_from([4, 16, 130]), SEEDS)
def test_equal_scores_are_chosen_in_the_order_of_experts(tokens, experts, seed):
    scores = torch.randint(0, 3, (tokens, experts), generator=generator(seed)).float()
    k = min(experts, 8)
    for chosen in (
        ops.npu_moe_gating_top_k_softmax(scores, k=k)[1],
        ops.npu_moe_gating_top_k(scores, k, norm_type=1)[1],
        ops.npu_moe_gating_top_k(scores - scores, k, bias=scores[0])[1][:1],
    ):
        for i, row in enumerate(chosen.tolist()):
            assert row == best(scores[i].tolist(), k)


@given(
    st.integers(1, 5),
    st.sampled_from([(1, 1), (4, 1), (4, 2), (4, 4), (8, 3)]),
    st.sampled_from([0, 1]),
    st.booleans(),
    st.booleans(),
    SEEDS,
)
def test_biased_and_grouped_gating_follows_its_steps(tokens, groups, mode, sigmoid, biased, seed):
    count, kept = groups
    scores = torch.randn(tokens, 16 if count < 8 else 32, generator=generator(seed))
    bias = torch.randn(scores.shape[1], generator=generator(seed + 1)) if biased else torch.zeros(scores.shape[1])
    weights, experts, p = ops.npu_moe_gating_top_k(
        scores,
        4,
        bias=bias if biased else None,
        group_count=count,
        k_group=kept,
        group_select_mode=mode,
        norm_type=int(sigmoid),
        routed_scaling_factor=2.5,
        out_flag=True,
    )
    for i, row in enumerate(scores.double().tolist()):
        expected, values = literal_gate(row, 4, bias.double().tolist(), count, kept, 1 + mode, sigmoid, 2.5)
        assert experts[i].tolist() == expected
        torch.testing.assert_close(weights[i].double(), torch.tensor(values, dtype=torch.float64), rtol=1e-5, atol=0)
    torch.testing.assert_close(p, scores.sigmoid() if sigmoid else scores.softmax(-1))


def test_sigmoids_that_are_all_zero_give_weights_of_zero():
    """The division's eps is what is left below the line."""
    weights, experts, _ = ops.npu_moe_gating_top_k(torch.full((1, 8), -200.0), 2, norm_type=1)
    assert weights.tolist() == [[0.0, 0.0]] and experts.tolist() == [[0, 1]]
    weights, _, _ = ops.npu_moe_gating_top_k(torch.zeros(1, 8), 2, norm_type=1, eps=1.0)
    assert weights.tolist() == [[0.25, 0.25]]


def test_what_gating_does_not_offer_is_refused():
    scores = torch.zeros(2, 4)
    for options in ({"renorm": 1}, {"norm_type": 2}, {"input_ids": torch.zeros(2)}):
        with pytest.raises(NotImplementedError):
            ops.npu_moe_gating_top_k(scores, 1, **options)
    with pytest.raises(ValueError, match="group_select_mode"):
        ops.npu_moe_gating_top_k(scores, 1, group_select_mode=2)
    with pytest.raises(NotImplementedError, match="finished"):
        ops.npu_moe_gating_top_k_softmax(scores, torch.zeros(2, dtype=torch.bool))


CONFIG = dict(
    num_experts=16, num_local_experts=16, n_routed_experts=16, num_experts_per_tok=4, hidden_size=32,
    norm_topk_prob=True, routed_scaling_factor=2.5, n_group=4, num_group=4, topk_group=2,
    topk_method="group_limited_greedy",
)  # fmt: skip


def softmax_renormalized(scores):
    weights, experts, _ = ops.npu_moe_gating_top_k_softmax(scores, k=4)
    return weights / weights.sum(-1, keepdim=True), experts


def deepseek_v2(scores):
    options = dict(group_count=4, k_group=2, group_select_mode=0, norm_type=0, routed_scaling_factor=2.5)
    return ops.npu_moe_gating_top_k(scores, 4, **options)[:2]


def deepseek_v3(scores, bias):
    options = dict(group_count=4, k_group=2, group_select_mode=1, norm_type=1, routed_scaling_factor=2.5)
    return ops.npu_moe_gating_top_k(scores, 4, bias=bias, **options)[:2]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("router_class", [Qwen3MoeTopKRouter, MixtralTopKRouter, DeepseekV2TopkRouter,
                                          DeepseekV3TopkRouter])  # fmt: skip
def test_the_operators_choose_what_transformers_routers_choose(router_class, seed):
    router = router_class(SimpleNamespace(**CONFIG))
    torch.nn.init.normal_(router.weight, generator=generator(seed))
    hidden = torch.randn(1, 50, 32, generator=generator(seed + 10))
    with torch.no_grad():
        if router_class is DeepseekV3TopkRouter:
            router.e_score_correction_bias.normal_(std=0.1, generator=generator(seed + 20))
        scores, weights, experts = router(hidden)
        if router_class is DeepseekV3TopkRouter:
            mine = deepseek_v3(scores, router.e_score_correction_bias)
        else:
            mine = (deepseek_v2 if router_class is DeepseekV2TopkRouter else softmax_renormalized)(scores)
    # transformers leaves the order of the chosen ones open
    expected = torch.zeros(50, 16).scatter_(1, experts, weights)
    assert torch.equal(mine[1].long().sort(1).values, experts.sort(1).values)
    torch.testing.assert_close(torch.zeros(50, 16).scatter_(1, mine[1].long(), mine[0]), expected, rtol=1e-5, atol=0)


@st.composite
def choices(draw):
    """Experts of every token, distinct within one, from one token up to all to one expert."""
    tokens, experts = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    k = draw(st.integers(1, min(experts, 4)))
    few = draw(st.integers(k, experts))
    rng = np.random.default_rng(draw(SEEDS))
    chosen = np.stack([rng.permutation(few)[:k] for _ in range(tokens)])
    return torch.from_numpy(chosen.astype(np.int32)), experts


def sorted_choices(chosen):
    """(expert, token, choice) of all choices, sorted by expert, tokens and choices in order."""
    listed = [(int(e), i, j) for i, row in enumerate(chosen) for j, e in enumerate(row)]
    return sorted(listed, key=lambda entry: entry[0])


def test_the_vectors_of_the_specification():
    chosen = torch.tensor([[2, 0], [1, 2], [0, 3]], dtype=torch.int32)
    x = torch.arange(3.0)[:, None].expand(3, 8).contiguous()
    options = {"expert_num": 4, "expert_tokens_num_type": 1, "expert_tokens_num_flag": True}
    rows, places, counts, _ = ops.npu_moe_init_routing_v2(x, chosen, **options)
    assert rows[:, 0].tolist() == [0, 2, 1, 0, 1, 2]
    assert places.tolist() == [3, 0, 2, 4, 1, 5] and counts.tolist() == [2, 1, 2, 1]
    rows, places, counts, _ = ops.npu_moe_init_routing_v2(x, chosen, active_expert_range=[1, 3], **options)
    assert rows[:, 0].tolist() == [1, 0, 1, 0, 0, 0]
    assert places.tolist() == [1, -1, 0, 2, -1, -1] and counts.tolist() == [1, 2]
    _, places, _, _ = ops.npu_moe_init_routing_v2(x, chosen, active_expert_range=[1, 3], row_idx_type=1, **options)
    assert places.tolist() == [2, 0, 3, -1, -1, -1]


@given(choices(), st.sampled_from([0, 1, 2]), st.data())
def test_v2_sorts_rows_by_expert_within_any_range(case, kind, data):
    chosen, experts = case
    tokens, k = chosen.shape
    first = data.draw(st.integers(0, experts - 1))
    end = data.draw(st.integers(first + 1, experts))
    x = torch.arange(1.0, tokens + 1)[:, None].expand(tokens, 3).contiguous()
    rows, places, numbers, _ = ops.npu_moe_init_routing_v2(
        x, chosen, expert_num=experts, expert_tokens_num_type=kind, active_expert_range=[first, end]
    )
    expected = [entry for entry in sorted_choices(chosen) if first <= entry[0] < end]
    assert rows[:, 0].tolist() == [i + 1 for _, i, _ in expected] + [0] * (tokens * k - len(expected))
    for i in range(tokens):
        for j in range(k):
            inside = first <= chosen[i, j] < end
            assert places[i * k + j] == (expected.index((int(chosen[i, j]), i, j)) if inside else -1)
    counts = [sum(e == expert for expert, _, _ in expected) for e in range(first, end)]
    used = [[first + e, count] for e, count in enumerate(counts) if count]
    pairs = used + [[0, 0]] * (len(counts) - len(used))
    assert numbers.tolist() == [np.cumsum(counts).tolist(), counts, pairs][kind]


def rounded(terms):
    """Most relative error of a sum of products of one sign in fp32: each product and each sum is rounded once."""
    return (terms + 1) * 2.0**-24


@given(choices(), SEEDS)
def test_v2_and_unpermute_make_the_weighted_sum_of_a_token(case, seed):
    chosen, experts = case
    x = torch.randn(chosen.shape[0], 16, generator=generator(seed))
    weights = torch.rand(chosen.shape, generator=generator(seed + 1))
    rows, places, _, _ = ops.npu_moe_init_routing_v2(x, chosen, expert_num=experts)
    expected = x.double() * weights.double().sum(1, keepdim=True)
    found = ops.npu_moe_token_unpermute(rows, places, weights).double()
    torch.testing.assert_close(found, expected, rtol=rounded(chosen.shape[1]), atol=0.0)
    assert torch.equal(
        ops.npu_moe_token_unpermute(rows, places),
        x.repeat_interleave(chosen.shape[1], 0),
    )


@given(choices(), SEEDS)
def test_v1_and_finalize_make_the_same_sum_by_columns(case, seed):
    chosen, _ = case
    tokens, k = chosen.shape
    x = torch.randn(tokens, 16, generator=generator(seed))
    weights = torch.rand(chosen.shape, generator=generator(seed + 1))
    rows, places, experts = ops.npu_moe_init_routing(x, column_order(tokens, k), chosen, tokens)
    listed = sorted_choices(chosen)
    assert experts.tolist() == [e for e, _, _ in listed]
    assert torch.equal(rows, x[[i for _, i, _ in listed]])
    for position, (_, i, j) in enumerate(listed):
        assert places[j * tokens + i] == position
    y = ops.npu_moe_finalize_routing(rows, None, None, None, weights, places, chosen)
    expected = x.double() * weights.double().sum(1, keepdim=True)
    torch.testing.assert_close(y.double(), expected, rtol=rounded(k), atol=0.0)


@given(choices())
def test_expert_tokens_are_the_ends_of_the_experts_rows(case):
    chosen, experts = case
    listed = chosen.flatten().sort().values
    ends = ops.npu_moe_compute_expert_tokens(listed, experts)
    assert ends.dtype is torch.int32
    assert ends.tolist() == [int((listed <= e).sum()) for e in range(experts)]


@pytest.mark.parametrize("mode", [0, 1, 2, 3])
def test_finalize_adds_biases_and_skips_and_leaves_out_dropped_rows(mode):
    tokens, k, experts, h = 3, 2, 4, 5
    made = generator(mode)
    rows = torch.randn(experts, 2, h, generator=made)
    places = torch.tensor([4, -1, 0, 7, 2, 5], dtype=torch.int32)
    chosen = torch.tensor([[2, 0], [1, 3], [0, 2]], dtype=torch.int32)
    bias, scales = torch.randn(experts, h, generator=made), torch.rand(tokens, k, generator=made)
    skips = torch.randn(2, tokens, h, generator=made)
    given_rows = rows if mode in (1, 3) else rows.flatten(0, 1)
    y = ops.npu_moe_finalize_routing(given_rows, *skips, bias, scales, places, chosen, drop_pad_mode=mode)
    for i in range(tokens):
        expected = skips[0, i].double() + skips[1, i].double()
        for j in range(k):
            place = places[j * tokens + i] if mode < 2 else places[i * k + j]
            if place >= 0:
                row = rows.flatten(0, 1)[place].double() + bias[chosen[i, j]].double()
                expected = expected + scales[i, j].double() * row
        torch.testing.assert_close(y[i].double(), expected)


def test_many_rows_are_summed_in_parts():
    """More than the kernel gathers at a time."""
    x = torch.randn(400, 256, generator=generator(0)).bfloat16()
    chosen = torch.stack([torch.randperm(8, generator=generator(i))[:4] for i in range(400)]).int()
    weights = torch.rand(400, 4, generator=generator(1)).bfloat16()
    rows, places, _, _ = ops.npu_moe_init_routing_v2(x, chosen, expert_num=8)
    y = ops.npu_moe_token_unpermute(rows, places, weights)
    expected = x.double() * weights.double().sum(1, keepdim=True)
    torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-6)


def test_active_rows_are_the_first_ones():
    x = torch.randn(6, 8, generator=generator(0))
    chosen = torch.tensor([[1, 0], [2, 1], [0, 2], [1, 2], [0, 1], [2, 0]], dtype=torch.int32)
    rows, places, _, _ = ops.npu_moe_init_routing_v2(x, chosen, expert_num=3)
    some, same_places, _, scales = ops.npu_moe_init_routing_v2(x, chosen, expert_num=3, active_num=5)
    assert torch.equal(some, rows[:5]) and torch.equal(places, same_places) and scales.shape == (5,)
    some, _, experts = ops.npu_moe_init_routing(x, column_order(6, 2), chosen, 2)
    assert torch.equal(some, rows[:4]) and len(experts) == 12


X = torch.randn(5, 96, generator=generator(7))
CHOSEN = torch.tensor([[3, 1], [0, 1], [2, 3], [1, 0], [3, 2]], dtype=torch.int32)
ORDER = [(e, i) for e, i, _ in sorted_choices(CHOSEN)]


def route(**options):
    return ops.npu_moe_init_routing_v2(X, CHOSEN, expert_num=4, expert_tokens_num_type=1, **options)


def test_scales_of_rows_quantized_before_are_carried_along():
    codes, scale = ops.npu_dynamic_quant(X)
    rows, _, _, scales = ops.npu_moe_init_routing_v2(codes, CHOSEN, scale=scale, expert_num=4)
    assert torch.equal(rows, codes[[i for _, i in ORDER]])
    assert torch.equal(scales, scale[[i for _, i in ORDER]])


@pytest.mark.parametrize("smooth", [None, torch.rand(1, 96) + 0.5, torch.rand(4, 96) + 0.5])
def test_dynamic_rows_have_their_largest_magnitude_as_127(smooth):
    rows, _, _, scales = route(quant_mode=1, scale=smooth)
    for position, (expert, i) in enumerate(ORDER):
        factors = 1.0 if smooth is None else smooth[expert if len(smooth) > 1 else 0].numpy()
        values = X[i].numpy() * np.float32(factors)
        scale = np.abs(values).max() / np.float32(127)
        np.testing.assert_allclose(scales[position], scale, rtol=1e-6)
        assert np.abs(rows[position].numpy() - np.rint(values / scale)).max() <= 1
        assert int(rows[position].abs().max()) == 127


def test_smoothing_factors_of_a_range_are_those_of_its_experts():
    smooth = torch.rand(4, 96) + 0.5
    whole = route(quant_mode=1, scale=smooth)
    part = route(quant_mode=1, scale=smooth[1:3], active_expert_range=[1, 3])
    before, inside = int(whole[2][0]), int(whole[2][1:3].sum())
    assert torch.equal(part[0][:inside], whole[0][before : before + inside])
    assert torch.equal(part[3][:inside], whole[3][before : before + inside])
    assert not part[0][inside:].any() and not part[3][inside:].any()


def test_static_rows_are_multiplied_and_shifted():
    rows, _, _, _ = route(quant_mode=0, scale=torch.tensor([20.0]), offset=torch.tensor([3.0]))
    expected = np.clip(np.rint(X[[i for _, i in ORDER]].numpy() * np.float32(20) + np.float32(3)), -128, 127)
    assert np.array_equal(rows.numpy(), expected.astype(np.int8))


@pytest.mark.parametrize(("mode", "dtype"), [(2, torch.float8_e5m2), (3, torch.float8_e4m3fn)])
def test_mx_rows_are_those_of_the_quantizing_operator(mode, dtype):
    codes, pairs = ops.npu_dynamic_mx_quant(X, dst_type={2: 291, 3: 292}[mode])
    rows, _, _, scales = route(quant_mode=mode)
    taken = [i for _, i in ORDER]
    assert rows.dtype is dtype and scales.dtype is torch.float8_e8m0fnu and scales.shape == (10, 4)
    assert torch.equal(rows.view(torch.uint8), codes.view(torch.uint8)[taken])
    assert torch.equal(scales.view(torch.uint8), pairs.flatten(1)[taken])
    part = route(quant_mode=mode, active_expert_range=[0, 2])
    assert not part[0][int(part[2].sum()) :].view(torch.uint8).any()


def test_what_routing_does_not_offer_is_refused():
    for options in ({"quant_mode": 9}, {"drop_pad_mode": 1}, {"x_dtype": 296}):
        with pytest.raises(NotImplementedError, match="npu_moe_init_routing_v2"):
            route(**options)
    with pytest.raises(ValueError, match="needs a scale"):
        route(quant_mode=0)
    with pytest.raises(ValueError, match="expert_tokens_num_type"):
        ops.npu_moe_init_routing_v2(X, CHOSEN, expert_num=4, expert_tokens_num_type=3)
    with pytest.raises(NotImplementedError, match="padded_mode"):
        ops.npu_moe_token_unpermute(X, CHOSEN.flatten(), padded_mode=True)
