"""Canonical names meet the file's, whatever wraps the decoder and whatever Mixtral calls its experts."""

from pathlib import Path

import pytest

from framework.checkpoint.index import Index
from framework.formats.names import stem, tower
from framework.geometry import Kind, Module, Split


def index(*names):
    return Index(Path("model"), "safetensors", {f"{name}.weight": None for name in names})


def linear(name, **more):
    return Module(name, Kind.LINEAR, (2, 2), Split.REPLICATED, **more)


@pytest.mark.parametrize(
    ("embeddings", "expected"),
    [
        ("model.embed_tokens", "model.layers.0.mlp.up_proj"),
        ("language_model.model.embed_tokens", "language_model.model.layers.0.mlp.up_proj"),
        ("model.language_model.embed_tokens", "model.language_model.layers.0.mlp.up_proj"),
    ],
)
def test_a_wrapper_is_known_by_where_the_embeddings_are(embeddings, expected):
    assert stem(linear("model.layers.0.mlp.up_proj"), index(embeddings, "vision_tower.x")) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp.gate", "block_sparse_moe.gate"),
        ("mlp.experts.3.gate_proj", "block_sparse_moe.experts.3.w1"),
        ("mlp.experts.3.down_proj", "block_sparse_moe.experts.3.w2"),
        ("mlp.experts.13.up_proj", "block_sparse_moe.experts.13.w3"),
        ("self_attn.q_proj", "self_attn.q_proj"),
    ],
)
def test_mixtral_has_words_of_its_own(name, expected):
    files = index("model.embed_tokens", "model.layers.0.block_sparse_moe.gate")
    assert stem(linear(f"model.layers.0.{name}"), files) == f"model.layers.0.{expected}"


def test_a_tied_head_is_read_from_the_embeddings_unless_the_file_has_it():
    head = linear("lm_head", tied_to="model.embed_tokens")
    assert stem(head, index("model.embed_tokens")) == "model.embed_tokens"
    assert stem(head, index("model.embed_tokens", "lm_head")) == "lm_head"


def test_towers_are_said_to_be_left_out():
    assert "vision" in tower("model.vision_tower.layers.0.weight")
    assert tower("model.layers.0.mlp.up_proj.weight") is None
