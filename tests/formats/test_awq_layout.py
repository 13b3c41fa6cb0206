"""AWQ: what config and headers say of every module, without a byte of a weight."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from framework.checkpoint.index import Index, TensorInfo
from framework.checkpoint.ledger import settle
from framework.checkpoint.open import open_index
from framework.families.base import modules
from framework.families.config import describe
from framework.formats.awq.layout import AwqLayout
from framework.formats.registry import detect
from framework.geometry import Kind, Module, Role, Split

GOLDEN = Path(__file__).parents[1] / "golden"
LAYOUT = AwqLayout()
N, K = 64, 256
NAME = "model.layers.1.mlp.up_proj"
HEAD = Module("lm_head", Kind.LINEAR, (N, K), Split.VOCAB, role=Role.HEAD)
GPTQMODEL = {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}


def linear(name=NAME, n=N, k=K, **more):
    return Module(name, Kind.LINEAR, (n, k), Split.COLUMN, **more)


def index_of(config, tensors=(), documents=None, **options):
    infos = {name: TensorInfo(name, Path("model.safetensors"), 0, 0, dtype, shape) for name, dtype, shape in tensors}
    declared = {"quantization_config": {"quant_method": "awq", **config}} if config is not None else {}
    return Index(Path("model"), "safetensors", infos, config=declared, documents=documents or {}, options=options)


def coded(name=NAME, bits=4, groups=2, n=N, k=K):
    """Tensors of one linear, by the format's definition."""
    words = n * bits // 32
    return [(f"{name}.qweight", "I32", (k, words)), (f"{name}.qzeros", "I32", (groups, words)),
            (f"{name}.scales", "F16", (groups, n))]  # fmt: skip


def kept(name=NAME, n=N, k=K):
    return [(f"{name}.weight", "F16", (n, k))]


def each(model):
    for module in model:
        yield from [module.expert(e) for e in range(module.experts)] if module.experts else [module]


def account(model, index):
    """Held by module, and the ledger of the file."""
    held = {module.name: LAYOUT.held(module, index) for module in each(model)}
    tensors = {name: one.tensors for name, one in held.items()}
    return held, settle(index, tensors, lambda name: LAYOUT.ignorable(name, index))


def form(held):
    return held.scheme, held.group, held.symmetric, held.variant, held.grain


def told(index, *model):
    """What is wrong, where some other linear of the file has codes."""
    other = linear("model.layers.0.self_attn.q_proj")
    more = index_of({}, coded(other.name)).tensors
    return LAYOUT.faults([*model, other], replace(index, tensors=more | index.tensors))


def codes(index, *model):
    return [problem.code for problem in told(index, *model)]


FLOAT = ("float", 0, True, "", (1, 1))


def row(bits, group, symmetric=False, variant=""):
    return f"w{bits}a16", group, symmetric, variant, (1, group or 1)


def test_the_order_of_bytes_that_the_file_does_not_say_comes_from_the_recipe():
    other = linear("model.layers.2.mlp.up_proj")
    index = index_of({"bits": 8, "group_size": 128}, coded(bits=8) + coded(other.name, 8))
    (problem,) = LAYOUT.faults([linear(), other], index)
    assert problem.what.startswith("2 linears of 8 bits") and "awq_byte_order=interleaved" in problem.fix
    for order in ("natural", "interleaved"):
        said = replace(index, options={"awq_byte_order": order})
        assert LAYOUT.faults([linear(), other], said) == [] and LAYOUT.held(other, said).variant == order


@pytest.mark.parametrize(
    ("config", "options", "variant"),
    [
        ({}, {}, ""),
        (GPTQMODEL, {}, "natural"),
        ({"meta": {"quantizer": "gptqmodel:7.7.0"}}, {}, "natural"),
        (GPTQMODEL, {"awq_byte_order": "interleaved"}, "interleaved"),
        ({"meta": {"quantizer": ["other:1.0"]}}, {}, ""),
        ({"meta": "gptqmodel"}, {}, ""),
    ],
)
def test_only_eight_bits_have_an_order_of_bytes(config, options, variant):
    assert LAYOUT.held(linear(), index_of({"bits": 8, **config}, **options)).variant == variant
    assert LAYOUT.held(linear(), index_of({"bits": 4, **config}, **options)).variant == ""


@pytest.mark.parametrize(
    ("config", "n", "tensors"),
    [
        ({"bits": 4, "group_size": 128}, 64, {"qweight": (256, 8), "qzeros": (2, 8), "scales": (2, 64)}),
        ({"bits": 8, "group_size": 64}, 64, {"qweight": (256, 16), "qzeros": (4, 16), "scales": (4, 64)}),
        ({"bits": 4, "group_size": -1}, 64, {"qweight": (256, 8), "qzeros": (1, 8), "scales": (1, 64)}),
        ({"w_bit": 4, "q_group_size": 64}, 16, {"qweight": (256, 2), "qzeros": (4, 2), "scales": (4, 16)}),
    ],
)
def test_every_width_has_its_tensors_under_either_name_of_each_key(config, n, tensors):
    held = LAYOUT.held(linear(n=n), index_of(config))
    assert {spec.role: spec.shape for spec in held.tensors} == tensors
    kinds = {spec.role: spec.dtypes for spec in held.tensors}
    assert kinds["qweight"] == kinds["qzeros"] == ("I32",) and {"F16", "BF16"} <= set(kinds["scales"])


@pytest.mark.parametrize(("zero_point", "symmetric"), [(True, False), (False, True), (None, False)])
def test_without_zero_points_the_file_has_them_all_the_same(zero_point, symmetric):
    held = LAYOUT.held(linear(), index_of({"zero_point": zero_point}))
    assert held.symmetric == symmetric and [spec.role for spec in held.tensors] == ["qweight", "qzeros", "scales"]


def test_an_old_side_file_declares_alone():
    side = {"zero_point": True, "q_group_size": 64, "w_bit": 4, "version": "GEMM"}
    for name in ("quant_config.json", "quantize_config.json"):
        index = index_of(None, coded(groups=4), {name: side})
        assert detect(index)[0] == "awq" and form(LAYOUT.held(linear(), index)) == row(4, 64)
        assert codes(index, linear()) == []
    both = index_of({"w_bit": 4, "q_group_size": 128, "version": "gemm"}, coded(), {"quant_config.json": side})
    (problem,) = LAYOUT.faults([linear()], both)
    assert problem.code == "format-conflict" and "q_group_size 128" in problem.what


ROUTER = "model.layers.1.mlp.gate"


@pytest.mark.parametrize(
    ("entries", "name", "left_out"),
    [
        (["model.layers.1"], NAME, True),
        (["model.layers.1."], NAME, True),
        (["model.layers.1"], "model.layers.10.mlp.up_proj", False),
        (["layers.1"], "model.layers.11.mlp.up_proj", False),
        (["mlp"], NAME, True),
        (["up_proj"], NAME, True),
        (["p_proj"], NAME, False),
        ([NAME], NAME, True),
        (["gate"], "model.layers.1.mlp.gate_proj", False),
        (["mlp.gate"], ROUTER, True),
        (["lm_head"], NAME, False),
        (["", None, 5, "."], NAME, False),
        ("mlp", NAME, True),
        (None, NAME, False),
    ],
)
def test_entries_of_the_skip_list_are_whole_parts_of_a_name(entries, name, left_out):
    index = index_of({"modules_to_not_convert": entries})
    assert (LAYOUT.held(linear(name), index).scheme == "float") == left_out


def test_codes_that_the_file_has_are_read_whatever_the_skip_list_says():
    # AutoAWQ compares with names inside the layer: such an entry never meets one, and loaders meet it
    index = index_of({"modules_to_not_convert": [NAME]}, coded())
    held, ledger = account([linear()], index)
    assert form(held[NAME]) == row(4, 128) and ledger.problems == () and codes(index, linear()) == []


def test_float_weights_are_told_unless_the_skip_list_explains_them():
    model = [linear(f"model.layers.{i}.mlp.gate_proj") for i in range(3)]
    stored = [entry for module in model for entry in kept(module.name)]
    (problem,) = told(index_of({"modules_to_not_convert": ["o_proj"]}, stored), *model)
    assert problem.code == "tensor-missing" and "model.layers.0.mlp.gate_proj and 2 more" in problem.what
    # AutoAWQ looks for entries anywhere in a name: this one kept gate_proj float too
    for entries in (["gate_proj"], ["mlp.gate"], ["mlp"]):
        index = index_of({"modules_to_not_convert": entries}, stored)
        held, ledger = account(model, index)
        assert codes(index, *model) == [] and ledger.problems == ()
        assert {one.scheme for one in held.values()} == {"float"}


def test_names_of_the_file_and_of_the_model_are_left_out_alike():
    name, written = "model.layers.0.mlp.experts.3.up_proj", "model.layers.0.block_sparse_moe.experts.3.w3"
    for entry in ("block_sparse_moe", "w3", "mlp.experts", name):
        index = index_of({"modules_to_not_convert": [entry]}, kept(written))
        assert codes(index, linear(name)) == [] and LAYOUT.held(linear(name), index).tensors[0].name.startswith(written)


def test_rules_of_gptqmodel_hold_here_too():
    rules = {r"-:.*layers\.0\.": {}, r".*up_proj": {"bits": 8, "group_size": 32}}
    index = index_of({"bits": 4, "group_size": 128, "dynamic": rules, **GPTQMODEL})
    assert form(LAYOUT.held(linear(), index)) == row(8, 32, variant="natural")
    assert form(LAYOUT.held(linear("model.layers.0.mlp.up_proj"), index)) == FLOAT
    assert form(LAYOUT.held(linear("model.layers.1.mlp.down_proj"), index)) == row(4, 128)


@pytest.mark.parametrize(
    ("module", "stored", "config", "scheme", "problems"),
    [
        (linear(ROUTER, role=Role.ROUTER), kept(ROUTER), {}, "float", []),
        # AutoAWQ quantizes a router that nothing excludes
        (linear(ROUTER, role=Role.ROUTER), coded(ROUTER), {}, "w4a16", []),
        (HEAD, kept("lm_head"), {}, "float", []),
        (HEAD, coded("lm_head"), {"lm_head": True}, "w4a16", []),
        (HEAD, coded("lm_head"), {}, "float", ["description-missing"]),
    ],
)
def test_routers_and_heads(module, stored, config, scheme, problems):
    index = index_of(config, stored)
    held, ledger = account([module], index)
    assert held[module.name].scheme == scheme and ledger.problems == () and codes(index, module) == problems


@pytest.mark.parametrize(
    ("config", "code", "said"),
    [
        ({"version": "gemv"}, "format-feature", "gemv"),
        ({"version": "GEMV_FAST"}, "format-feature", "gemv_fast"),
        ({"version": "marlin"}, "format-feature", "marlin"),
        ({"version": "exllama"}, "format-feature", "exllama"),
        ({"format": "llm-awq"}, "format-feature", "llm-awq"),
        ({"bits": 3}, "format-feature", "3 bits"),
        ({"bits": 8}, "awq-byte-order", "2 linears"),
        ({"w_bit": "four"}, "file-malformed", "'four'"),
        ({"group_size": "128"}, "file-malformed", "'128'"),
        ({"q_group_size": -7}, "file-malformed", "-7"),
        ({"zero_point": 1}, "file-malformed", "zero_point"),
        ({"modules_to_not_convert": {}}, "file-malformed", "modules_to_not_convert"),
        ({"dynamic": {"-:(": {}}}, "file-malformed", "-:("),
        ({"dynamic": {".*": {"bits": "8"}}}, "file-malformed", "'8'"),
    ],
)
def test_what_cannot_be_run_is_one_problem_that_names_it(config, code, said):
    other = "model.layers.2.mlp.up_proj"
    found = LAYOUT.faults([linear(), linear(other)], index_of(config, coded() + coded(other)))
    assert [problem.code for problem in found] == [code]
    assert said in found[0].what and found[0].fix
    assert found[0].where.startswith("model: config.json: quantization_config")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 300) | st.text(max_size=4) | st.sampled_from(["gemm", "mlp", "("]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
KEYS = ("bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "format", "modules_to_not_convert",
        "meta", "dynamic", "lm_head")  # fmt: skip


@given(
    config=st.dictionaries(st.sampled_from(KEYS), JSON),
    stored=st.sampled_from([[], coded(), kept(), [*coded(), *kept()], coded(bits=8)]),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_the_config_holds_every_module_has_a_form_and_nothing_crashes(config, stored):
    index = index_of(config, stored)
    held, problems = LAYOUT.held(linear(), index), LAYOUT.faults([linear(), HEAD], index)
    assert held.tensors or problems
    assert all(problem.code and problem.what and problem.fix for problem in problems)
    assert LAYOUT.detect(index).startswith("says awq")


def read_back(made):
    return Index(Path("model"), "safetensors",
                 {name: TensorInfo(name, Path("model"), 0, 0, dtype, shape) for name, dtype, shape in made.tensors},
                 config=made.config)  # fmt: skip


def test_a_stand_in_has_the_tensors_of_the_real_file():
    index = open_index(GOLDEN / "tiny-qwen3-moe" / "awq-w4g64")
    made = LAYOUT.stand_in(list(modules(describe(index.config))), "w4a16", {"group_size": 64})
    # the tool casts what it does not quantize to fp16
    assert {name: (dtype.replace("BF16", "F16"), shape) for name, dtype, shape in made.tensors} == {
        info.name: (info.dtype, info.shape) for info in index.tensors.values()
    }


def test_patterns_of_a_stand_in_are_tried_in_order_and_become_rules():
    model = list(modules(describe(json.loads((GOLDEN / "tiny-qwen3-moe/awq-w4g64/config.json").read_text()))))
    rules = [
        {"pattern": "*.self_attn.o_proj", "scheme": "float"},
        {"pattern": "*.self_attn.*", "scheme": "w8a16"},
        {"pattern": "*.mlp.experts.*.down_proj", "scheme": "float"},
    ]
    index = read_back(LAYOUT.stand_in(model, "w4a16", {"group_size": 64, "layers": rules}))
    held, ledger = account(model, index)
    assert ledger.problems == () and LAYOUT.faults(model, index) == []
    wanted = {"o_proj": "float", "q_proj": "w8a16", "down_proj": "float", "up_proj": "w4a16", "gate": "float"}
    for name, one in held.items():
        part = name.rpartition(".")[2]
        assert one.scheme == wanted.get(part, one.scheme), name
