import math
from types import SimpleNamespace

import pytest
import torch

from framework import ops
from framework.layers.attention import Window
from framework.ops.cpu import paged as paged_kernel

MASK = torch.ones(2048, 2048, dtype=torch.bool).triu_(1)


def attention_by_definition(query, keys, values, scale, sees):
    """query [L, N, D], keys and values [S, KV, D]; row i of the query sees key j when sees(i, j)."""
    rows, heads, _ = query.shape
    group = heads // keys.shape[1]
    output = torch.zeros(rows, heads, values.shape[2], dtype=torch.float64)
    lse = torch.full((rows, heads), -math.inf, dtype=torch.float64)
    query, keys, values = query.double(), keys.double(), values.double()
    for i in range(rows):
        seen = [j for j in range(keys.shape[0]) if sees(i, j)]
        for head in range(heads):
            scores = [scale * float(query[i, head] @ keys[j, head // group]) for j in seen]
            if not scores:
                continue
            total = sum(math.exp(score - max(scores)) for score in scores)
            lse[i, head] = max(scores) + math.log(total)
            for j, score in zip(seen, scores, strict=True):
                output[i, head] += math.exp(score - max(scores)) / total * values[j, head // group]
    return output, lse


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Paged:
    """Sequences of given lengths in a cache of small pages, their pages dealt in the given order."""

    def __init__(self, lengths, *, kv_heads=2, size=8, block_size=4, scattered=True, dtype=torch.float32, past=99.0):
        needed = [-(-length // block_size) for length in lengths]
        order = list(range(sum(needed) + 2))
        if scattered:
            order = order[1::2] + order[0::2]
        self.caches = tuple(torch.full((len(order), block_size, kv_heads, size), past, dtype=dtype) for _ in range(2))
        self.table = torch.full((len(lengths), max([*needed, 1])), -1, dtype=torch.int32)
        self.sequences = []
        taken = 0
        for index, length in enumerate(lengths):
            pages = order[taken : taken + needed[index]]
            taken += needed[index]
            self.table[index, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
            rows = [random(length, kv_heads, size, seed=10 * index + i).to(dtype) for i in range(2)]
            slots = torch.tensor([pages[i // block_size] * block_size + i % block_size for i in range(length)])
            ops._npu_reshape_and_cache(*rows, *self.caches, slots.int())
            self.sequences.append(rows)
        self.lengths = torch.tensor(lengths, dtype=torch.int32)
        self.block_size = block_size


def scatter(key, value, keys, values, slots):
    ops.npu_scatter_pa_kv_cache(key, value, keys, values, slots, cache_mode="Norm")


@pytest.mark.parametrize("write", [lambda *rows: ops._npu_reshape_and_cache(*rows), scatter], ids=["atb", "scatter"])
def test_rows_land_in_their_slots_and_negative_slots_are_skipped(write):
    key, value = random(4, 2, 3), random(4, 2, 5, seed=1)
    keys, values = torch.zeros(3, 4, 2, 3), torch.zeros(3, 4, 2, 5)
    write(key, value, keys, values, torch.tensor([5, -1, 0, 11], dtype=torch.int32))
    for row, (block, offset) in {0: (1, 1), 2: (0, 0), 3: (2, 3)}.items():
        assert torch.equal(keys[block, offset], key[row])
        assert torch.equal(values[block, offset], value[row])
    assert int((keys != 0).any(-1).any(-1).sum()) == 3


def test_a_tiled_cache_is_not_written_as_if_it_were_plain():
    rows, cache = random(1, 2, 3), torch.zeros(2, 4, 2, 3)
    with pytest.raises(NotImplementedError, match="Norm"):
        ops.npu_scatter_pa_kv_cache(rows, rows, cache, cache.clone(), torch.tensor([0]))


@pytest.mark.parametrize("slot", [6, -1])
def test_one_row_lands_in_its_slot_in_the_dtype_of_the_cache(slot):
    key, value = (random(1, 2, 3, seed=seed).bfloat16() for seed in (0, 1))
    keys, values = torch.zeros(2, 4, 2, 3), torch.zeros(2, 4, 2, 3)
    ops._npu_reshape_and_cache(key, value, keys, values, torch.tensor([slot], dtype=torch.int32))
    expected = torch.zeros(8, 2, 3)
    if slot >= 0:
        expected[slot] = key[0].float()
    assert torch.equal(keys.view(8, 2, 3), expected)


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("past", [99.0, math.nan, math.inf], ids=str)
@pytest.mark.parametrize(
    "lengths",
    [[1], [11], [3, 17, 8, 1], [7, 7, 7], [5, 6, 8, 7, 2, 3, 4], [9, 12, 3, 1, 1, 4], [1, 31, 30]],
    ids=str,
)
def test_paged_attention_reads_each_sequence_up_to_its_length(lengths, heads, scattered, past):
    paged = Paged(lengths, scattered=scattered, past=past)
    query = random(len(lengths), heads, 8, seed=99)
    out = torch.full_like(query, math.nan)
    ops._npu_paged_attention(query, *paged.caches, 2, heads, 0.3, paged.table, paged.lengths, out)
    for row, (keys, values) in enumerate(paged.sequences):
        expected, _ = attention_by_definition(query[row : row + 1], keys, values, 0.3, lambda i, j: True)
        torch.testing.assert_close(out[row : row + 1].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("lengths", [[5, 0], [0, 5, 6], [0]], ids=str)
def test_a_sequence_without_keys_yields_zeros(lengths):
    paged = Paged(lengths, scattered=False)
    out = torch.full((len(lengths), 2, 8), math.nan)
    ops._npu_paged_attention(random(len(lengths), 2, 8), *paged.caches, 2, 2, 1.0, paged.table, paged.lengths, out)
    for row, length in enumerate(lengths):
        assert bool((out[row] == 0).all()) == (length == 0)


def test_values_may_have_another_size_than_keys():
    paged, wide = Paged([7, 7, 7], scattered=False), Paged([7, 7, 7], scattered=False, size=12)
    query, out = random(3, 2, 8, seed=3), torch.empty(3, 2, 12)
    caches = paged.caches[0], wide.caches[1]
    ops._npu_paged_attention(query, *caches, 2, 2, 0.3, paged.table, paged.lengths, out)
    for row in range(3):
        keys, values = paged.sequences[row][0], wide.sequences[row][1]
        expected, _ = attention_by_definition(query[row : row + 1], keys, values, 0.3, lambda i, j: True)
        torch.testing.assert_close(out[row : row + 1].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("firsts", "lengths", "expected"),
    [
        ([0, 2, 4, 6], [8, 5, 7, 6], [(0, 4)]),
        ([6, 4, 2, 0], [8, 5, 7, 6], [(0, 1), (1, 2), (2, 3), (3, 4)]),  # never backwards
        ([0, 1, 2, 4, 6, 8], [4, 3, 2, 8, 6, 7], [(0, 3), (3, 6)]),
        ([0, 2, 4], [8, 1, 1], [(0, 1), (1, 3)]),  # too much of it would be read for nothing
        ([0, 4, 8], [4, 4, 12], [(0, 2), (2, 3)]),  # would end behind the cache
    ],
)
def test_neighbours_at_equal_distances_are_one_product(firsts, lengths, expected):
    tables = tuple((first, first + 1, first + 2) for first in firsts)
    runs = paged_kernel._runs(tables, tuple(lengths), 10, 4, True)
    assert [(run.first, run.last) for run in runs] == expected


@pytest.mark.parametrize("cache_dtype", [torch.bfloat16, torch.float32])
def test_query_and_cache_may_differ_in_dtype(cache_dtype):
    paged = Paged([9, 6], dtype=cache_dtype)
    query = random(2, 4, 8, seed=5).bfloat16()
    out = torch.empty_like(query)
    ops._npu_paged_attention(query, *paged.caches, 2, 4, 0.5, paged.table, paged.lengths, out)
    for row, (keys, values) in enumerate(paged.sequences):
        expected, _ = attention_by_definition(query[row : row + 1], keys, values, 0.5, lambda i, j: True)
        torch.testing.assert_close(out[row : row + 1].double(), expected, rtol=2**-8, atol=1e-3)


def test_the_caches_of_all_layers_may_be_views_of_one_tensor():
    storage = torch.zeros(2, 3, 4, 2, 8)
    rows = random(6, 2, 8)
    keys, values = storage[1], storage[0]
    ops._npu_reshape_and_cache(rows, 2 * rows, keys, values, torch.arange(4, 10, dtype=torch.int32))
    query, out = random(1, 2, 8, seed=7), torch.empty(1, 2, 8)
    table, lengths = torch.tensor([[1, 2]], dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
    ops._npu_paged_attention(query, keys, values, 2, 2, 1.0, table, lengths, out)
    expected, _ = attention_by_definition(query, rows, 2 * rows, 1.0, lambda i, j: True)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


def paged_prefill(paged, query, ends, heads, **options):
    keys, values = (cache.flatten(2) for cache in paged.caches)
    return ops.npu_fused_infer_attention_score(
        query,
        keys,
        values,
        atten_mask=MASK,
        actual_seq_lengths=ends,
        actual_seq_lengths_kv=paged.lengths.tolist(),
        block_table=paged.table,
        num_heads=heads,
        num_key_value_heads=2,
        scale=0.4,
        input_layout="TND",
        block_size=paged.block_size,
        **options,
    )


# Query rows and context of each sequence: a whole prompt, a later chunk, one row, a chunk of a long prompt.
CHUNKS = ((7, 7), (5, 13), (1, 9), (4, 22))


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("heads", [2, 6])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 50])
def test_chunked_prefill_is_causal_from_the_bottom_right(window, heads, scattered):
    paged = Paged([context for _, context in CHUNKS], scattered=scattered)
    ends = torch.tensor([rows for rows, _ in CHUNKS]).cumsum(0).tolist()
    query = random(ends[-1], heads, 8, seed=50)
    options = {"sparse_mode": 3} if window is None else {"sparse_mode": 4, "pre_tokens": window - 1, "next_tokens": 0}
    output, lse = paged_prefill(paged, query, ends, heads, softmax_lse_flag=True, **options)
    without_lse, zeros = paged_prefill(paged, query, ends, heads, **options)
    assert torch.equal(output, without_lse)
    assert torch.equal(zeros, torch.zeros(1))
    assert lse.shape == (ends[-1], heads, 1)
    for index, (rows, context) in enumerate(CHUNKS):
        first = ends[index] - rows
        before = context if window is None else window - 1

        def sees(i, j, shift=context - rows, before=before):
            return i + shift - before <= j <= i + shift

        keys, values = paged.sequences[index]
        expected, expected_lse = attention_by_definition(query[first : first + rows], keys, values, 0.4, sees)
        torch.testing.assert_close(output[first : first + rows].double(), expected, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(lse[first : first + rows, :, 0].double(), expected_lse, rtol=1e-5, atol=1e-5)


def test_a_decode_row_is_the_same_by_both_operators():
    paged = Paged([9, 14, 3])
    query = random(3, 4, 8, seed=3)
    out = torch.empty_like(query)
    ops._npu_paged_attention(query, *paged.caches, 2, 4, 0.4, paged.table, paged.lengths, out)
    output, _ = paged_prefill(paged, query, [1, 2, 3], 4, sparse_mode=3)
    torch.testing.assert_close(output, out, rtol=1e-5, atol=1e-6)


def test_bf16_queries_give_bf16_outputs_of_fp32_arithmetic():
    paged = Paged([12])
    query = random(12, 4, 8, seed=3).bfloat16()
    output, _ = paged_prefill(paged, query, [12], 4, sparse_mode=3)
    keys, values = paged.sequences[0]
    expected, _ = attention_by_definition(query, keys, values, 0.4, lambda i, j: j <= i)
    assert output.dtype is torch.bfloat16
    torch.testing.assert_close(output.double(), expected, rtol=2**-8, atol=1e-5)


def as_layout(tensor, layout):
    """[B, S, N, D] in another layout."""
    return {"BSND": tensor, "BNSD": tensor.transpose(1, 2).contiguous(), "BSH": tensor.flatten(2)}[layout]


def from_layout(tensor, layout, heads):
    match layout:
        case "BNSD":
            return tensor.transpose(1, 2)
        case "BSH":
            return tensor.unflatten(2, (heads, -1))
    return tensor


@pytest.mark.parametrize("layout", ["BSND", "BNSD", "BSH"])
@pytest.mark.parametrize(
    ("options", "sees"),
    [
        ({}, lambda i, j, lengths: True),
        ({"sparse_mode": 3, "atten_mask": MASK}, lambda i, j, lengths: j <= i + lengths[1] - lengths[0]),
        ({"sparse_mode": 2, "atten_mask": MASK}, lambda i, j, lengths: j <= i),
    ],
)
def test_rectangular_layouts_stop_at_each_entrys_lengths(options, sees, layout):
    query, keys, values = random(2, 5, 4, 8), random(2, 9, 2, 8, seed=1), random(2, 9, 2, 8, seed=2)
    lengths = [(5, 9), (3, 6)]
    output, lse = ops.npu_fused_infer_attention_score(
        *(as_layout(tensor, layout) for tensor in (query, keys, values)),
        actual_seq_lengths=[rows for rows, _ in lengths],
        actual_seq_lengths_kv=[length for _, length in lengths],
        num_heads=4,
        num_key_value_heads=2,
        scale=0.7,
        input_layout=layout,
        softmax_lse_flag=True,
        **options,
    )
    assert output.shape == as_layout(query, layout).shape
    assert lse.shape == (2, 4, 5, 1)
    output = from_layout(output, layout, 4)
    for entry, (rows, length) in enumerate(lengths):
        expected, expected_lse = attention_by_definition(
            query[entry, :rows],
            keys[entry, :length],
            values[entry, :length],
            0.7,
            lambda i, j, own=(rows, length): sees(i, j, own),
        )
        torch.testing.assert_close(output[entry, :rows].double(), expected, rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(lse[entry, :, :rows, 0].T.double(), expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sparse_mode", [0, 1])
def test_a_given_mask_excludes_and_a_row_that_sees_nothing_is_zero(sparse_mode):
    query, keys, values = random(6, 2, 8), random(6, 2, 8, seed=1), random(6, 2, 8, seed=2)
    excluded = random(6, 6, seed=3) > 0.3
    excluded[2] = True
    output, _ = ops.npu_fused_infer_attention_score(
        query,
        keys,
        values,
        atten_mask=excluded,
        num_heads=2,
        scale=0.5,
        input_layout="TND",
        sparse_mode=sparse_mode,
    )
    expected, _ = attention_by_definition(query, keys, values, 0.5, lambda i, j: not excluded[i, j])
    assert torch.equal(output[2], torch.zeros(2, 8))
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=2e-6)


def test_sparse_mode_0_counts_its_band_from_the_top_left_and_joins_it_with_the_mask():
    query, keys, values = random(4, 2, 8), random(9, 2, 8, seed=1), random(9, 2, 8, seed=2)
    excluded = torch.zeros(4, 9, dtype=torch.int8)
    excluded[:, 3] = 1
    output, _ = ops.npu_fused_infer_attention_score(
        query[None],
        keys[None],
        values[None],
        atten_mask=excluded,
        num_heads=2,
        scale=0.5,
        input_layout="BSND",
        pre_tokens=1,
        next_tokens=2,
    )
    expected, _ = attention_by_definition(
        query, keys, values, 0.5, lambda i, j: i - 1 <= j <= i + 2 and not excluded[i, j]
    )
    torch.testing.assert_close(output[0].double(), expected, rtol=1e-5, atol=2e-6)


def test_keys_laid_end_to_end_have_cumulative_lengths():
    query, keys, values = random(5, 2, 8), random(11, 2, 8, seed=1), random(11, 2, 8, seed=2)
    output, _ = ops.npu_fused_infer_attention_score(
        query,
        keys,
        values,
        atten_mask=MASK,
        actual_seq_lengths=[2, 5],
        actual_seq_lengths_kv=[4, 11],
        num_heads=2,
        scale=0.5,
        input_layout="TND",
        sparse_mode=3,
    )
    first, _ = attention_by_definition(query[:2], keys[:4], values[:4], 0.5, lambda i, j: j <= i + 2)
    second, _ = attention_by_definition(query[2:], keys[4:], values[4:], 0.5, lambda i, j: j <= i + 4)
    torch.testing.assert_close(output.double(), torch.cat((first, second)), rtol=1e-5, atol=2e-6)


def test_pages_may_hold_the_heads_outside_the_rows():
    """[blocks, KV, block_size, D], the other paged layout of the operator."""
    paged = Paged([9])
    keys, values = (cache.transpose(1, 2).contiguous() for cache in paged.caches)
    query = random(3, 2, 8, seed=4)
    output, _ = ops.npu_fused_infer_attention_score(
        query,
        keys,
        values,
        atten_mask=MASK,
        actual_seq_lengths=[3],
        actual_seq_lengths_kv=[9],
        block_table=paged.table,
        num_heads=2,
        scale=0.5,
        input_layout="TND",
        sparse_mode=3,
        block_size=4,
    )
    expected, _ = attention_by_definition(query, *paged.sequences[0], 0.5, lambda i, j: j <= i + 6)
    torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=2e-6)


def test_a_causal_mode_without_its_mask_is_an_error():
    """Hardware would quietly attend to the future."""
    query = random(3, 2, 8)
    with pytest.raises(ValueError, match="2048 x 2048"):
        ops.npu_fused_infer_attention_score(query, query, query, num_heads=2, input_layout="TND", sparse_mode=3)


def test_arguments_without_a_cpu_kernel_are_refused_by_name():
    query = random(3, 2, 8)
    with pytest.raises(NotImplementedError, match="dequant_scale1"):
        ops.npu_fused_infer_attention_score(query, query, query, num_heads=2, input_layout="TND", dequant_scale1=query)
    with pytest.raises(NotImplementedError, match="SBH"):
        ops.npu_fused_infer_attention_score(query, query, query, num_heads=2, input_layout="SBH")


def test_rotated_features_of_latent_attention_are_further_features_of_queries_and_keys():
    tokens, heads, rank, rotated, scale = 7, 4, 16, 8, 0.2
    query, query_rope = random(tokens, heads, rank), random(tokens, heads, rotated)
    latent, key_rope = random(tokens, 1, rank), random(tokens, 1, rotated)
    blocks, mask = 2, torch.ones(2048, 2048, dtype=torch.bool).triu_(1)
    pages, rope_pages = torch.zeros(blocks, 128, rank), torch.zeros(blocks, 128, rotated)
    pages[1, :tokens], rope_pages[1, :tokens] = latent[:, 0], key_rope[:, 0]
    out = ops.npu_fused_infer_attention_score(
        query, pages, pages, query_rope=query_rope, key_rope=rope_pages, atten_mask=mask, actual_seq_lengths=[tokens],
        actual_seq_lengths_kv=[tokens], block_table=torch.tensor([[1]], dtype=torch.int32), num_heads=heads,
        num_key_value_heads=1, scale=scale, input_layout="TND", sparse_mode=3, block_size=128,
    )[0]  # fmt: skip
    # written out: scores of both kinds of features add, values are the latent
    scores = torch.einsum("thr,sr->hts", query.double(), latent[:, 0].double())
    scores += torch.einsum("thr,sr->hts", query_rope.double(), key_rope[:, 0].double())
    scores = (scores * scale).masked_fill(torch.ones(tokens, tokens, dtype=torch.bool).triu(1), float("-inf"))
    expected = torch.einsum("hts,sr->thr", scores.softmax(-1), latent[:, 0].double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


def test_a_band_means_nothing_where_every_query_has_one_row():
    """npu_ops.yaml: sparse_mode is ignored when the query has one row."""
    paged, query = Paged([30, 17]), random(2, 4, 8, seed=5)
    band, _ = paged_prefill(paged, query, [1, 2], 4, sparse_mode=4, pre_tokens=9, next_tokens=0)
    whole, _ = paged_prefill(paged, query, [1, 2], 4, sparse_mode=3)
    assert torch.equal(band, whole)


@pytest.mark.parametrize("window", [8, 128, 150])
def test_single_queries_see_the_last_keys_alone(window):
    lengths, heads = [400, 90, 129, 256], 4
    paged, query = Paged(lengths, block_size=128), random(4, heads, 8, seed=5)
    step = SimpleNamespace(context_lengths=lengths, block_table=paged.table)
    found = Window.of(step, window)
    assert found.block_table.shape[1] <= -(-window // 128) + 1
    keys, values = (cache.flatten(2) for cache in paged.caches)
    ours = ops.npu_fused_infer_attention_score(
        query.unsqueeze(1), keys, values, atten_mask=found.mask, actual_seq_lengths_kv=found.lengths,
        block_table=found.block_table, num_heads=heads, num_key_value_heads=2, scale=0.4, input_layout="BSND",
        block_size=128,
    )[0].squeeze(1)  # fmt: skip
    for i, (own_keys, own_values) in enumerate(paged.sequences):
        last = (rows[-window:] for rows in (own_keys, own_values))
        right, _ = attention_by_definition(query[i : i + 1], *last, 0.4, lambda row, key: True)
        torch.testing.assert_close(ours[i : i + 1].double(), right, rtol=1e-4, atol=1e-5)
