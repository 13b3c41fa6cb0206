"""GGUF tensors: exact against the files' own digests and gguf.dequantize, in whole and in rectangles."""

import hashlib
import json
from dataclasses import replace
from math import prod
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.checkpoint.gguf import GGML_TYPES
from framework.checkpoint.index import Index
from framework.checkpoint.open import open_index
from framework.checkpoint.reader import Reader
from framework.formats.gguf import decode as gguf_decode
from framework.formats.gguf import layout
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
            assert hashlib.sha256(values.numpy().tobytes()).hexdigest() == entry["sha256_dequant_fp32_le"], entry[
                "name"
            ]


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


def linear(n, k, part="mlp.down_proj", axis="mlp", unit=1, bias=False):
    return Module(f"model.layers.0.{part}", Kind.LINEAR, (n, k), Split.COLUMN, axis, unit, bias)


def written(path, tensors, architecture="qwen3"):
    """Index of a GGUF with float arrays as they are and (type name, float array) pairs quantized by gguf."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in tensors.items():
        if isinstance(value, tuple):
            kind = gguf.GGMLQuantizationType[value[0]]
            writer.add_tensor(name, gguf.quantize(value[1], kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_index(path)


def rectangles(draw, n, k, grain=1):
    n0, g0 = draw(st.integers(0, n - 1)), draw(st.integers(0, k // grain - 1))
    n1, g1 = draw(st.integers(n0 + 1, n)), draw(st.integers(g0 + 1, k // grain))
    return Rect(n0, n1, g0 * grain, g1 * grain)


PARTS = {
    f"blk.0.{theirs}.weight": f"model.layers.0.{ours}"
    for ours, theirs in {**layout.LAYER_PARTS}.items()
    if ours.endswith("_proj")
}


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_decoding_a_rectangle_equals_slicing_the_decoded_weight(data):
    folder = data.draw(st.sampled_from([GOLDEN / "tiny-qwen3" / name for name in ("gguf-zoo", "gguf-zoo-iq-1l")]))
    index = open_index(folder / "model.gguf")
    names = sorted(name for name in index.tensors if name.replace("blk.1.", "blk.0.") in PARTS)
    info = index.tensors[data.draw(st.sampled_from(names))]
    layer = info.name.split(".")[1]
    name = PARTS[info.name.replace(f"blk.{layer}.", "blk.0.")].replace("layers.0.", f"layers.{layer}.")
    module = Module(name, Kind.LINEAR, info.shape, Split.ROW)
    rect = rectangles(data.draw, *info.shape)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    with Reader() as reader:
        part = gguf_decode.decode(module, rect, "float", index, reader, dtype=dtype)
        expected = whole(reader, info)[rect.n0 : rect.n1, rect.k0 : rect.k1].to(dtype)
    assert part.is_float and torch.equal(part.codes, expected)


def test_the_zoo_files_hold_every_type_but_plain_fp32_matrices():
    held = set()
    for name in ("gguf-zoo", "gguf-zoo-iq-1l"):
        held |= {info.dtype for info in open_index(GOLDEN / "tiny-qwen3" / name).tensors.values()}
    assert held == set(DECODABLE)


def test_a_row_range_reads_only_its_rows():
    index = open_index(GOLDEN / "tiny-qwen3" / "gguf-q4_k_m" / "model.gguf")
    info = max(index.tensors.values(), key=lambda t: t.nbytes)
    rows = info.shape[0] // 4
    with Reader() as reader:
        reader.read(info, rows, 2 * rows)
        assert reader.bytes_read == info.nbytes // info.shape[0] * rows


@pytest.mark.parametrize(("kind", "scheme", "bits"), [("Q4_0", "w4a16", 4), ("Q4_1", "w4a16", 4), ("Q8_0", "w8a16", 8)])
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_packed_rectangle_dequantizes_to_the_values_of_gguf(tmp_path_factory, kind, scheme, bits, data):
    weight = np.random.default_rng(bits).standard_normal((24, 160)).astype(np.float32)
    path = tmp_path_factory.getbasetemp() / f"packed-{kind}.gguf"
    index = written(path, {"blk.0.ffn_down.weight": (kind, weight)})
    number = gguf.GGMLQuantizationType[kind]
    expected = gguf.dequantize(gguf.quantize(weight, number), number)
    rect = rectangles(data.draw, 24, 160, 32)
    with Reader() as reader:
        part = gguf_decode.decode(linear(24, 160), rect, scheme, index, reader)
    assert (part.shape, part.group_size, part.bits) == (rect.shape, 32, bits)
    assert part.codes.dtype == torch.int8 and part.scale.dtype == torch.float32
    assert np.array_equal(part.dequantize().numpy(), expected[rect.n0 : rect.n1, rect.k0 : rect.k1])
    low, high = {"Q4_0": (-8, 7), "Q4_1": (0, 15), "Q8_0": (-128, 127)}[kind]
    assert low <= int(part.codes.min()) and int(part.codes.max()) <= high


def interleaved(values, heads):
    """convert_hf_to_gguf.py, LlamaModel.permute."""
    return (
        values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:]).swapaxes(1, 2).reshape(values.shape)
    )


@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
@pytest.mark.parametrize("scheme", ["float", "w8a16"])
def test_only_the_llama_architecture_has_its_q_and_k_rows_put_back(tmp_path, architecture, scheme):
    heads, dim, hidden = 3, 8, 64
    hf = np.random.default_rng(3).integers(-127, 128, (heads * dim, hidden)).astype(np.float32)
    hf[:, ::32] = 127  # every block has scale 1: Q8_0 is exact
    stored = interleaved(hf, heads) if architecture == "llama" else hf
    bias = np.arange(heads * dim, dtype=np.float32)
    stored_bias = interleaved(bias, heads) if architecture == "llama" else bias
    tensors = {"blk.0.attn_q.weight": ("Q8_0", stored), "blk.0.attn_q.bias": stored_bias,
               "blk.0.attn_v.weight": ("Q8_0", hf)}  # fmt: skip
    index = written(tmp_path / "m.gguf", tensors, architecture)
    q_proj = linear(24, hidden, "self_attn.q_proj", "q_heads", dim, bias=True)
    v_proj = linear(24, hidden, "self_attn.v_proj", "kv_heads", dim)
    rect = Rect(8, 24, 32, 64)
    with Reader() as reader:
        q = gguf_decode.decode(q_proj, rect, scheme, index, reader).dequantize()
        v = gguf_decode.decode(v_proj, rect, scheme, index, reader).dequantize()
        part = gguf_decode.bias(q_proj, rect, index, reader)
    assert np.array_equal(q.numpy(), hf[8:24, 32:64])
    assert np.array_equal(v.numpy(), hf[8:24, 32:64])
    assert np.array_equal(part.numpy(), bias[8:24])


def test_gemma_norms_come_back_without_the_one_that_the_converter_added(tmp_path):
    hf = np.array([0.5, -0.25, 2.0], np.float32)
    index = written(tmp_path / "m.gguf", {"blk.0.post_attention_norm.weight": hf + 1}, "gemma3")
    norm = Module("model.layers.0.post_attention_layernorm", Kind.NORM, (3, 1), Split.REPLICATED)
    with Reader() as reader:
        assert gguf_decode.decode(norm, norm.full, "float", index, reader).codes.flatten().tolist() == hf.tolist()


def test_a_head_is_tied_only_when_no_part_has_an_output():
    head = Module("lm_head", Kind.LINEAR, (512, 256), Split.VOCAB, tied_to="model.embed_tokens")
    split = open_index(GOLDEN / "tiny-qwen3" / "gguf-q4_0-split-1l")
    assert "output.weight" not in {t.name for t in split.tensors.values() if t.file == split.files[0]}
    assert layout.tensor_name(head, split) == "output"
    without = {name: info for name, info in split.tensors.items() if name != "output.weight"}
    assert layout.tensor_name(head, replace(split, tensors=without)) == "token_embd"


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "gemma3", "qwen3moe", "deepseek2"])
def test_our_names_are_those_of_gguf(architecture):
    theirs = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, architecture.upper()), 4)
    index = Index(Path("m.gguf"), "gguf", {}, {"general.architecture": architecture})
    parts = layout.GEMMA3_PARTS if architecture == "gemma3" else layout.LAYER_PARTS
    known = 0
    for name in [*layout.TOP, *(f"model.layers.3.{part}" for part in parts)]:
        module = Module(name, Kind.LINEAR, (1, 1), Split.REPLICATED)
        found = theirs.get_name(name.replace(".*.", "."))  # gguf names a stack without the star
        known += found is not None
        assert found is None or layout.tensor_name(module, index) == found, name
    assert known >= {"llama": 12, "qwen2": 12, "deepseek2": 22}.get(architecture, 14)


def test_blocks_of_32_can_be_kept_packed_and_others_are_dequantized():
    index = open_index(GOLDEN / "tiny-qwen3" / "gguf-q4_0-split-1l" / "model-00001-of-00004.gguf")
    gguf_layout = GgufLayout()
    down = linear(256, 512)
    held = gguf_layout.held(down, index)
    assert held.schemes == ("float", "w4a16") and (held.label, held.group, held.symmetric) == ("Q4_0", 32, True)
    assert held.grain == (1, 32)


def test_large_weights_are_decoded_in_chunks_of_rows(tmp_path):
    """A rank may use its shard and 350 MB; here a whole weight in flight at once would be 48 MB."""
    weight = np.random.default_rng(0).standard_normal((3072, 4096)).astype(np.float32)
    index = written(tmp_path / "m.gguf", {"blk.0.ffn_down.weight": ("Q4_1", weight)})
    calls = []

    class Watched(Reader):
        def read(self, info, row0, row1, *columns):
            calls.append(row1 - row0)
            return super().read(info, row0, row1, *columns)

    module = linear(3072, 4096)
    number = gguf.GGMLQuantizationType.Q4_1
    expected = gguf.dequantize(gguf.quantize(weight, number), number)
    for scheme in ("float", "w4a16"):
        calls.clear()
        with Watched() as reader:
            values = gguf_decode.decode(module, module.full, scheme, index, reader).dequantize()
        assert sum(calls) == 3072 and max(calls) * 4096 // 32 * 20 <= gguf_decode.READ_BYTES
        assert np.array_equal(values.numpy(), expected)
