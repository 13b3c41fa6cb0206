"""GPTQ alone: zero points minus one, activation order, rules by name, labels that words contradict."""

import numpy as np
import pytest
import safetensors.torch
import torch

from framework.checkpoint.reader import Reader
from framework.errors import InputError, Refused
from framework.formats.gptq import decode as codec
from framework.formats.gptq.layout import GptqLayout
from framework.geometry import Rect
from tests.formats.headers import GOLDEN, account
from tests.formats.literal_words import NAME, gptq, linear, made, unsigned, written

LAYOUT = GptqLayout()
BASE = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
N, K = 16, 128
MODULE = linear(N, K)


@pytest.fixture
def rng():
    return np.random.default_rng(6)


@pytest.fixture
def file(tmp_path, rng):
    """Make the index of a file with one linear; returns its tensors, too."""

    def make(config, changed=lambda tensors: tensors, **more):
        tensors = changed(made(rng, "gptq", N, K, 4, 32, **more))
        return written(tmp_path, tensors, {**BASE, **config}), tensors

    return make


def values(index, rect=MODULE.full, scheme="float"):
    with Reader() as reader:
        return codec.decode(MODULE, rect, scheme, index, reader).dequantize()


@pytest.mark.parametrize(
    "config",
    [
        {"checkpoint_format": "gptq_p"},
        {"checkpoint_format": "marlin"},
        {"format": "bitblas"},
        {"checkpoint_format": ["gptq"]},
        {"is_marlin_format": True},
        {"pack_dtype": "int64"},
        {"pack_dtype": 16},
    ],
)
def test_other_layouts_of_the_words_are_refused(file, config):
    (problem,) = LAYOUT.faults([MODULE], file(config, zero=7)[0])
    assert problem.code == "format-feature" and problem.where.endswith("quantization_config")


@pytest.mark.parametrize(
    ("config", "variant"),
    [
        ({}, "v1"),
        ({"checkpoint_format": ""}, "v1"),
        ({"checkpoint_format": None, "format": "gptq"}, "v1"),
        ({"format": "gptq_v2"}, "v2"),
        ({"checkpoint_format": "GPTQ_V2"}, "v2"),
        ({"pack_dtype": "torch.int32", "is_marlin_format": False, "provider": "auto-round"}, "v1"),
    ],
)
def test_a_file_says_whether_its_zero_points_are_minus_one(file, config, variant):
    index, _ = file(config, zero={"v1": 7, "v2": 8}[variant])
    assert LAYOUT.faults([MODULE], index) == [] and LAYOUT.held(MODULE, index).variant == variant
    assert values(index).abs().max() > 0 and f"zero points {variant}" in LAYOUT.detect(index)


@pytest.mark.parametrize(("label", "stored", "found"), [("gptq", 8, 9), ("gptq_v2", 7, 7)])
@pytest.mark.parametrize("scheme", ["w4a16", "float"])
def test_words_that_contradict_a_symmetric_label_are_refused(file, label, stored, found, scheme):
    index, _ = file({"checkpoint_format": label}, zero=stored)
    with pytest.raises(Refused) as caught:
        values(index, scheme=scheme)
    (problem,) = caught.value.problems
    assert problem.code == "zero-points" and f"{found}, not 8" in problem.what and "checkpoint_format" in problem.fix


def test_zero_points_of_0_borrow_from_their_word():
    folder, name = GOLDEN / "tiny-qwen3" / "gptq-w4g64-asym-zero0", "model.layers.0.self_attn.o_proj"
    words = unsigned(safetensors.torch.load_file(folder / "linears.safetensors")[f"{name}.qzeros"])
    fields = np.stack([(words >> 4 * field) & 15 for field in range(8)])
    whole = np.stack([((words + 0x11111111) % (1 << 32) >> 4 * field) & 15 for field in range(8)])
    # the file has what tells both ways apart; test_words_decode reads it by whole words
    assert (whole == 0).any() and (fields + 1 != whole).sum() > 100


@pytest.mark.parametrize(
    ("dynamic", "wanted"),
    [
        ({"-:.*mlp.*": {}}, None),
        ({"-:model.layers.0.mlp": {}}, (4, 32)),  # without operators: the whole name
        ({f"-:{NAME}": {}}, None),
        ({"-:" + NAME.replace(".", r"\."): {}}, None),
        ({r"-:layers\.0\..*": {}}, (4, 32)),  # from the start of the name
        ({r"model\.layers\.\d+\.mlp": {"bits": 8}}, (8, 32)),  # not to its end
        ({"+:.*down.*": {"group_size": 64}, ".*": {"bits": 8}}, (4, 64)),  # the first that matches, alone
        ({".*up.*": {"bits": 8}, "+:.*": {"bits": 8, "group_size": -1}}, (8, 0)),
        ({".*": {"bits": None, "group_size": None}}, (4, 32)),
        ({".*": None}, (4, 32)),
        (None, (4, 32)),
    ],
)
def test_rules_are_ordered_and_the_first_that_matches_wins(file, dynamic, wanted):
    index, _ = file({"dynamic": dynamic, "sym": False})
    problems = LAYOUT.faults([MODULE], index)
    if wanted is None:
        assert [problem.code for problem in problems] == ["description-missing"]
        return
    bits, group = wanted
    held = LAYOUT.held(MODULE, index)
    assert (held.scheme, held.group) == (f"w{bits}a16", group) and problems == []
    matching = account(LAYOUT, [MODULE], index)[1].problems == ()
    assert matching == (wanted == (4, 32))  # the file is of 4 bits, groups of 32: shapes tell


@pytest.mark.parametrize("pattern", ["+:(", "*", "-:[", "a{99999999999}", "(" * 5000])
def test_every_rule_that_is_no_expression_is_named(file, pattern):
    index, _ = file({"dynamic": {pattern: {"bits": 8}, ".*[": {}}}, zero=7)
    problems = LAYOUT.faults([MODULE], index)
    assert [problem.code for problem in problems] == ["file-malformed"] * 2
    assert repr(pattern)[:20] in problems[0].what and "dynamic" in problems[0].what


def shuffled(order):
    def change(tensors):
        return tensors | {"g_idx": torch.from_numpy(order.astype(np.int32))}

    return change


def test_activation_order_keeps_columns_together(file, rng):
    index, tensors = file({"desc_act": True, "sym": False}, order=True)
    expected = torch.from_numpy(gptq(tensors, 4, 32, v1=True))
    held = LAYOUT.held(MODULE, index)
    assert held.grain == (1, K) and held.label == "4 bits, groups of 32, act order"
    with Reader() as reader:
        part = codec.decode(MODULE, Rect(3, 9, 0, K), "w4a16", index, reader)
    groups = tensors["g_idx"].long()
    assert torch.equal(groups[part.order], groups.sort().values) and torch.equal(
        part.order.sort().values, torch.arange(K)
    )
    assert torch.equal(part.dequantize(), expected[3:9])
    assert torch.equal(values(index, Rect(3, 9, 20, 90)), expected[3:9, 20:90])  # float may be cut anywhere


def test_an_order_that_the_config_does_not_say_is_run_whole_and_refused_cut(file):
    index, tensors = file({"sym": False}, order=True)
    expected = torch.from_numpy(gptq(tensors, 4, 32, v1=True))
    assert torch.equal(values(index, scheme="w4a16"), expected) and torch.equal(values(index), expected)
    with pytest.raises(InputError) as caught:
        values(index, Rect(0, N, 0, 32), "w4a16")
    (problem,) = caught.value.problems
    assert problem.code == "file-malformed" and "activation order" in problem.what


@pytest.mark.parametrize("groups", [np.arange(K) // 16, np.zeros(K), np.arange(K) // 32 + 1, np.full(K, -1)])
@pytest.mark.parametrize("scheme", ["w4a16", "float"])
def test_groups_that_are_not_whole_are_refused(file, groups, scheme):
    index, _ = file({"sym": False}, shuffled(groups))
    with pytest.raises(InputError) as caught:
        values(index, scheme=scheme)
    assert [problem.code for problem in caught.value.problems] == ["file-malformed"]


def test_order_in_name_only_is_none(file):
    index, tensors = file({"desc_act": True}, shuffled(np.arange(K) // 32), zero=7)
    with Reader() as reader:
        assert codec.decode(MODULE, MODULE.full, "w4a16", index, reader).order is None
    assert torch.equal(values(index), torch.from_numpy(gptq(tensors, 4, 32, v1=True)))


@pytest.mark.parametrize(("ordered", "missing"), [(True, (f"{NAME}.g_idx",)), (False, ())])
def test_g_idx_may_be_missing_unless_it_says_an_order(file, ordered, missing):
    index, _ = file({"desc_act": ordered}, zero=7)
    assert account(LAYOUT, [MODULE], index)[1].missing == missing


def test_one_group_has_no_order(tmp_path, rng):
    tensors = made(rng, "gptq", N, K, 4, 0) | {"g_idx": torch.zeros(K, dtype=torch.int32)}
    index = written(tmp_path, tensors, {**BASE, "group_size": -1, "desc_act": True, "sym": False})
    assert account(LAYOUT, [MODULE], index)[1].problems == () and LAYOUT.held(MODULE, index).grain == (1, 1)
    assert torch.equal(values(index), torch.from_numpy(gptq({**tensors}, 4, 0, v1=True)))
