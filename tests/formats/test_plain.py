"""Float safetensors: any rectangle of any dtype, under every wrapper's names."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.checkpoint.ledger import settle
from framework.checkpoint.open import open_index
from framework.checkpoint.reader import Reader
from framework.formats.names import naming, stem
from framework.formats.plain import decode as plain
from framework.formats.plain.layout import PlainLayout
from framework.geometry import Kind, Module, Rect, Split

BASE = Path(__file__).parents[1] / "golden" / "tiny-qwen3" / "base"
HEAD = Module("lm_head", Kind.LINEAR, (16, 8), Split.VOCAB, tied_to="model.embed_tokens")
EMBEDDING = Module("model.embed_tokens", Kind.EMBEDDING, (16, 8), Split.VOCAB)


def saved(folder, tensors):
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    return open_index(folder)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_decoding_a_rectangle_equals_slicing_the_tensor(data):
    truth = safetensors.torch.load_file(BASE / "model.safetensors")
    index = open_index(BASE)
    name = data.draw(st.sampled_from(sorted(name for name, value in truth.items() if value.ndim == 2)))
    n, k = truth[name].shape
    n0, k0 = data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, k - 1))
    rect = Rect(n0, data.draw(st.integers(n0 + 1, n)), k0, data.draw(st.integers(k0 + 1, k)))
    module = Module(name.removesuffix(".weight"), Kind.LINEAR, (n, k), Split.ROW)
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    with Reader() as reader:
        part = plain.decode(module, rect, "float", index, reader, dtype=dtype)
    assert torch.equal(part.codes, truth[name][rect.n0 : rect.n1, rect.k0 : rect.k1].to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weights_biases_and_norms_of_every_float_dtype_are_exact_in_fp32(tmp_path, dtype):
    torch.manual_seed(0)
    weight, bias, norm = torch.randn(6, 10).to(dtype), torch.randn(6).to(dtype), torch.randn(10).to(dtype)
    tensors = {"model.layers.0.self_attn.q_proj.weight": weight, "model.layers.0.self_attn.q_proj.bias": bias,
               "model.norm.weight": norm}  # fmt: skip
    index = saved(tmp_path, tensors)
    q_proj = Module("model.layers.0.self_attn.q_proj", Kind.LINEAR, (6, 10), Split.COLUMN, bias=True)
    final = Module("model.norm", Kind.NORM, (10, 1), Split.REPLICATED)
    rect = Rect(2, 5, 3, 9)
    with Reader() as reader:
        assert torch.equal(plain.decode(q_proj, rect, "float", index, reader).codes, weight[2:5, 3:9].float())
        assert torch.equal(plain.bias(q_proj, rect, index, reader), bias[2:5].float())
        assert torch.equal(plain.decode(final, final.full, "float", index, reader).codes[:, 0], norm.float())


@pytest.mark.parametrize(
    ("held", "prefix", "norm"),
    [
        ("model.embed_tokens", "", "model.norm"),
        ("language_model.model.embed_tokens", "language_model.", "language_model.model.norm"),
        ("model.language_model.embed_tokens", "model.language_model.", "model.language_model.norm"),
    ],
)
def test_the_wrapper_of_a_multimodal_checkpoint_is_found_in_the_file(tmp_path, held, prefix, norm):
    index = saved(tmp_path, {f"{held}.weight": torch.zeros(16, 8)})
    assert naming(index).prefix == prefix
    assert stem(Module("model.norm", Kind.NORM, (8, 1), Split.REPLICATED), index) == norm


def test_a_tied_head_is_the_embedding_unless_the_file_has_one(tmp_path):
    embedding = torch.zeros(16, 8)
    assert stem(HEAD, saved(tmp_path, {"model.embed_tokens.weight": embedding})) == "model.embed_tokens"
    both = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding + 1}
    assert stem(HEAD, saved(tmp_path, both)) == "lm_head"


def test_fp64_and_integer_weights_are_refused_by_the_ledger(tmp_path):
    layout = PlainLayout()
    for dtype in (torch.float64, torch.int8):
        index = saved(tmp_path, {"model.embed_tokens.weight": torch.zeros(16, 8, dtype=dtype)})
        expected = {EMBEDDING.name: layout.held(EMBEDDING, index).tensors}
        ledger = settle(index, expected, lambda name: None)
        assert [problem.code for problem in ledger.problems] == ["tensor-dtype"]


def test_columns_of_a_wide_weight_are_read_without_the_rest(tmp_path):
    weight = torch.from_numpy(np.arange(8 * 8192, dtype=np.float32).reshape(8, 8192))
    index = saved(tmp_path, {"model.embed_tokens.weight": weight})
    module = Module("model.embed_tokens", Kind.EMBEDDING, (8, 8192), Split.VOCAB)
    with Reader() as reader:
        part = plain.decode(module, Rect(1, 7, 1024, 2048), "float", index, reader)
        assert reader.bytes_read == 6 * 1024 * 4
    assert torch.equal(part.codes, weight[1:7, 1024:2048])
