"""Which format a checkpoint is of is decided by content, and said."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from framework.checkpoint.open import open_index
from framework.errors import InputError, Refused, UserError
from framework.formats.registry import LAYOUTS, decoder, detect

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


def test_every_format_has_both_halves():
    for name in LAYOUTS:
        assert callable(decoder(name).decode) and callable(decoder(name).bias)


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
def test_a_declared_quantization_is_named_and_refused_for_now(folder, config, found, as_file):
    (folder / "config.json").write_text(json.dumps(config))
    error = refusal(folder / "model.safetensors" if as_file else folder)
    assert isinstance(error, Refused)
    assert error.problems[0].code == "format-not-yet" and f"format {found} " in error.problems[0].what


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
    problem = refusal(folder).problems[0]
    assert problem.code == "format-not-yet" and found in problem.what and name in problem.why


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
