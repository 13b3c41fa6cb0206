"""Experts in GGUF files: stacked or apart, of types mixed by tensor, each read alone."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.checkpoint.open import open_index
from framework.checkpoint.reader import Reader
from framework.formats.gguf import decode as gguf_decode
from framework.formats.gguf.layout import GgufLayout
from framework.geometry import Kind, Module, Rect, Role, Split

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny-qwen3-moe"
TYPES = {
    "gguf-mxfp4_moe-1l": {"gate": "MXFP4", "up": "MXFP4", "down": "MXFP4"},
    "gguf-q4_k_m-1l": {"gate": "Q4_K", "up": "Q4_K", "down": "Q8_0"},
}


def experts(part, count, n, k, *, bias=False):
    name = f"model.layers.0.mlp.experts.*.{part}_proj"
    return Module(name, Kind.EXPERTS, (n, k), Split.COLUMN, "expert_mlp", experts=count, bias=bias)


def rectangle(draw, n, k):
    n0, k0 = draw(st.integers(0, n - 1)), draw(st.integers(0, k - 1))
    return Rect(n0, draw(st.integers(n0 + 1, n)), k0, draw(st.integers(k0 + 1, k)))


def written(path, tensors, architecture="llama"):
    """Index of a GGUF: pairs of a type's name and values are quantized by gguf, arrays stay as they are."""
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in tensors.items():
        kind, values = value if isinstance(value, tuple) else ("F32", value)
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quantize(values, number), raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return open_index(path)


@pytest.mark.parametrize("folder", TYPES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_rectangle_of_an_expert_is_that_of_its_place_in_the_stack(folder, data):
    path = GOLDEN / folder / "model.gguf"
    part = data.draw(st.sampled_from(["gate", "up", "down"]))
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == f"blk.0.ffn_{part}_exps.weight")
    assert tensor.tensor_type.name == TYPES[folder][part]
    stack = gguf.dequantize(tensor.data, tensor.tensor_type)  # [E, N, K]
    module = experts(part, *stack.shape)
    number, rect = data.draw(st.integers(0, module.experts - 1)), rectangle(data.draw, *module.shape)
    with Reader() as reader:
        found = gguf_decode.decode(module.expert(number), rect, "float", open_index(path), reader).codes
    assert np.array_equal(found.numpy(), stack[number, rect.n0 : rect.n1, rect.k0 : rect.k1])


@pytest.mark.parametrize("folder", TYPES)
def test_an_expert_reads_its_own_rows_only(folder):
    index = open_index(GOLDEN / folder / "model.gguf")
    for part in ("gate", "down"):
        info = index.tensors[f"blk.0.ffn_{part}_exps.weight"]
        count, n, k = info.shape
        with Reader() as reader:
            gguf_decode.decode(experts(part, count, n, k).expert(5), Rect(n // 2, n, 0, k), "float", index, reader)
            assert reader.bytes_read == info.nbytes // count // 2


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_1", "Q8_0", "MXFP4", "F16", "F32"])
@pytest.mark.parametrize("apart", [False, True])
def test_experts_that_are_stacked_and_apart_read_alike(tmp_path, kind, apart):
    count, n, k = 3, 10, 64
    values = np.random.default_rng(1).standard_normal((count, n, k)).astype(np.float32)
    number = gguf.GGMLQuantizationType[kind]
    expected = gguf.dequantize(gguf.quantize(values, number), number)
    stacked = {"blk.0.ffn_down_exps.weight": (kind, values)}
    each = {f"blk.0.ffn_{part}.{e}.weight": (kind, values[e]) for part in ("gate", "down") for e in range(count)}
    index = written(tmp_path / "m.gguf", each if apart else stacked)
    module = experts("down", count, n, k)
    assert GgufLayout().stacked(module, index) is not apart
    rect = Rect(3, 9, 32, 64)
    with Reader() as reader:
        for e in range(count):
            found = gguf_decode.decode(module.expert(e), rect, "float", index, reader, dtype=torch.bfloat16).codes
            assert torch.equal(found, torch.from_numpy(expected[e, 3:9, 32:64]).to(torch.bfloat16))


def test_biases_of_experts_are_rows_of_one_tensor(tmp_path):
    biases = np.arange(24, dtype=np.float32).reshape(3, 8)
    index = written(tmp_path / "m.gguf", {"blk.0.ffn_up_exps.bias": biases})
    module = experts("up", 3, 8, 32, bias=True)
    with Reader() as reader:
        for e in range(3):
            assert gguf_decode.bias(module.expert(e), Rect(2, 6, 0, 32), index, reader).tolist() == [*biases[e, 2:6]]


def test_the_routers_correction_is_a_tensor_named_bias(tmp_path):
    values = np.linspace(-1, 1, 8, dtype=np.float32)
    index = written(tmp_path / "m.gguf", {"blk.3.exp_probs_b.bias": values}, "deepseek2")
    name = "model.layers.3.mlp.gate.e_score_correction_bias"
    module = Module(name, Kind.PARAMETER, (8, 1), Split.REPLICATED, role=Role.ROUTER, dims=(8,))
    with Reader() as reader:
        found = gguf_decode.decode(module, module.full, "float", index, reader).codes
        assert torch.equal(found, torch.from_numpy(values).unsqueeze(1))
        bf16 = gguf_decode.decode(module, module.full, "float", index, reader, dtype=torch.bfloat16).codes
        assert bf16.dtype == torch.bfloat16
