"""GGUF tensors: exact against the files' own digests and against gguf.dequantize, in whole and in rectangles."""

import hashlib
import json
from math import prod
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.checkpoint.gguf import GGML_TYPES
from framework.checkpoint.open import open_index
from framework.checkpoint.reader import Reader
from framework.formats.gguf import decode as gguf_decode
from framework.formats.gguf.blocks import DEQUANTIZE, dequantize
from framework.formats.gguf.layout import DECODABLE, GgufLayout
from framework.geometry import Kind, Module, Rect, Split

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = sorted(GOLDEN.glob("*/gguf-*"))


def whole(reader, info):
    return dequantize(info.dtype, torch.from_numpy(reader.read(info, 0, prod(info.shape[:-1]))))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f"{f.parent.name}/{f.name}")
def test_every_tensor_has_the_digest_that_the_quantizer_recorded(folder):
    index = open_index(sorted(folder.glob("*.gguf"))[-1])  # any part of a split file opens all of it
    recorded = json.loads((folder / "tensors.json").read_text())
    recorded = recorded.get("tensors", recorded)
    entries = recorded if isinstance(recorded, list) else [{"name": k, **v} for k, v in recorded.items()]
    assert {e["name"] for e in entries} == set(index.tensors)
    with Reader() as reader:
        for entry in entries:
            values = whole(reader, index.tensors[entry["name"]])
            assert hashlib.sha256(values.numpy().tobytes()).hexdigest() == entry["sha256_dequant_fp32_le"], entry["name"]


def test_the_decodable_types_are_those_that_gguf_can_dequantize():
    quantized = {kind.name for kind in gguf.quants._type_traits}
    assert set(DECODABLE) == quantized | {"F32", "F16", "BF16"} == set(DEQUANTIZE)


@pytest.mark.parametrize("kind", sorted(set(DEQUANTIZE) - {"F32", "F16", "BF16"}))
def test_random_blocks_equal_gguf_dequantize_bit_for_bit(kind):
    number, block, nbytes = GGML_TYPES[kind]
    assert gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(number)] == (block, nbytes)
    raw = np.random.default_rng(number).integers(0, 256, (200, nbytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(raw, gguf.GGMLQuantizationType(number))
    ours = dequantize(kind, torch.from_numpy(raw)).numpy()
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(ours), nan)
    assert np.array_equal(ours[~nan], expected[~nan])


def linear(n, k):
    return Module("model.layers.0.mlp.down_proj", Kind.LINEAR, (n, k), Split.ROW, "mlp", 1)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_decoding_a_rectangle_equals_slicing_the_decoded_weight(data):
    folder = data.draw(st.sampled_from([GOLDEN / "tiny-qwen3" / name for name in ("gguf-zoo", "gguf-zoo-iq-1l")]))
    index = open_index(next(folder.glob("*.gguf")))
    names = sorted(name for name, info in index.tensors.items() if len(info.shape) == 2 and "blk.0." in name)
    info = index.tensors[data.draw(st.sampled_from(names))]
    n, k = info.shape
    n0, k0 = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, k - 1))
    rect = Rect(n0, data.draw(st.integers(n0 + 1, n)), k0, data.draw(st.integers(k0 + 1, k)))
    with Reader() as reader:
        part = gguf_decode._values(info, rect, reader, torch.float32)
        expected = whole(reader, info)[rect.n0 : rect.n1, rect.k0 : rect.k1]
    assert torch.equal(part, expected)


def test_a_narrow_column_range_reads_only_its_blocks(tmp_path):
    index = open_index(GOLDEN / "tiny-qwen3" / "gguf-q4_k_m" / "model.gguf")
    info = max(index.tensors.values(), key=lambda t: t.nbytes)
    rows = info.shape[0] // 4
    with Reader() as reader:
        reader.read(info, rows, 2 * rows)
        assert reader.bytes_read == info.nbytes // info.shape[0] * rows


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0"])
def test_packed_weights_dequantize_to_the_same_values(kind, tmp_path):
    number, _, nbytes = GGML_TYPES[kind]
    weight = np.random.default_rng(1).standard_normal((8, 128)).astype(np.float32)
    raw = gguf.quantize(weight, gguf.GGMLQuantizationType(number))
    packed = gguf_decode._packed(kind, torch.from_numpy(raw))
    assert packed.shape == (8, 128)
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType(number))
    assert np.array_equal(packed.dequantize().numpy(), expected)
    right = packed.slice(2, 6, 32, 128)
    assert np.array_equal(right.dequantize().numpy(), expected[2:6, 32:128])


def test_llama_rows_are_put_back_into_half_split_order(tmp_path):
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor  # noqa: F401 - same convention

    heads, dim, hidden = 3, 8, 32
    hf = np.arange(heads * dim * hidden, dtype=np.float32).reshape(heads * dim, hidden)
    # convert_hf_to_gguf: LlamaModel.permute
    stored = hf.reshape(heads, 2, dim // 2, hidden).swapaxes(1, 2).reshape(hf.shape)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("blk.0.attn_q.weight", stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    index = open_index(tmp_path / "m.gguf")
    q_proj = Module("model.layers.0.self_attn.q_proj", Kind.LINEAR, (24, 32), Split.COLUMN, "q_heads", dim)
    with Reader() as reader:
        part = gguf_decode.decode(q_proj, Rect(8, 24, 0, 32), "float", index, reader).codes
    assert np.array_equal(part.numpy(), hf[8:24])


def test_blocks_of_32_can_be_kept_packed_and_others_are_dequantized():
    index = open_index(GOLDEN / "tiny-qwen3" / "gguf-q4_0-split-1l" / "model-00001-of-00004.gguf")
    layout = GgufLayout()
    down = linear(256, 512)
    assert layout.schemes_of(down, index) == ("float", "w4a16")
    assert layout.grain(down, "w4a16", index) == (1, 32)
    assert layout.grain(down, "float", index) == (1, 1)
