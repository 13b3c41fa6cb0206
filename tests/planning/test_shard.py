"""Tensor parallelism cuts every weight exactly once, for every size that is accepted."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from framework.errors import Problem
from framework.families.base import DecoderSpec, Rope, modules
from framework.geometry import HeadShare, Kind, Split
from framework.planning.shard import cut, deal, deal_heads, place


def spec(**changes):
    given = dict(
        architecture="LlamaForCausalLM", family="llama", layers=1, hidden=576, intermediate=1536, heads=9, kv_heads=3,
        head_dim=64, vocab=49152, norm_eps=1e-5, context=128, rope=Rope(), windows=(None,),
    )  # fmt: skip
    return DecoderSpec(**(given | changes))


def test_nine_query_and_three_kv_heads_are_dealt_two_to_one_over_two_ranks():
    assert deal_heads(9, 3, 2) == [HeadShare(0, 6, 0, 2), HeadShare(6, 9, 2, 3)]


def test_four_ranks_over_three_kv_heads_hold_copies_and_two_one_three_three_query_heads():
    shares = deal_heads(9, 3, 4)
    assert [s.q1 - s.q0 for s in shares] == [2, 1, 3, 3]
    assert [(s.kv0, s.kv1) for s in shares] == [(0, 1), (0, 1), (1, 2), (2, 3)]


@given(kv_heads=st.integers(1, 9), group=st.integers(1, 8), data=st.data())
def test_every_query_head_is_dealt_once_and_meets_its_own_kv_head(kv_heads, group, data):
    heads = kv_heads * group
    ranks = data.draw(st.integers(1, heads))
    shares = deal_heads(heads, kv_heads, ranks)
    assert len(shares) == ranks
    assert [h for s in shares for h in range(s.q0, s.q1)] == list(range(heads))
    for s in shares:
        assert s.q1 > s.q0
        assert {h // group for h in range(s.q0, s.q1)} == set(range(s.kv0, s.kv1))
        # a rank attends with a whole number of queries per KV head it holds
        assert (s.q1 - s.q0) % (s.kv1 - s.kv0) == 0


@given(count=st.integers(0, 1000), ranks=st.integers(1, 64))
def test_dealing_is_even_to_one_and_complete(count, ranks):
    pieces = deal(count, ranks)
    assert pieces[0][0] == 0 and pieces[-1][1] == count
    assert all(a[1] == b[0] for a, b in pairwise(pieces))
    sizes = [b - a for a, b in pieces]
    assert max(sizes) - min(sizes) <= 1


@given(
    kv_heads=st.integers(1, 4),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([16, 32, 64, 80]),
    intermediate=st.integers(8, 40).map(lambda n: 16 * n),
    vocab=st.integers(40, 300),
    grain=st.sampled_from([1, 32]),
    data=st.data(),
)
def test_shards_tile_every_weight_exactly_once(kv_heads, group, head_dim, intermediate, vocab, grain, data):
    heads = kv_heads * group
    tp_size = data.draw(st.integers(1, heads))
    model = spec(heads=heads, kv_heads=kv_heads, head_dim=head_dim, intermediate=intermediate, vocab=vocab, hidden=64)
    all_modules = list(modules(model))
    grains = {m.name: (1, grain) for m in all_modules if m.kind is Kind.LINEAR}
    cuts = cut(all_modules, grains, tp_size, (heads, kv_heads))
    assert not isinstance(cuts, Problem)
    for module in all_modules:
        split, shards = place(module, cuts, grains.get(module.name, (1, 1)), tp_size)
        assert len(shards) == tp_size
        if split is Split.REPLICATED:
            assert all(rect == module.full for rect in shards)
            continue
        if module.axis == "kv_heads":
            shards = tuple(dict.fromkeys(shards))  # copied KV heads count once
        assert sum(rect.size for rect in shards) == module.shape[0] * module.shape[1]
        for rect in shards:
            assert rect.size > 0
            if split is Split.ROW:
                assert rect.k0 % grain == 0 and (rect.k1 % grain == 0 or rect.k1 == module.shape[1])


def test_modules_of_one_axis_are_cut_at_the_same_places():
    model = spec()
    all_modules = list(modules(model))
    grains = {m.name: (1, 32) for m in all_modules}
    cuts = cut(all_modules, grains, 5, (9, 3))
    placed = {m.name: place(m, cuts, (1, 32), 5)[1] for m in all_modules}
    gate = [(r.n0, r.n1) for r in placed["model.layers.0.mlp.gate_proj"]]
    assert gate == [(r.k0, r.k1) for r in placed["model.layers.0.mlp.down_proj"]]
    assert gate == [(0, 320), (320, 640), (640, 960), (960, 1248), (1248, 1536)]


@pytest.mark.parametrize("tp_size", [10, 64])
def test_more_ranks_than_query_heads_are_refused_with_the_largest_size(tp_size):
    problem = cut(list(modules(spec())), {}, tp_size, (9, 3))
    assert problem.code == "tp-heads"
    assert "parallel.tp_size=9" in problem.fix


def test_a_cut_that_would_split_a_quantization_group_keeps_rows_and_gathers():
    # head size 16: a rank's 48 columns of o_proj are no multiple of 32
    model = spec(head_dim=16, hidden=144)
    all_modules = list(modules(model))
    grains = {m.name: (1, 32) for m in all_modules}
    cuts = cut(all_modules, grains, 3, (9, 3))
    o_proj = next(m for m in all_modules if m.name.endswith("o_proj"))
    split, shards = place(o_proj, cuts, (1, 32), 3)
    assert split is Split.ROWS_GATHER
    assert [(r.k0, r.k1) for r in shards] == [(0, 144)] * 3
    assert sum(r.n1 - r.n0 for r in shards) == 144
