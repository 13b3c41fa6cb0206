"""AWQ alone: versions of the words, the order of bytes, what the file decides against its config."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from framework.checkpoint.open import open_index
from framework.checkpoint.reader import Reader
from framework.errors import Refused
from framework.formats.awq import decode as codec
from framework.formats.awq.layout import AwqLayout
from framework.formats.declared import settings
from framework.geometry import Kind, Module, Role, Split
from tests.formats.headers import account
from tests.formats.literal_words import NAME, awq, linear, made, written

LAYOUT = AwqLayout()
BASE = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
GPTQMODEL = {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}
N, K = 16, 64


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.fixture
def file(tmp_path, rng):
    """Make the index of a file with one linear; returns its tensors, too."""

    def make(config, bits=4, **more):
        tensors = made(rng, "awq", N, K, bits, 32, **more)
        return written(tmp_path, tensors, {**BASE, **config}), tensors

    return make


def codes(index, *model):
    return [problem.code for problem in LAYOUT.faults(model or [linear(N, K)], index)]


@pytest.mark.parametrize("version", ["gemv", "gemv_fast", "llm-awq", "marlin", "exllama", 4])
@pytest.mark.parametrize("key", ["version", "format", "checkpoint_format"])
def test_other_layouts_of_the_words_are_refused_by_name(file, key, version):
    index, _ = file({"version": None, key: version})
    (problem,) = LAYOUT.faults([linear(N, K)], index)
    assert problem.code == "format-feature" and str(version) in problem.what


@pytest.mark.parametrize("config", [{"version": "GEMM"}, {"version": None}, {"version": None, "format": "gemm"}])
def test_the_version_that_is_read_has_several_spellings(file, config):
    assert codes(file(config)[0]) == []


@pytest.mark.parametrize("source", ["config", "bits by rule"])
def test_bytes_whose_order_nobody_says_are_refused_and_the_recipe_may_say_it(file, source):
    by_rule = {"dynamic": {r"+:.*down_proj": {"bits": 8}}}
    index, tensors = file({"bits": 8} if source == "config" else by_rule, bits=8)
    (problem,) = LAYOUT.faults([linear(N, K)], index)
    assert problem.code == "awq-byte-order" and NAME in problem.what
    values = {}
    for order in ("natural", "interleaved"):
        said = replace(index, options={"awq_byte_order": order})
        assert codes(said) == [] and LAYOUT.held(linear(N, K), said).variant == order
        with Reader() as reader:
            values[order] = codec.decode(linear(N, K), linear(N, K).full, "float", said, reader).codes
        assert torch.equal(values[order], torch.from_numpy(awq(tensors, 8, 32, order=order)))
    assert not torch.equal(*values.values())


def test_the_writer_of_natural_bytes_is_known_and_the_recipe_may_contradict_it(file):
    index, _ = file({"bits": 8, **GPTQMODEL}, bits=8)
    assert codes(index) == [] and LAYOUT.held(linear(N, K), index).variant == "natural"
    said = replace(index, options={"awq_byte_order": "interleaved"})
    assert LAYOUT.held(linear(N, K), said).variant == "interleaved"


@pytest.mark.parametrize("excluded", [["down_proj"], ["gate", "lm_head"], None, "down", [NAME]])
def test_codes_in_the_file_count_more_than_a_list_of_names(file, excluded):
    index, _ = file({"modules_to_not_convert": excluded})
    held, ledger = account(LAYOUT, [linear(N, K)], index)
    assert held[NAME].scheme == "w4a16" and ledger.problems == () and codes(index) == []


def test_a_router_may_be_quantized_and_an_embedding_may_not(file):
    index, _ = file({})
    assert LAYOUT.held(linear(N, K, role=Role.ROUTER), index).scheme == "w4a16"
    table = Module(NAME, Kind.EMBEDDING, (N, K), Split.VOCAB)
    _, ledger = account(LAYOUT, [table], index)
    assert ledger.missing == (f"{NAME}.weight",) and len(ledger.unexpected) == 3


def test_codes_that_a_rule_keeps_float_are_named(file):
    index, _ = file({"dynamic": {"-:.*down_proj": {}}})
    (problem,) = LAYOUT.faults([linear(N, K)], index)
    assert problem.code == "description-missing" and NAME in problem.what
    assert account(LAYOUT, [linear(N, K)], index)[1].problems == ()  # the fault says it better


def test_a_rule_that_is_no_expression_is_named(file):
    index, _ = file({"dynamic": {"+:.*[": {"bits": 8}}})
    assert codes(index) == ["file-malformed"]


def test_words_that_contradict_a_symmetric_config_are_refused(file):
    index, _ = file({"zero_point": False}, zero=7)
    for scheme in ("w4a16", "float"):
        with pytest.raises(Refused) as caught, Reader() as reader:
            codec.decode(linear(N, K), linear(N, K).full, scheme, index, reader)
        (problem,) = caught.value.problems
        assert problem.code == "zero-points" and "7, not 8" in problem.what and "zero_point" in problem.fix


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}),
        ("quantize_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}),
    ],
)
def test_the_old_files_beside_the_config_declare_it(file, tmp_path, name, given):
    index, tensors = file({})
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_text(json.dumps(given))
    index = open_index(tmp_path)
    assert settings(index, "awq") == given and codes(index) == []
    assert LAYOUT.detect(index) == "says awq: 4 bits, groups of 32"
    with Reader() as reader:
        values = codec.decode(linear(N, K), linear(N, K).full, "float", index, reader).codes
    assert torch.equal(values, torch.from_numpy(awq(tensors, 4, 32)))
