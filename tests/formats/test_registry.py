"""Which format a checkpoint is of is decided by content, and said."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from framework.checkpoint.open import open_index
from framework.errors import InputError, UserError
from framework.formats.registry import detect

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny-qwen3"


@pytest.fixture
def folder(tmp_path):
    safetensors.numpy.save_file({"a.weight": np.ones((4, 8), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def refusal(path, asked="auto"):
    with pytest.raises(UserError) as caught:
        detect(open_index(path), asked)
    return caught.value


def test_float_safetensors_and_ggufs_are_known_with_evidence():
    assert detect(open_index(GOLDEN / "base")) == (
        "none",
        "nothing declares a quantization; tensors are BF16",
    )
    name, why = detect(open_index(GOLDEN / "gguf-zoo"))
    assert name == "gguf" and "IQ4_NL" in why


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "awq"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"quantization_config": {"quant_method": "auto-round"}}, "auto_round"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "compressed_tensors"),
        ({"compression_config": {"config_groups": {}}}, "compressed_tensors"),
        ({"text_config": {"quantization_config": {"quant_method": "gptq"}}}, "gptq"),
    ],
)
@pytest.mark.parametrize("as_file", [False, True])
def test_a_declared_quantization_is_found_where_it_is_declared(folder, config, found, as_file):
    (folder / "config.json").write_text(json.dumps(config))
    name, why = detect(open_index(folder / "model.safetensors" if as_file else folder))
    assert name == found and why.startswith("config.json")


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("quant_model_description.json", "modelslim"),
        ("quant_model_description_w8a8_dynamic.json", "modelslim"),
        ("quantize_config.json", "gptq"),
        ("quantization_config.json", "auto_round"),
    ],
)
def test_a_description_beside_the_weights_is_seen(folder, name, found):
    (folder / name).write_text("{}")
    format_name, why = detect(open_index(folder))
    assert format_name == found and why.startswith(name)


def test_two_descriptions_are_refused_with_their_names(folder):
    for name in ("quant_model_description_w8a8.json", "quant_model_description_w4a4.json"):
        (folder / name).write_text("{}")
    problem = refusal(folder).problems[0]
    assert problem.code == "format-conflict" and "w8a8" in problem.why and "w4a4" in problem.why


def test_sources_that_disagree_are_refused_until_the_recipe_picks_one(folder):
    (folder / "quant_model_description.json").write_text('{"a.weight": "W8A8"}')
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq"}}')
    problem = refusal(folder).problems[0]
    assert problem.code == "format-conflict"
    assert "quant_model_description.json" in problem.what and "config.json" in problem.what
    assert detect(open_index(folder), "modelslim")[0] == "modelslim"
    assert detect(open_index(folder), "gptq")[0] == "gptq"


def test_a_method_that_nobody_here_knows_is_refused_by_its_name(folder):
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "fp8"}}')
    problem = refusal(folder).problems[0]
    assert problem.code == "format-unsupported" and "fp8" in problem.what


@pytest.mark.parametrize(
    "text", ['{"quantization_config": "x"}', '{"quantization_config": [1]}', "[]", "{", "[" * 100000]
)
def test_a_config_that_makes_no_sense_is_malformed(folder, text):
    (folder / "config.json").write_text(text)
    error = refusal(folder)
    assert isinstance(error, InputError) and error.problems[0].code == "file-malformed"


def test_a_format_asked_for_must_be_the_one_found(folder):
    assert detect(open_index(folder), "none")[0] == "none"
    assert refusal(folder, "gguf").problems[0].code == "format-mismatch"
    assert refusal(folder, "awg").problems[0].code == "unknown-format"
