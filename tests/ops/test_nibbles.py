"""Codes as files pack them: packed here by shifts in numpy, one code at a time; torch's converter is the reference."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.ops.cpu import packed
from framework.ops.cpu.repack import can_repack, repack
from framework.ops.layout import weight_operand
from framework.ops.nibbles import Carrier, Nibbles

# AutoAWQ packs columns 0, 2, 4, 6, 1, 3, 5, 7 of eight into fields 0 to 7.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def carry(codes, carrier, is_signed):
    """Codes -8..7 [N, K] in their carriers."""
    fields = (codes & 15 if is_signed else codes + 8).astype(np.uint32)
    if carrier is Carrier.ROW_PAIRS:
        return torch.from_numpy((fields[::2] | fields[1::2] << 4).astype(np.uint8))
    if carrier is Carrier.ALONG_N:
        fields = fields.T
    order = AWQ_ORDER if carrier is Carrier.ALONG_N else range(8)
    words = np.zeros((fields.shape[0], fields.shape[1] // 8), np.uint32)
    for field, column in enumerate(order):
        words |= fields[:, column::8] << np.uint32(4 * field)
    if carrier is Carrier.ALONG_K_FIRST:
        words = np.ascontiguousarray(words.T)
    return torch.from_numpy(words.view(np.int32))


KINDS = [(carrier, is_signed) for carrier in Carrier for is_signed in (False, True)]


@pytest.mark.parametrize(("carrier", "is_signed"), KINDS)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_unpacking_gives_back_what_was_packed(carrier, is_signed, data):
    rows = data.draw(st.lists(st.sampled_from([8, 16, 40, 64]), min_size=1, max_size=3))
    k = 8 * data.draw(st.integers(1, 9))
    source = np.random.default_rng(data.draw(st.integers(0, 9)))
    parts = [source.integers(-8, 8, (n, k), dtype=np.int32) for n in rows]
    held = Nibbles(tuple(carry(part, carrier, is_signed) for part in parts), carrier, is_signed)
    expected = torch.from_numpy(np.concatenate(parts)).to(torch.int8)
    assert held.shape == expected.shape
    assert held.unpack().dtype == torch.int8 and torch.equal(held.unpack(), expected)


@pytest.mark.parametrize(("carrier", "is_signed"), KINDS)
@pytest.mark.parametrize(
    ("rows", "k"), [((64,), 32), ((64, 128), 64), ((192,), 4096), ((1024, 64), 768), ((4160,), 520), ((64,), 16392)]
)
def test_repacked_bytes_are_those_that_torch_makes(rows, k, carrier, is_signed):
    source = np.random.default_rng(len(rows) + k)
    parts = [source.integers(-8, 8, (n, k), dtype=np.int32) for n in rows]
    held = Nibbles(tuple(carry(part, carrier, is_signed) for part in parts), carrier, is_signed)
    block = packed.block_rows()
    assert can_repack(held, block)
    out = torch.empty(sum(rows), k // 2, dtype=torch.uint8)
    repack(held, out, block)
    codes = torch.from_numpy(np.concatenate(parts)) + 8
    assert torch.equal(out, torch._convert_weight_to_int4pack_for_cpu(codes, 1).view(torch.uint8).view(out.shape))


def test_blocks_of_thirty_two_rows_are_filled_as_the_layout_says():
    codes = np.random.default_rng(3).integers(-8, 8, (96, 40), dtype=np.int32)
    for carrier, is_signed in KINDS:
        out = torch.empty(96, 20, dtype=torch.uint8)
        repack(Nibbles((carry(codes, carrier, is_signed),), carrier, is_signed), out, 32)
        octets = out.view(3, 40, 16)
        read = torch.cat((octets & 15, octets >> 4), dim=-1).transpose(1, 2).reshape(96, 40)
        assert torch.equal(read.int() - 8, torch.from_numpy(codes))


@pytest.mark.parametrize("carrier", Carrier)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n", [64, 48])  # whole blocks, and not
def test_an_operand_is_the_same_from_packed_and_from_single_codes(n, dtype, carrier):
    codes = np.random.default_rng(n).integers(-8, 8, (n, 64), dtype=np.int32)
    single = torch.from_numpy(codes).to(torch.int8)
    scale = torch.rand(2, n, generator=torch.Generator().manual_seed(n))
    made = [
        weight_operand(
            given, bits=4, scale=scale, offset=None, dtype=dtype, device=torch.device("cpu"), values=single.float
        )
        for given in (single, Nibbles((carry(codes, carrier, False),), carrier))
    ]
    assert torch.equal(*made)
    forms = [packed.private(operand) for operand in made]
    assert (forms[0] is None) == (forms[1] is None)
    if forms[0] is not None:
        assert torch.equal(forms[0].codes, forms[1].codes)
