"""Words of AWQ, GPTQ and auto-round: exact against the formulas of their formats, on the tools' files and others."""

import json
from dataclasses import replace
from itertools import groupby

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.checkpoint.open import open_index
from framework.checkpoint.reader import Reader
from framework.errors import Refused
from framework.formats import word_codes
from framework.formats.registry import LAYOUTS, decoder
from framework.geometry import Kind, Rect, Role
from tests.formats.golden_words import EXPECTED, OPTIONS, format_of
from tests.formats.headers import GOLDEN, account, model_of
from tests.formats.literal_words import NAME, awq, gptq, linear, made, rectangle, same, written, written_together


@pytest.fixture
def rng(request):
    return np.random.default_rng(len(request.node.name))


# real bytes: all of a checkpoint, or a few of its linears
COMMITTED = [folder for folder in EXPECTED if [*(GOLDEN / folder).glob("*.safetensors")]]


def opened(folder):
    return replace(open_index(GOLDEN / folder), options=OPTIONS.get(folder, {}))


def by_linear(folder):
    """Tensors of each quantized linear, by role."""
    (file,) = (GOLDEN / folder).glob("*.safetensors")
    tensors = safetensors.torch.load_file(file)
    split = sorted((name.rpartition(".")[::2], tensor) for name, tensor in tensors.items() if "norm" not in name)
    found = {name: {role: t for (_, role), t in group} for name, group in groupby(split, lambda item: item[0][0])}
    return {name: held for name, held in found.items() if "qweight" in held}


@pytest.mark.parametrize("folder", COMMITTED)
def test_what_the_tools_wrote_is_dequantized_exactly_in_every_scheme(folder):
    index = opened(folder)
    config = index.config["quantization_config"]
    along = awq if "awq" in json.dumps([config["quant_method"], config.get("packing_format")]) else gptq
    more = {"order": "interleaved"} if "interleaved" in folder else {}
    more = more if along is awq else {"v1": config.get("checkpoint_format") != "gptq_v2"}
    read, seen = decoder(format_of(folder)).decode, 0
    with Reader() as reader:
        for name, tensors in by_linear(folder).items():
            bits, group, symmetric = next(one for part, one in EXPECTED[folder].items() if part in name)
            expected = torch.from_numpy(along(tensors, bits, group, **more))
            module = linear(*expected.shape, name)
            values = read(module, module.full, "float", index, reader, dtype=torch.float32).codes
            held = read(module, module.full, f"w{bits}a16", index, reader)
            assert torch.equal(values, expected) and torch.equal(held.dequantize(), expected), name
            assert (held.zero is None) == symmetric and held.codes.dtype == torch.int8 and held.bits == bits
            assert (held.order is not None) == ("descact" in folder)
            seen += 1
    assert seen == len([name for name in index.tensors if name.endswith("qweight")])


def test_two_byte_orders_of_the_same_integers_are_the_same_weight():
    found = []
    for folder in ("awq-w8g128", "awq-w8g128-interleaved"):
        index = opened(f"tiny-qwen3/{folder}")
        module = linear(128, 256, "model.layers.0.self_attn.k_proj")
        with Reader() as reader:
            found.append(decoder("awq").decode(module, module.full, "float", index, reader).codes)
    assert torch.equal(*found)


BASE = {"group_size": 32, "bits": 4}
# config, then along, n, k, and what else `made` takes
CASES = {
    "awq": ({"quant_method": "awq", **BASE}, "awq", 24, 96, {}),
    "awq, bf16 scales": ({"quant_method": "awq", **BASE}, "awq", 24, 96, {"scales": torch.bfloat16}),
    "awq, one scale a row": ({"quant_method": "awq", "bits": 4, "group_size": -1}, "awq", 16, 40, {}),
    "awq, old names": ({"quant_method": "awq", "w_bit": 4, "q_group_size": 16}, "awq", 16, 48, {}),
    "awq, symmetric": ({"quant_method": "awq", **BASE, "zero_point": False}, "awq", 16, 64, {"zero": 8}),
    "awq, 8 bits": ({"quant_method": "awq", "bits": 8, "group_size": 32, "meta": {"quantizer": ["gptqmodel:7.7.0"]}},
                    "awq", 12, 64, {}),
    "awq, a last group of less": ({"quant_method": "awq", **BASE}, "awq", 16, 80, {}),
    "gptq": ({"quant_method": "gptq", **BASE}, "gptq", 20, 96, {"zero": 7}),
    "gptq, 8 bits": ({"quant_method": "gptq", "bits": 8, "group_size": 32}, "gptq", 10, 64, {"zero": 127}),
    "gptq, zero points": ({"quant_method": "gptq", **BASE, "sym": False}, "gptq", 20, 96, {}),
    "gptq, zero points v2": ({"quant_method": "gptq", **BASE, "sym": False, "checkpoint_format": "gptq_v2"},
                             "gptq", 20, 96, {}),
    "gptq, 8 bits, zero points": ({"quant_method": "gptq", "bits": 8, "group_size": 32, "sym": False},
                                  "gptq", 10, 64, {}),
    "gptq, act order": ({"quant_method": "gptq", **BASE, "sym": False, "desc_act": True}, "gptq", 12, 128,
                        {"order": True}),
    "gptq, one scale a row": ({"quant_method": "gptq", "bits": 4, "group_size": -1, "sym": False}, "gptq", 9, 40, {}),
    "gptq, groups across words": ({"quant_method": "gptq", "bits": 4, "group_size": 12, "sym": False},
                                  "gptq", 9, 72, {}),
    "gptq, a last group of less": ({"quant_method": "gptq", **BASE, "sym": False}, "gptq", 9, 80, {}),
    "auto-round, native": ({"quant_method": "auto-round", "packing_format": "auto_round", **BASE, "sym": False},
                           "gptq", 12, 96, {}),
    "auto-round, gptq": ({"quant_method": "auto-round", **BASE, "sym": False}, "gptq", 12, 96, {}),
    "auto-round, awq": ({"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", **BASE,
                         "sym": False}, "awq", 16, 96, {}),
}  # fmt: skip


def case(name, folder, rng, count=1):
    """Modules, index, format and weights of a case."""
    config, along, n, k, more = CASES[name]
    bits, group = config.get("bits", 4), config.get("group_size", config.get("q_group_size"))
    group = 0 if group == -1 else group
    v1 = config.get("checkpoint_format") != "gptq_v2" and config.get("packing_format") != "auto_round"
    modules = [linear(n, k, NAME.replace("0", str(i))) for i in range(count)]
    tensors = {module.name: made(rng, along, n, k, bits, group, **more) for module in modules}
    values = [awq(t, bits, group) if along == "awq" else gptq(t, bits, group, v1=v1) for t in tensors.values()]
    own = {"awq": "awq", "gptq": "gptq", "auto-round": "auto_round"}[config["quant_method"]]
    return modules, written_together(folder, tensors, config), own, [torch.from_numpy(value) for value in values]


@pytest.mark.parametrize("name", CASES)
def test_any_rectangle_is_the_formula_s_and_shards_are_slices(name, tmp_path_factory, rng):
    (module,), index, own, (value,) = case(name, tmp_path_factory.mktemp("words"), rng)
    held, read = LAYOUTS[own].held(module, index), decoder(own).decode
    scheme, ordered = held.scheme, "act order" in name
    assert account(LAYOUTS[own], [module], index)[1].problems == () and LAYOUTS[own].faults([module], index) == []
    with Reader() as reader:
        full = read(module, module.full, scheme, index, reader)
        if "a last group of less" not in name:  # no operator takes it
            assert torch.equal(full.dequantize(), value)

        @settings(max_examples=25, deadline=None)
        @given(st.data())
        def cut(data):
            rect = rectangle(data.draw, *module.shape)
            dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
            part = read(module, rect, "float", index, reader, dtype=dtype)
            assert part.is_float and part.codes.dtype == dtype
            assert torch.equal(part.codes, value[rect.n0 : rect.n1, rect.k0 : rect.k1].to(dtype))
            rect = rectangle(data.draw, *module.shape, held.grain)
            part = read(module, rect, scheme, index, reader)
            assert same(part, full.slice(rect.n0, rect.n1, rect.k0, rect.k1)) and (part.order is not None) == ordered

        cut()


@pytest.mark.parametrize("name", [name for name in CASES if "a last group of less" not in name])
def test_weights_that_are_decoded_together_are_each_the_formula_s(name, tmp_path, rng, monkeypatch):
    modules, index, own, values = case(name, tmp_path, rng, count=5)
    held, (n, k) = LAYOUTS[own].held(modules[0], index), modules[0].shape
    monkeypatch.setattr(word_codes, "TABLE_BYTES", 2 * 4 * n * (k // held.group if held.group else 1))
    half = Rect(0, n // 2 // held.grain[0] * held.grain[0] or n, 0, k)
    with Reader() as reader:
        for rect in (modules[0].full, half):
            for scheme in (held.scheme, "float"):
                found = decoder(own).decode_experts(modules, rect, scheme, index, reader)
                for weight, value in zip(found, values, strict=True):
                    assert torch.equal(weight.dequantize(), value[rect.n0 : rect.n1])


def test_float_weights_beside_codes_are_decoded_together_too(tmp_path, rng):
    modules = [linear(16, 32, NAME.replace("0", str(i))) for i in range(3)]
    tensors = {module.name: {"weight": torch.randn(16, 32)} for module in modules}
    index = written_together(tmp_path, tensors, {"quant_method": "awq", **BASE})
    with Reader() as reader:
        found = list(decoder("awq").decode_experts(modules, modules[0].full, "float", index, reader))
    assert all(torch.equal(f.codes, t["weight"]) for f, t in zip(found, tensors.values(), strict=True))


def test_of_weights_that_are_decoded_together_the_wrong_one_is_named(tmp_path, rng):
    modules = [linear(16, 64, NAME.replace("0", str(i))) for i in range(3)]
    zeros = zip(modules, (8, 8, 5), strict=True)
    tensors = {module.name: made(rng, "awq", 16, 64, 4, 32, zero=zero) for module, zero in zeros}
    index = written_together(tmp_path, tensors, {"quant_method": "awq", **BASE, "zero_point": False})
    with Reader() as reader, pytest.raises(Refused) as refused:
        list(decoder("awq").decode_experts(modules, modules[0].full, "w4a16", index, reader))
    (problem,) = refused.value.problems
    assert problem.code == "zero-points" and problem.what.startswith(modules[2].name) and "5, not 8" in problem.what


def test_large_weights_are_decoded_in_chunks_and_a_rank_reads_its_share(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(word_codes, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(word_codes, "CHUNK_BYTES", 1 << 12)
    n, k = 1000, 2048
    config = {"quant_method": "gptq", "bits": 4, "group_size": 128, "sym": False}
    tensors = made(rng, "gptq", n, k, 4, 128)
    index, module, read = written(tmp_path, tensors, config), linear(n, k), decoder("gptq").decode
    value, calls = torch.from_numpy(gptq(tensors, 4, 128, v1=True)), []

    class Watched(Reader):
        def read(self, info, row0, row1, *columns):
            calls.append((info.name, row1 - row0))
            return super().read(info, row0, row1, *columns)

    with Watched() as reader:
        for scheme in ("w4a16", "float"):
            assert torch.equal(read(module, module.full, scheme, index, reader).dequantize(), value)
            rows = [count for name, count in calls if name.endswith("qweight")]
            # codes that stay packed are read once, they are no larger than what is kept
            assert sum(rows) == k // 8 and (scheme == "w4a16" or max(rows) * 4 * n <= 1 << 16)
            calls.clear()
        before = reader.bytes_read
        read(module, Rect(0, n, k // 2, k), "w4a16", index, reader)
        # half of codes, and of the groups' scales and zero points
        assert reader.bytes_read - before == n * k // 2 // 2 + 8 * (2 * n + n // 2)


def test_what_is_not_quantized_is_read_as_it_is():
    folder = GOLDEN / "tiny-qwen3-moe" / "awq-w4g64"
    index, stored = open_index(folder), safetensors.torch.load_file(folder / "model.safetensors")
    seen = set()
    with Reader() as reader:
        for module in model_of(index):
            if f"{module.name}.weight" in stored:
                values = decoder("awq").decode(module, module.full, "float", index, reader, dtype=torch.float32).codes
                assert torch.equal(values.flatten(), stored[f"{module.name}.weight"].float().flatten()), module.name
                seen.add(module.kind if module.role is not Role.ROUTER else module.role)
    assert seen == {Kind.EMBEDDING, Kind.NORM, Kind.LINEAR, Role.ROUTER}


def test_a_bias_is_its_own(tmp_path, rng):
    tensors = made(rng, "gptq", 8, 32, 4, 32, zero=7) | {"bias": torch.arange(8).half()}
    index, module = written(tmp_path, tensors, {"quant_method": "gptq", **BASE}), linear(8, 32, bias=True)
    assert account(LAYOUTS["gptq"], [module], index)[1].problems == ()
    with Reader() as reader:
        assert decoder("gptq").bias(module, Rect(2, 5, 0, 32), index, reader).tolist() == [2, 3, 4]


def test_the_hand_typed_words_are_their_numbers(tmp_path):
    """q = 0..7 and z = 0, 8, 8, ..: one word each, from the descriptions of the formats."""
    one = torch.ones(1, 8, dtype=torch.float16)
    word = lambda value: torch.tensor([[value - (1 << 32) if value >> 31 else value]], dtype=torch.int32)  # noqa: E731
    cases = [
        ("awq", {"qweight": word(0x75316420), "qzeros": word(0)}, {}, (8, 1), [[q] for q in range(8)]),
        ("gptq", {"qweight": word(0x76543210).expand(1, 8), "qzeros": word(0x7777776F)}, {}, (8, 8),
         [[*range(8)], *([[q - 8 for q in range(8)]] * 7)]),
        ("gptq", {"qweight": word(0x76543210).expand(1, 8), "qzeros": word(0x88888880)},
         {"checkpoint_format": "gptq_v2"}, (8, 8), [[*range(8)], *([[q - 8 for q in range(8)]] * 7)]),
    ]  # fmt: skip
    for number, (own, tensors, more, shape, expected) in enumerate(cases):
        folder = tmp_path / str(number)
        folder.mkdir()
        config = {"quant_method": own, "bits": 4, "group_size": -1, "sym": False, **more}
        index = written(folder, {**tensors, "scales": one}, config)
        with Reader() as reader:
            module = linear(*shape, NAME)
            assert decoder(own).decode(module, module.full, "float", index, reader).codes.tolist() == expected
