"""ModelSlim bytes: the tool's own vectors, and every form of every quant type by formulas written apart."""

import json
from functools import cache
from math import ceil

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.checkpoint.open import open_index
from framework.checkpoint.reader import Reader
from framework.errors import Refused
from framework.formats.modelslim import decode as codec
from framework.formats.modelslim.layout import ModelslimLayout
from framework.formats.modelslim.types import TYPES
from framework.geometry import Kind, Module, Rect, Split
from tests.formats.headers import DESCRIPTION, GOLDEN, account, each, model_of
from tests.formats.literal_words import NAME, linear, rectangle

LAYOUT = ModelslimLayout()
FOLDERS = sorted(path.parent for path in GOLDEN.glob("tiny-*/modelslim-*/quant_model_description.json"))
FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def stored(folder):
    return {name: t for file in folder.glob("*.safetensors") for name, t in safetensors.torch.load_file(file).items()}


def signed(nibbles):
    """Two's complement of 4 bits."""
    return np.where(nibbles > 7, nibbles - 16, nibbles)


def integers(weight, n, k):
    """Codes [N, K] of int8 bytes, of pairs of rows or of pairs of columns, the earlier in the lower half."""
    raw = weight.numpy().astype(np.int64)
    if raw.shape == (n, k):
        return raw
    codes = np.empty((n, k), np.int64)
    pairs = (codes[0::2], codes[1::2]) if raw.shape[0] * 2 == n else (codes[:, 0::2], codes[:, 1::2])
    pairs[0][:], pairs[1][:] = signed(raw & 15), signed((raw >> 4) & 15)
    return codes


def fp4(weight, n, k):
    raw = weight.numpy().astype(np.int64)
    codes = np.empty((n, k), np.int64)
    codes[:, 0::2], codes[:, 1::2] = raw & 15, raw >> 4
    return np.where(codes > 7, -1.0, 1.0) * np.array(FP4)[codes & 7]


def values(label, tensors, n, k):
    """The weight in float64 by the table of the format."""

    def spread(name, size):
        return np.repeat(tensors[name].double().numpy().reshape(n, -1), size, axis=1)[:, :k]

    if "MXFP" in label:
        elements = tensors["weight"].double().numpy() if label == "W8A8_MXFP8" else fp4(tensors["weight"], n, k)
        out = elements * 2.0 ** (spread("weight_scale", 32) - 127)
        return out * spread("weight_dual_scale", 512) if label.endswith("DUALSCALE") else out
    codes = integers(tensors["weight"], n, k)
    if "weight_scale" not in tensors:
        deq_scale = tensors["deq_scale"].numpy()
        if deq_scale.dtype == np.int64:
            deq_scale = deq_scale.astype(np.uint32).view(np.float32)
        return codes * (deq_scale.astype(np.float64) / tensors["input_scale"].double().numpy())[:, None]
    groups = tensors["weight_scale"].shape[1]
    out = (codes - spread("weight_offset", ceil(k / groups))) * spread("weight_scale", ceil(k / groups))
    if "weight_scale_second" in tensors:
        out *= spread("weight_scale_second", k // tensors["weight_scale_second"].shape[1])
    return out


def near(found, expected):
    """Within two roundings of fp32."""
    return found.shape == expected.shape and np.allclose(found.double().numpy(), expected, rtol=2.5e-7, atol=0)


def decoded(module, index, rect=None, scheme="float", **more):
    with Reader() as reader:
        return codec.decode(module, rect or module.full, scheme, index, reader, **more)


def of(name, index, n, k):
    return linear(n, k, name, bias=f"{name}.bias" in index.tensors)


def test_the_golden_files_have_every_type_but_the_mix():
    entries = [open_index(folder).documents[DESCRIPTION].items() for folder in FOLDERS]
    found = {kind for items in entries for name, kind in items if name.endswith(".weight")}
    assert found == set(TYPES) - {"W8A8_MIX"} | {"FLOAT"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: f"{folder.parent.name}/{folder.name}")
def test_what_the_tool_wrote_is_dequantized_by_the_table_in_every_scheme(folder):
    index, tensors = open_index(folder), stored(folder)
    entries, seen = index.documents[DESCRIPTION], 0
    for name in [key.removesuffix(".weight") for key in entries if key.endswith(".weight")]:
        label = entries[f"{name}.weight"]
        if label == "FLOAT":
            continue
        own = {key.removeprefix(f"{name}."): t for key, t in tensors.items() if key.startswith(f"{name}.")}
        n = len(own.get("weight_scale", own.get("deq_scale")))
        k = own["weight"].shape[1] * (2 if "FP4" in label or ("MXFP" in label and label[:2] == "W4") else 1)
        if label == "W4A16" and own["weight_scale"].shape[1] == 1:
            k *= 2
        module, expected = of(name, index, n, k), values(label, own, n, k)
        whole = decoded(module, index).codes
        assert near(whole, expected), name
        for scheme in LAYOUT.held(module, index).schemes[:-1]:
            assert torch.equal(decoded(module, index, scheme=scheme).dequantize(), whole)
        seen += 1
    assert seen


@pytest.mark.parametrize(
    "folder", [folder for folder in FOLDERS if (folder / "linear.npz").exists()], ids=lambda folder: folder.name
)
def test_the_tool_s_own_vectors_are_met(folder):
    index, vectors = open_index(folder), np.load(folder / "linear.npz")
    for name in [key.removesuffix(".W_rowsum") for key in vectors.files if key.endswith(".W_rowsum")]:
        module = of(name, index, len(vectors[f"{name}.W_rowsum"]), vectors[f"{name}.x"].shape[1])
        weight = decoded(module, index).codes.double().numpy()
        np.testing.assert_allclose(weight[:16], vectors[f"{name}.W_rows16"], rtol=1e-6)
        bound = np.abs(weight).sum(1).max()
        np.testing.assert_allclose(weight.sum(1), vectors[f"{name}.W_rowsum"], rtol=1e-6, atol=1e-6 * bound)


def int_codes(rng, n, k, bits):
    return rng.integers(-(1 << bits - 1), 1 << bits - 1, (n, k))


def pairs_of_rows(codes):
    return ((codes[0::2] & 15) | (codes[1::2] & 15) << 4).astype(np.uint8).view(np.int8)


def pairs_of_columns(codes):
    return ((codes[:, 0::2] & 15) | (codes[:, 1::2] & 15) << 4).astype(np.uint8).view(np.int8)


def as_bytes(codes):
    return codes.astype(np.int8)


def static(rng, n, *, wide=False):
    deq = torch.from_numpy(rng.uniform(1e-4, 1e-3, n).astype(np.float32))
    return {"input_scale": torch.tensor([0.0625]), "input_offset": torch.tensor([-3.0]),
            "quant_bias": torch.from_numpy(rng.integers(-99, 99, n).astype(np.int32)),
            "deq_scale": deq.view(torch.int32).long() if wide else deq}  # fmt: skip


# quant type, n, k, how int codes are packed, groups a row, and what more the file has
CASES = {
    "static": ("W8A8", 6, 24, as_bytes, 0, {"static"}),
    "static, scales of 64 bits": ("W8A8", 6, 24, as_bytes, 0, {"static", "wide"}),
    "static, old saver": ("W8A8", 6, 24, as_bytes, 1, {"static"}),
    "mix": ("W8A8_MIX", 6, 24, as_bytes, 1, {"static"}),
    "dynamic": ("W8A8_DYNAMIC", 7, 33, as_bytes, 1, set()),
    "dynamic, offsets": ("W8A8_DYNAMIC", 7, 33, as_bytes, 1, {"offset"}),
    "dynamic by group": ("W8A8_DYNAMIC", 7, 96, as_bytes, 3, set()),
    "int4": ("W4A4_DYNAMIC", 8, 40, as_bytes, 1, set()),
    "int4 in pairs": ("W4A4_DYNAMIC", 8, 40, pairs_of_rows, 1, set()),
    "w4a8": ("W4A8_DYNAMIC", 10, 40, pairs_of_rows, 1, set()),
    "w4a8 in two stages": ("W4A8_DYNAMIC", 10, 96, pairs_of_rows, 1, {"second"}),
    "w8a16 by group, offsets": ("W8A16", 5, 96, as_bytes, 3, {"offset"}),
    "w4a16, pairs along K": ("W4A16", 5, 40, pairs_of_columns, 1, {"offset"}),
    "w4a16, pairs along N": ("W4A16", 8, 96, pairs_of_rows, 3, {"offset"}),
    "w4a16, old saver": ("W4A16", 7, 40, as_bytes, 1, set()),
    "mxfp8": ("W8A8_MXFP8", 6, 80, None, 0, set()),
    "mxfp4": ("W4A4_MXFP4", 6, 80, None, 0, set()),
    "w4a8_mxfp": ("W4A8_MXFP", 6, 64, None, 0, set()),
    "mxfp4 on two levels": ("W4A4_MXFP4_DUALSCALE", 6, 1056, None, 0, set()),
}  # fmt: skip


def tensors_of(name, rng):
    label, n, k, pack, groups, more = CASES[name]
    if pack is None:
        raw = rng.integers(0, 256, (n, k if "FP8" in label else k // 2)).astype(np.uint8)
        exponents = rng.integers(110, 140, (n, ceil(k / 32))).astype(np.uint8)
        made = {"weight": torch.from_numpy(raw), "weight_scale": torch.from_numpy(exponents)}
        if "FP8" in label:  # 127 and 255 are the NaNs of e4m3
            made["weight"] = torch.from_numpy(np.where(raw & 127 == 127, 1, raw)).view(torch.float8_e4m3fn)
        if label.endswith("DUALSCALE"):
            made["weight_dual_scale"] = torch.from_numpy(rng.uniform(0.5, 2, (n, ceil(k / 512), 1)).astype(np.float32))
        return made
    codes = int_codes(rng, n, k, 8 if label.startswith("W8") else 4)
    made = {"weight": torch.from_numpy(pack(codes))}
    if groups:
        offset = rng.integers(-5, 6, (n, groups)) if "offset" in more else np.zeros((n, groups))
        made |= {"weight_scale": torch.from_numpy(rng.uniform(0.01, 1, (n, groups)).astype(np.float32)),
                 "weight_offset": torch.from_numpy(offset.astype(np.float32))}  # fmt: skip
    if label == "W4A8_DYNAMIC":
        made["scale_bias"] = torch.zeros(n, 1)
    if "second" in more:
        made |= {"weight_scale_second": torch.from_numpy(rng.integers(10, 19, (n, 3)).astype(np.float32)),
                 "weight_offset_second": torch.zeros(n, 3, dtype=torch.int64)}  # fmt: skip
    return made | (static(rng, n, wide="wide" in more) if "static" in more else {})


def written(folder, tensors, label, name=NAME, **beside):
    named = {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in tensors.items()}
    safetensors.torch.save_file({**named, **beside}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")
    entries = dict.fromkeys(named, label) | dict.fromkeys(beside, "FLOAT")
    (folder / DESCRIPTION).write_text(json.dumps(entries))
    return open_index(folder)


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Of each case: its module, index, tensors, and the weight in float64."""

    @cache
    def make(name):
        label, n, k, *_ = CASES[name]
        tensors = tensors_of(name, np.random.default_rng(len(name)))
        index = written(tmp_path_factory.mktemp("modelslim"), tensors, label)
        return linear(n, k), index, tensors, values(label, tensors, n, k)

    return make


def same(a, b):
    """Two QuantTensors, bit for bit; no zero points are zero points of 0."""

    def equal(x, y):
        if isinstance(x, torch.Tensor):
            kind = torch.uint8 if x.dtype == torch.float8_e4m3fn else x.dtype
            return isinstance(y, torch.Tensor) and x.dtype == y.dtype and torch.equal(x.view(kind), y.view(kind))
        return x.keys() == y.keys() and all(map(equal, x.values(), y.values())) if hasattr(x, "keys") else x == y

    zeros = [torch.zeros(len(t.codes), 1) if t.zero is None else t.zero for t in (a, b)]
    parts = ("codes", "scale", "outer", "group_size", "bits", "element", "rows", "columns", "whole")
    return bool((zeros[0] == zeros[1]).all()) and all(equal(getattr(a, part), getattr(b, part)) for part in parts)


@pytest.mark.parametrize("name", CASES)
def test_a_file_of_this_form_closes(made, name):
    module, index, tensors, _ = made(name)
    held, ledger = account(LAYOUT, [module], index)
    assert ledger.problems == () and LAYOUT.faults([module], index) == []
    assert {spec.role for spec in held[NAME].tensors} == set(tensors)


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_any_rectangle_is_dequantized_to_the_values_of_the_table(made, name, data):
    module, index, _, value = made(name)
    rect = rectangle(data.draw, *module.shape)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    whole, part = decoded(module, index).codes, decoded(module, index, rect, dtype=dtype)
    assert near(whole, value) and part.is_float and part.codes.dtype == dtype
    assert torch.equal(part.codes, whole[rect.n0 : rect.n1, rect.k0 : rect.k1].to(dtype))


@pytest.mark.parametrize("name", CASES)
@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_shard_of_codes_is_a_slice_of_all_codes(made, name, data):
    module, index, _, value = made(name)
    held = LAYOUT.held(module, index)
    rect = rectangle(data.draw, *module.shape, held.grain)
    for scheme in held.schemes[:-1]:
        full, part = (decoded(module, index, cut, scheme) for cut in (None, rect))
        assert near(full.dequantize(), value) and full.bits == int(CASES[name][0][1])
        assert same(part, full.slice(rect.n0, rect.n1, rect.k0, rect.k1))


@pytest.mark.parametrize("name", ["static", "static, scales of 64 bits", "static, old saver", "mix"])
def test_a_static_weight_brings_what_its_inputs_need(made, name):
    module, index, tensors, _ = made(name)
    held = decoded(module, index, Rect(2, 5, 0, 24), "w8a8_static")
    deq_scale = tensors["deq_scale"]
    deq_scale = deq_scale.to(torch.int32).view(torch.float32) if deq_scale.dtype == torch.int64 else deq_scale
    assert torch.equal(held.rows["deq_scale"], deq_scale[2:5]) and held.rows["deq_scale"].dtype == torch.float32
    assert torch.equal(held.rows["quant_bias"], tensors["quant_bias"][2:5])
    assert {role: value.tolist() for role, value in held.whole.items()} == {
        "input_scale": [0.0625],
        "input_offset": [-3],
    }


@pytest.mark.parametrize("scheme", ["w8a8_mix", "w8a8_dynamic"])
def test_the_mix_run_per_token_leaves_the_corrections_of_its_static_half(made, scheme):
    # with them a float bias would be taken for added already
    module, index, *_ = made("mix")
    held = decoded(module, index, scheme=scheme)
    assert held.rows == {} and held.whole == {}


def test_the_factor_of_a_smoothed_input_is_in_its_float_weight_and_beside_its_codes(tmp_path):
    tensors = tensors_of("dynamic", np.random.default_rng(3)) | {"bias": torch.arange(7.0)}
    factor = torch.linspace(0.5, 2, 33)
    index = written(tmp_path, tensors, "W8A8_DYNAMIC", f"{NAME}.linear", **{f"{NAME}.div.mul_scale": factor})
    module, rect = linear(7, 33, bias=True), Rect(1, 6, 4, 20)
    plain = (tensors["weight"].float() * tensors["weight_scale"])[1:6, 4:20]
    assert account(LAYOUT, [module], index)[1].problems == ()
    assert torch.equal(decoded(module, index, rect).codes, plain * factor[4:20])
    held = decoded(module, index, rect, "w8a8_dynamic")
    assert torch.equal(held.columns["mul_scale"], factor[4:20]) and torch.equal(held.dequantize(), plain)
    with Reader() as reader:
        assert codec.bias(module, rect, index, reader).tolist() == [1, 2, 3, 4, 5]


def test_second_offsets_other_than_zero_are_refused(tmp_path):
    tensors = tensors_of("w4a8 in two stages", np.random.default_rng(3))
    tensors["weight_offset_second"][3, 1] = 2
    index = written(tmp_path, tensors, "W4A8_DYNAMIC")
    for scheme in ("w4a8_dynamic", "float"):
        with pytest.raises(Refused) as caught:
            decoded(linear(10, 96), index, scheme=scheme)
        assert [problem.code for problem in caught.value.problems] == ["format-feature"]


def test_what_is_not_quantized_is_read_as_it_is():
    folder = GOLDEN / "tiny-qwen3" / "modelslim-w8a8-smooth-asym"
    index, tensors, seen = open_index(folder), stored(folder), set()
    with Reader() as reader:
        for module in each(model_of(index)):
            if LAYOUT.held(module, index).scheme != "float":
                continue
            found = codec.decode(module, module.full, "float", index, reader, dtype=torch.float32).codes
            assert torch.equal(found.flatten(), tensors[f"{module.name}.weight"].float().flatten())
            seen.add(module.kind)
            if f"{module.name}.bias" in tensors:
                assert torch.equal(
                    codec.bias(module, module.full, index, reader), tensors[f"{module.name}.bias"].float()
                )
                seen.add("bias")
    assert seen == {Kind.EMBEDDING, Kind.NORM, Kind.LINEAR, "bias"}


def test_a_parameter_is_read_in_fp32_whatever_its_shape(tmp_path):
    table = torch.arange(6.0, dtype=torch.bfloat16).reshape(1, 2, 3)
    index = written(tmp_path, {"weight": torch.ones(2, 2)}, "FLOAT", scale_shift_table=table)
    module = Module("scale_shift_table", Kind.PARAMETER, (6, 1), Split.REPLICATED, dims=(1, 2, 3))
    assert decoded(module, index).codes.flatten().tolist() == [0, 1, 2, 3, 4, 5]


def test_a_rank_reads_its_rows_and_its_columns(tmp_path):
    n, k = 512, 16384
    tensors = {"weight": torch.zeros(n // 2, k, dtype=torch.int8), "weight_scale": torch.ones(n, k // 128),
               "weight_offset": torch.zeros(n, k // 128)}  # fmt: skip
    index = written(tmp_path, tensors, "W4A16")
    with Reader() as reader:
        codec.decode(linear(n, k), Rect(128, 256, 0, k), "w4a16", index, reader)
        assert reader.bytes_read == 64 * k + 2 * 128 * (k // 128) * 4
        before = reader.bytes_read
        codec.decode(linear(n, k), Rect(0, n, 0, 1024), "w4a16", index, reader)
        assert reader.bytes_read - before <= n // 2 * 1024 + 2 * n * (k // 128) * 4
