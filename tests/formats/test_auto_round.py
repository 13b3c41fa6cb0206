"""auto-round alone: packings by name, exceptions by name and expression, scales below zero."""

import numpy as np
import pytest
import safetensors.torch
import torch

from framework.checkpoint.open import open_index
from framework.checkpoint.reader import Reader
from framework.errors import Refused
from framework.formats.auto_round import decode as codec
from framework.formats.auto_round.layout import AutoRoundLayout
from framework.formats.registry import detect
from framework.geometry import Role
from tests.formats.headers import GOLDEN, account
from tests.formats.literal_words import NAME, awq, gptq, linear, made, unsigned, written

LAYOUT = AutoRoundLayout()
BASE = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": False, "data_type": "int",
        "packing_format": "auto_round:auto_gptq", "block_name_to_quantize": "model.layers"}  # fmt: skip
N, K = 16, 64
MODULE = linear(N, K)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture
def file(tmp_path, rng):
    """Make the index of a file with one linear; returns its tensors, too."""

    def make(config, along="gptq", name=NAME, **more):
        tensors = made(rng, along, N, K, 4, 32, **more)
        return written(tmp_path, tensors, {**BASE, **config}, name=name), tensors

    return make


def values(index, scheme="float"):
    with Reader() as reader:
        return codec.decode(MODULE, MODULE.full, scheme, index, reader).dequantize()


MINUS_ONE, RAW = ("gptq", True), ("gptq", False)


@pytest.mark.parametrize(
    ("packing", "wanted"),
    [
        ("auto_round:auto_gptq", MINUS_ONE),
        ("auto_round:gptq", MINUS_ONE),
        ("auto", MINUS_ONE),
        (None, MINUS_ONE),
        ("auto_round:gptqmodel", RAW),
        ("auto_round", RAW),
        ("auto_round:exllamav2", RAW),
        ("auto_round:tritonv2", RAW),
        ("auto_round:auto_awq", ("awq", None)),
        ("auto_round:awq", ("awq", None)),
    ],
)
def test_the_name_of_a_packing_says_where_words_run_and_how_zero_points_are_stored(file, packing, wanted):
    along, v1 = wanted
    index, tensors = file({"packing_format": packing}, along)
    expected = awq(tensors, 4, 32) if along == "awq" else gptq(tensors, 4, 32, v1=v1)
    assert account(LAYOUT, [MODULE], index)[1].problems == () and LAYOUT.faults([MODULE], index) == []
    assert torch.equal(values(index), torch.from_numpy(expected))
    assert torch.equal(values(index, "w4a16"), torch.from_numpy(expected))


@pytest.mark.parametrize("packing", ["auto_round:llm_compressor", "auto_round:fp8", "auto_round:mlx", "llm-awq", 7])
def test_other_packings_are_refused_by_name(file, packing):
    index, _ = file({"packing_format": packing})
    (problem,) = LAYOUT.faults([MODULE], index)
    assert problem.code == "format-feature" and str(packing).removeprefix("auto_round:") in problem.what


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"data_type": "mx_fp"}, "mx_fp"),
        ({"data_type": "fp"}, "fp"),
        ({"act_bits": 8}, "8 bits"),
        ({"rotation_config": {"hadamard": 1}}, "rotation_config"),
        ({"spinquant_config": "x"}, "spinquant_config"),
    ],
)
def test_what_is_more_than_integer_weights_is_refused(file, config, said):
    (problem,) = LAYOUT.faults([MODULE], file(config)[0])
    assert problem.code == "format-feature" and said in problem.what


@pytest.mark.parametrize("config", [{"act_bits": 16}, {"act_bits": None}, {"rotation_config": None}])
def test_what_is_off_is_no_feature(file, config):
    assert LAYOUT.faults([MODULE], file(config)[0]) == []


@pytest.mark.parametrize(("packing", "stored", "found"), [("auto_round", 7, 7), ("auto_round:auto_gptq", 8, 9)])
@pytest.mark.parametrize("scheme", ["w4a16", "float"])
def test_words_that_contradict_a_symmetric_label_are_refused_with_the_reading(file, packing, stored, found, scheme):
    index, _ = file({"packing_format": packing, "sym": True}, zero=stored)
    with pytest.raises(Refused) as caught:
        values(index, scheme)
    (problem,) = caught.value.problems
    assert problem.code == "zero-points" and f"{found}, not 8" in problem.what and "packing_format" in problem.fix


@pytest.mark.parametrize("key", ["block_name_to_quantize", "to_quant_block_names"])
@pytest.mark.parametrize(
    ("blocks", "quantized"),
    [
        ("model.layers", True),
        ("model.visual, model.layers", True),
        (["model.layers.0", "model.layers.1"], True),
        ("model.layers.0", True),
        ("model.layers.0.mlp", True),
        ("model.layer", False),  # names end at dots
        (["model.layers.1"], False),
        (None, True),
    ],
)
def test_linears_outside_of_the_named_blocks_are_float(file, key, blocks, quantized):
    index, _ = file({"block_name_to_quantize": None, key: blocks})
    found = [problem.code for problem in LAYOUT.faults([MODULE], index)]
    assert found == ([] if quantized else ["description-missing"])
    assert LAYOUT.held(MODULE, index).scheme == ("w4a16" if quantized else "float")


@pytest.mark.parametrize("blocks", [5, True, {"a": 1}])
def test_blocks_of_a_wrong_type_are_named(file, blocks):
    (problem,) = LAYOUT.faults([MODULE], file({"block_name_to_quantize": blocks})[0])
    assert problem.code == "file-malformed" and problem.why == "it takes str or list"


@pytest.mark.parametrize(
    ("extra", "wanted"),
    [
        ({NAME: {"bits": 8}}, (8, 32)),
        ({NAME: {"bits": 8, "group_size": None}, r".*down_proj": {"group_size": 16}}, (8, 32)),  # exact before all
        ({r".*down_proj": {"group_size": 16}, NAME: {"bits": 8}}, (8, 32)),
        ({r"mlp\.down": {"bits": 8}, r"model.*proj": {"group_size": 16}}, (4, 16)),  # whole names before parts
        ({r"mlp\.down": {"bits": 8}}, (8, 32)),
        ({"mlp.down_proj": {"bits": 8}}, (4, 32)),  # no expression: its own name only
        ({NAME: {"bits": None, "group_size": -1}}, (4, 0)),
        ({NAME: {}}, (4, 32)),
        ({NAME: 8}, (4, 32)),
        ({NAME: {"bits": 16}}, None),
        ({r".*\.mlp\..*": {"bits": 32, "data_type": "float"}}, None),
    ],
)
def test_exceptions_go_by_name_then_by_whole_then_by_part_of_it(file, extra, wanted):
    index, _ = file({"extra_config": extra})
    held, problems = LAYOUT.held(MODULE, index), LAYOUT.faults([MODULE], index)
    if wanted is None:
        assert [problem.code for problem in problems] == ["description-missing"] and held.scheme == "float"
        return
    assert (held.scheme, held.group) == (f"w{wanted[0]}a16", wanted[1]) and problems == []
    closes = account(LAYOUT, [MODULE], index)[1].problems == ()
    assert closes == (wanted == (4, 32))  # the file is of 4 bits, groups of 32: shapes tell


def test_an_exception_that_is_no_expression_is_named(file):
    index, _ = file({"extra_config": {".*down_proj(": {"bits": 8}}})
    (problem,) = LAYOUT.faults([MODULE], index)
    assert problem.code == "file-malformed" and "extra_config" in problem.what and ".*down_proj(" in problem.what


@pytest.mark.parametrize("extra", [None, {"lm_head": {"bits": 4, "group_size": 32, "sym": False, "super_bits": None}}])
def test_a_head_is_quantized_where_it_is_named(file, extra):
    index, _ = file({"extra_config": extra}, name="lm_head")
    head = linear(N, K, "lm_head", role=Role.HEAD)
    assert LAYOUT.held(head, index).scheme == ("w4a16" if extra else "float")
    assert [problem.code for problem in LAYOUT.faults([head], index)] == ([] if extra else ["description-missing"])


def test_older_files_spell_the_method_otherwise(file):
    index, _ = file({"quant_method": "intel/auto-round"})
    assert detect(index)[0] == "auto_round" and LAYOUT.detect(index).endswith("packing auto_gptq")


def test_scales_below_zero_keep_their_sign():
    folder = GOLDEN / "tiny-qwen3-moe" / "ar-w4g64-gptq"
    index, stored, lowest = open_index(folder), safetensors.torch.load_file(folder / "linears.safetensors"), 0
    for name in {key.rpartition(".")[0] for key in stored}:
        scales, words = stored[f"{name}.scales"].float(), unsigned(stored[f"{name}.qweight"])
        module = linear(scales.shape[1], words.shape[0] * 8, name)
        with Reader() as reader:
            held = codec.decode(module, module.full, "w4a16", index, reader)
        assert torch.equal(held.scale, scales.t()) and (scales < 0).any()
        lowest += int(((held.codes == -8) & (held.scale < 0).repeat_interleave(64, dim=1)).sum())
    assert lowest > 100  # codes that have no counterpart under a positive scale
