"""compressed-tensors bytes: exact against the tools' digests and against the format's formulas, written apart."""

import hashlib
import json
from dataclasses import fields, replace
from functools import cache
from math import ceil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.checkpoint.open import open_index
from framework.checkpoint.reader import Reader
from framework.errors import InputError, Refused
from framework.families.base import modules
from framework.families.config import describe
from framework.formats.compressed_tensors import decode as ct
from framework.formats.compressed_tensors.layout import CompressedTensorsLayout
from framework.geometry import Kind, Module, Rect, Split

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = sorted(GOLDEN.glob("*/ct-*"))
LAYOUT = CompressedTensorsLayout()
NAME = "model.layers.0.mlp.experts.0.down_proj"
TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
STATIC = {"num_bits": 8, "strategy": "tensor", "dynamic": False}


def linear(n, k, **more):
    return Module(NAME, Kind.LINEAR, (n, k), Split.COLUMN, **more)


def same(a, b):
    """Two QuantTensors, field by field, bit for bit."""

    def equal(x, y):
        if isinstance(x, torch.Tensor):
            return isinstance(y, torch.Tensor) and x.dtype == y.dtype and torch.equal(x, y)
        return x.keys() == y.keys() and all(map(equal, x.values(), y.values())) if hasattr(x, "keys") else x == y

    names = ["codes", *(field.name for field in fields(a) if field.name != "stored")]  # packed or not is alike
    return all(equal(getattr(a, name), getattr(b, name)) for name in names)


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_module_has_the_digest_that_was_recorded_with_every_scheme(folder):
    index = open_index(folder)
    recorded = json.loads((folder / "tensors.json").read_text())
    found = {}
    with Reader() as reader:
        for module in modules(describe(index.config)):
            for one in [module.expert(e) for e in range(module.experts)] or [module]:
                if one.name not in recorded:
                    continue
                values = ct.decode(one, one.full, "float", index, reader).codes
                found[one.name] = {"sha256_dequant_fp32_le": hashlib.sha256(values.numpy().tobytes()).hexdigest()}
                for scheme in LAYOUT.held(one, index).schemes[:-1]:
                    assert torch.equal(ct.decode(one, one.full, scheme, index, reader).dequantize(), values)
    assert found == {name: {key: entry[key] for key in ("sha256_dequant_fp32_le",)} for name, entry in recorded.items()}


def packed_along_rows(unsigned, bits):
    """Words int32 of a matrix's rows: element i at bit i * bits of its row, the last word filled up with zeros."""
    per_word = 32 // bits
    words = np.zeros((unsigned.shape[0], ceil(unsigned.shape[1] / per_word)), np.uint32)
    for row, column in np.ndindex(*unsigned.shape):
        words[row, column // per_word] |= np.uint32(int(unsigned[row, column]) << bits * (column % per_word))
    return words.view(np.int32)


# n, k, weights of quantization_config, its format, activations
CASES = {
    "words of 4 bits by group": (12, 96, {"num_bits": 4, "group_size": 32}, "pack-quantized", None),
    "words with zero points": (20, 64, {"num_bits": 4, "group_size": 32, "symmetric": False}, "pack-quantized", None),
    "words of 8 bits": (10, 64, {"num_bits": 8, "group_size": 16, "symmetric": False}, "pack-quantized", None),
    "groups across words": (9, 72, {"num_bits": 4, "group_size": 12, "symmetric": False}, "pack-quantized", None),
    "words filled up": (11, 61, {"num_bits": 4, "strategy": "channel", "symmetric": False}, "pack-quantized", None),
    "words of one scale": (6, 40, {"num_bits": 8, "strategy": "tensor", "symmetric": False}, "pack-quantized", None),
    "words in activation order": (9, 96, {"num_bits": 4, "group_size": 32, "symmetric": False, "actorder": "group"},
                                  "pack-quantized", None),
    "bytes in activation order": (9, 64, {"num_bits": 8, "group_size": 16, "actorder": "group"}, "int-quantized", None),
    "one group": (8, 32, {"num_bits": 4, "group_size": 32}, "pack-quantized", None),
    "a last group of less": (7, 40, {"num_bits": 8, "group_size": 16}, "int-quantized", None),
    "bytes a channel": (7, 33, {"num_bits": 8, "strategy": "channel"}, "int-quantized", TOKEN),
    "bytes by group": (7, 48, {"num_bits": 8, "group_size": 16, "symmetric": False}, "naive-quantized", None),
    "bytes of one scale": (5, 24, {"num_bits": 8, "strategy": "tensor", "symmetric": False}, "naive-quantized", TOKEN),
    "4 bits in bytes": (6, 64, {"num_bits": 4, "group_size": 16}, "int-quantized", TOKEN),
    "pairs of rows": (14, 40, {"num_bits": 4, "strategy": "channel"}, "paired", TOKEN),
    "static inputs": (6, 24, {"num_bits": 8, "strategy": "channel"}, "int-quantized", STATIC),
    "static inputs off zero": (6, 24, {"num_bits": 8, "strategy": "channel"}, "int-quantized",
                               {**STATIC, "symmetric": False}),
}  # fmt: skip


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Of each case: its module, index, and the weight fp32 [N, K]."""

    @cache
    def make(name, *, clip=False):
        n, k, weights, form, inputs = CASES[name]
        rng = np.random.default_rng(len(name))
        bits, group, asymmetric = weights["num_bits"], weights.get("group_size", k), not weights.get("symmetric", True)
        half = 1 << (bits - 1)
        one = weights.get("strategy") == "tensor"
        shape = (1, 1) if one else (n, ceil(k / group))
        codes = rng.integers(-half, half, (n, k))
        zeros = rng.integers(-half, half, shape) * asymmetric
        scales = torch.from_numpy(rng.uniform(0.01, 1, shape)).to(torch.bfloat16)
        group_of = np.arange(k) // group
        if "actorder" in weights:
            group_of = rng.permutation(group_of)
        value = np.empty((n, k), np.float32)
        for row, column in np.ndindex(n, k):
            at = (0, 0) if shape == (1, 1) else (row, group_of[column])
            value[row, column] = np.float32(codes[row, column] - zeros[at]) * np.float32(scales[at].item())
        tensors = {"weight_scale": scales.flatten() if one else scales}
        if form == "pack-quantized":
            tensors["weight_packed"] = torch.from_numpy(packed_along_rows(codes + half, bits))
            tensors["weight_shape"] = torch.tensor([n, k])
        elif form == "paired":
            low, high = codes[0::2] & 15, codes[1::2] & 15
            tensors["weight"] = torch.from_numpy((low | high << 4).astype(np.uint8).view(np.int8))
            tensors["bias"] = torch.from_numpy(8 * value.astype(np.float64).sum(1)).float()
            tensors["weight_scale"] = scales.float().view(torch.int32).long()
        else:
            tensors["weight"] = torch.from_numpy(codes.astype(np.int8))
        if asymmetric:
            words = form == "pack-quantized" and not one
            stored = packed_along_rows((zeros + half).T, bits).T.copy() if words else zeros.astype(np.int8)
            tensors["weight_zero_point"] = torch.from_numpy(stored.reshape(-1) if one else stored)
        if "actorder" in weights:
            tensors["weight_g_idx"] = torch.from_numpy(group_of.astype(np.int32))
        if inputs and not inputs["dynamic"]:
            tensors["input_scale"] = torch.tensor([0.0625], dtype=torch.bfloat16)
            if not inputs.get("symmetric", True):
                tensors["input_zero_point"] = torch.tensor([-5], dtype=torch.int8)
        if clip:
            tensors["alpha"] = torch.tensor([0.75])
        described = {"targets": ["Linear"], "weights": weights, "input_activations": inputs,
                     "format": "int-quantized" if form == "paired" else form, "activation_use_clip": clip}  # fmt: skip
        return linear(n, k), written(tmp_path_factory.mktemp("ct"), tensors, described), value

    return make


def written(folder, tensors, group):
    safetensors.torch.save_file(
        {f"{NAME}.{role}": tensor.contiguous() for role, tensor in tensors.items()}, folder / "model.safetensors"
    )
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    return open_index(folder)


def rectangle(draw, n, k, grain):
    """Any rectangle between multiples of the grain; the last one may be cut short by the weight's end."""

    def ends(size, step):
        first = draw(st.integers(0, ceil(size / step) - 1))
        return first * step, min(draw(st.integers(first + 1, ceil(size / step))) * step, size)

    return Rect(*ends(n, grain[0]), *ends(k, grain[1]))


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_any_rectangle_is_dequantized_to_the_values_of_the_formula(made, name, data):
    module, index, value = made(name)
    rect = rectangle(data.draw, *value.shape, (1, 1))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    with Reader() as reader:
        part = ct.decode(module, rect, "float", index, reader, dtype=dtype)
    assert part.is_float
    expected = torch.from_numpy(value[rect.n0 : rect.n1, rect.k0 : rect.k1]).to(dtype)
    assert part.codes.dtype == dtype and torch.equal(part.codes, expected)


@pytest.mark.parametrize("name", [name for name in CASES if name != "a last group of less"])  # no operator takes it
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_a_shard_of_codes_is_a_slice_of_all_codes(made, name, data):
    module, index, value = made(name)
    held = LAYOUT.held(module, index)
    rect = rectangle(data.draw, *value.shape, held.grain)
    with Reader() as reader:
        for scheme in held.schemes[:-1]:
            full = ct.decode(module, module.full, scheme, index, reader)
            part = ct.decode(module, rect, scheme, index, reader)
            assert torch.equal(full.dequantize(), torch.from_numpy(value)) and full.bits == int(held.scheme[1])
            assert full.codes.dtype == torch.int8 and full.scale.dtype == torch.float32
            assert same(part, full.slice(rect.n0, rect.n1, rect.k0, rect.k1))


def test_groups_that_are_already_in_order_need_none(made):
    module, index, _ = made("words in activation order")
    with Reader() as reader:
        assert ct.decode(module, module.full, "w4a16", index, reader).order is not None
    info = index.tensors[f"{NAME}.weight_g_idx"]
    for groups, right in ((np.arange(96) // 32, True), (np.full(96, -1), True), (np.arange(96) // 24, False)):

        class Changed(Reader):
            def read(self, asked, *where, g_idx=groups):
                if asked is info:
                    return g_idx.astype(np.int32).view(np.uint8).reshape(1, -1)
                return super().read(asked, *where)

        with Changed() as reader:
            if right:
                assert ct.decode(module, module.full, "w4a16", index, reader).order is None
                continue
            with pytest.raises(InputError) as caught:
                ct.decode(module, module.full, "w4a16", index, reader)
        assert caught.value.problems[0].code == "file-malformed"
    with pytest.raises(ValueError, match="activation order"), Reader() as reader:
        ct.decode(module, Rect(0, 9, 0, 32), "w4a16", index, reader)


@pytest.mark.parametrize(("name", "offset"), [("static inputs", 0), ("static inputs off zero", -5)])
def test_the_input_of_a_static_scheme_comes_with_it_alone(made, name, offset):
    module, index, _ = made(name)
    with Reader() as reader:
        whole = ct.decode(module, module.full, "w8a8_static", index, reader).whole
        assert not ct.decode(module, module.full, "w8a8_dynamic", index, reader).whole
    assert {role: (value.dtype, value.tolist()) for role, value in whole.items()} == {
        "input_scale": (torch.float32, [0.0625]),
        "input_offset": (torch.float32, [offset]),
    }


def test_alpha_comes_with_the_scheme_that_clips_and_the_compensation_with_none(made):
    module, index, value = made("pairs of rows", clip=True)
    with Reader() as reader:
        clipped = ct.decode(module, module.full, "w4a8_dynamic", index, reader)
        assert {role: one.tolist() for role, one in clipped.whole.items()} == {"alpha": [0.75]} and not clipped.rows
        assert not ct.decode(module, module.full, "w4a16", index, reader).whole
    assert torch.equal(clipped.dequantize(), torch.from_numpy(value))


def test_a_scale_of_pairs_may_be_a_plain_fp32(made, tmp_path):
    module, index, value = made("pairs of rows")
    with Reader() as reader:
        scale = ct.decode(module, module.full, "w4a16", index, reader).scale
        tensors = {
            role: torch.from_numpy(reader.read(index.tensors[f"{NAME}.{role}"], 0, rows)).view(kind).view(shape)
            for role, kind, rows, shape in (("weight", torch.int8, 7, (7, 40)), ("bias", torch.float32, 1, (14,)))
        }
    group = index.config["quantization_config"]["config_groups"]["group_0"]
    plain = written(tmp_path, {**tensors, "weight_scale": scale}, group)
    with Reader() as reader:
        assert torch.equal(ct.decode(module, module.full, "float", plain, reader).codes, torch.from_numpy(value))


@pytest.mark.parametrize("scheme", ["float", "w4a16", "w4a8_dynamic"])
def test_pairs_whose_compensation_is_not_that_of_their_codes_are_refused(made, scheme):
    module, index, _ = made("pairs of rows")
    info = index.tensors[f"{NAME}.bias"]
    other = replace(index, tensors={**index.tensors, info.name: info._replace(offset=info.offset - 4)})
    with pytest.raises(Refused) as caught, Reader() as reader:
        ct.decode(module, module.full, scheme, other, reader)
    assert caught.value.problems[0].code == "compensation"


def test_a_rank_reads_its_rows_and_its_words():
    index = open_index(GOLDEN / "tiny-qwen3" / "ct-w4a16-g128-asym-1l")
    module = linear(512, 256)._replace(name="model.layers.0.mlp.up_proj")
    with Reader() as reader:
        ct.decode(module, Rect(128, 256, 0, 256), "w4a16", index, reader)
        # codes, 2 scales a row in bf16, 2 columns of words with 8 zero points
        assert reader.bytes_read == 128 * 256 // 2 + 128 * 2 * 2 + 128 // 8 * 2 * 4


@pytest.mark.parametrize("scheme", ["float", "w4a16"])
def test_large_weights_are_decoded_in_chunks_of_rows(tmp_path, scheme):
    n, k = 2048, 8192
    words = torch.randint(-(2**31), 2**31, (n, k // 8)).to(torch.int32)
    tensors = {"weight_packed": words, "weight_shape": torch.tensor([n, k]), "weight_scale": torch.ones(n, k // 64)}
    weights = {"num_bits": 4, "group_size": 64}
    index = written(tmp_path, tensors, {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"})
    calls = []

    class Watched(Reader):
        def read(self, info, row0, row1, *columns):
            calls.append((info.name, row1 - row0))
            return super().read(info, row0, row1, *columns)

    with Watched() as reader:
        values = ct.decode(linear(n, k), Rect(1, n, 0, k), scheme, index, reader).dequantize()
    rows = [count for name, count in calls if name.endswith("packed")]
    # codes that stay packed are read once, they are no larger than what is kept
    assert rows == [n - 1] if scheme == "w4a16" else sum(rows) == n - 1 and max(rows) * k // 2 <= ct.READ_BYTES
    for field in range(8):
        expected = ((words[1:].long() >> 4 * field) & 15) - 8
        assert torch.equal(values[:, field::8], expected.float())


def test_what_is_not_quantized_is_read_as_it_is(made):
    index = open_index(GOLDEN / "tiny-qwen3" / "ct-mixed")
    stored = safetensors.torch.load_file(GOLDEN / "tiny-qwen3" / "ct-mixed" / "model.safetensors")
    chosen = ("model.embed_tokens", "model.norm", "lm_head", "model.layers.1.mlp.down_proj")
    with Reader() as reader:
        for module in modules(describe(index.config)):
            if module.name in chosen:
                values = ct.decode(module, module.full, "float", index, reader, dtype=torch.float32).codes
                assert torch.equal(values.flatten(), stored[f"{module.name}.weight"].float().flatten())


def test_a_float_bias_of_a_quantized_linear_is_its_own(tmp_path):
    tensors = {
        "weight": torch.ones(4, 8, dtype=torch.int8),
        "weight_scale": torch.ones(4, 1),
        "bias": torch.arange(4.0),
    }
    weights = {"num_bits": 8, "strategy": "channel"}
    index = written(tmp_path, tensors, {"targets": ["Linear"], "weights": weights, "format": "int-quantized"})
    with Reader() as reader:
        assert ct.bias(linear(4, 8, bias=True), Rect(1, 3, 0, 8), index, reader).tolist() == [1, 2]
