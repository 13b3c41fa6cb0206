"""GPTQ: what config, rules and headers say of every module, without a byte of a weight."""

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
from framework.formats.gptq.layout import GptqLayout
from framework.formats.registry import detect
from framework.geometry import Kind, Module, Role, Split

GOLDEN = Path(__file__).parents[1] / "golden"
LAYOUT = GptqLayout()
N, K = 64, 256
NAME = "model.layers.0.mlp.up_proj"


def linear(name=NAME, n=N, k=K, **more):
    return Module(name, Kind.LINEAR, (n, k), Split.COLUMN, **more)


def index_of(config, tensors=(), documents=None):
    infos = {name: TensorInfo(name, Path("model.safetensors"), 0, 0, dtype, shape) for name, dtype, shape in tensors}
    declared = {"quantization_config": {"quant_method": "gptq", **config}} if config is not None else {}
    return Index(Path("model"), "safetensors", infos, config=declared, documents=documents or {})


def coded(name=NAME, bits=4, groups=2, n=N, k=K, *, g_idx=False):
    """Tensors of one linear, by the format's definition."""
    made = [(f"{name}.qweight", "I32", (k * bits // 32, n)), (f"{name}.qzeros", "I32", (groups, n * bits // 32)),
            (f"{name}.scales", "F16", (groups, n))]  # fmt: skip
    return [*made, (f"{name}.g_idx", "I32", (k,))] if g_idx else made


def kept(name=NAME, n=N, k=K):
    return [(f"{name}.weight", "BF16", (n, k))]


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


def row(bits, group, symmetric=True, variant="v1", columns=None):
    return f"w{bits}a16", group, symmetric, variant, (1, columns or group or 1)


@pytest.mark.parametrize(
    ("config", "n", "k", "tensors"),
    [
        ({"bits": 4, "group_size": 128}, 64, 256, {"qweight": (32, 64), "qzeros": (2, 8), "scales": (2, 64)}),
        ({"bits": 8, "group_size": 128}, 64, 256, {"qweight": (64, 64), "qzeros": (2, 16), "scales": (2, 64)}),
        ({"bits": 4, "group_size": -1}, 64, 256, {"qweight": (32, 64), "qzeros": (1, 8), "scales": (1, 64)}),
        ({"bits": 4, "group_size": 256}, 64, 256, {"qweight": (32, 64), "qzeros": (1, 8), "scales": (1, 64)}),
        ({"bits": 4, "group_size": 32}, 12, 80, {"qweight": (10, 12), "qzeros": (3, 2), "scales": (3, 12)}),
        ({"bits": 8, "group_size": 32, "desc_act": True}, 8, 64,
         {"qweight": (16, 8), "qzeros": (2, 2), "scales": (2, 8), "g_idx": (64,)}),
        # one group has no order
        ({"bits": 8, "group_size": -1, "desc_act": True}, 8, 64,
         {"qweight": (16, 8), "qzeros": (1, 2), "scales": (1, 8)}),
    ],
)  # fmt: skip
def test_every_width_has_its_tensors(config, n, k, tensors):
    held = LAYOUT.held(linear(n=n, k=k), index_of(config))
    assert {spec.role: spec.shape for spec in held.tensors} == tensors
    assert {spec.role for spec in held.tensors if spec.dtypes == ("I32",)} == tensors.keys() - {"scales"}


@pytest.mark.parametrize(
    ("config", "grain", "label"),
    [
        ({"group_size": 64}, (1, 64), "4 bits, groups of 64"),
        ({"group_size": -1}, (1, 1), "4 bits, one scale a row"),
        ({"group_size": 256}, (1, 1), "4 bits, groups of 256"),  # one group again
        ({"group_size": 64, "desc_act": True}, (1, K), "4 bits, groups of 64, act order"),  # any cut meets all groups
        ({"group_size": -1, "desc_act": True}, (1, 1), "4 bits, one scale a row, act order"),
    ],
)
def test_columns_are_cut_at_groups_and_in_act_order_not_at_all(config, grain, label):
    held = LAYOUT.held(linear(), index_of(config))
    assert (held.grain, held.label) == (grain, label)


def test_a_bias_is_asked_for_where_the_model_has_one_and_taken_where_the_file_has_one():
    # old AutoGPTQ writes a bias of zeros for every linear
    for index, module in ((index_of({}), linear(bias=True)), (index_of({}, [(f"{NAME}.bias", "F16", (N,))]), linear())):
        assert LAYOUT.held(module, index).tensors[-1].name == f"{NAME}.bias"
    assert LAYOUT.held(linear(), index_of({})).tensors[-1].role == "scales"


@pytest.mark.parametrize(
    ("config", "variant"),
    [
        ({}, "v1"),
        ({"checkpoint_format": ""}, "v1"),
        ({"checkpoint_format": "gptq"}, "v1"),
        ({"format": "gptq_v2"}, "v2"),
        ({"checkpoint_format": "gptq_v2", "format": "gptq"}, "v2"),
    ],
)
def test_zero_points_are_minus_one_unless_the_format_says_v2(config, variant):
    assert LAYOUT.held(linear(), index_of(config)).variant == variant


O_PROJ = "model.layers.1.self_attn.o_proj"


@pytest.mark.parametrize(
    ("dynamic", "name", "scheme", "group"),
    [
        ({r".*\.o_proj": {"bits": 8}}, O_PROJ, "w8a16", 128),
        ({r"+:.*\.o_proj": {"bits": 8, "group_size": 32}}, O_PROJ, "w8a16", 32),
        ({r"-:.*\.o_proj": {}}, O_PROJ, "float", 0),
        ({r".*\.o_proj": {"group_size": -1}}, O_PROJ, "w4a16", 0),
        ({r".*layers\.1\.": {"bits": 8}, r"-:.*o_proj": {}}, O_PROJ, "w8a16", 128),  # the first, and nothing after
        ({r"-:.*o_proj": {}, r".*layers\.1\.": {"bits": 8}}, O_PROJ, "float", 0),
        ({r"model\.layers\.1\.": {"bits": 8}}, O_PROJ, "w4a16", 128),  # no operators: a whole name
        ({r"model\.layers\.1\..*": {"bits": 8}}, O_PROJ, "w8a16", 128),
        ({"model.layers.1.self_attn.o_proj": {"bits": 8}}, O_PROJ, "w8a16", 128),
        ({r"layers\.1\..*": {"bits": 8}}, O_PROJ, "w4a16", 128),  # from the start of the name
        ({r".*layers\.1\..*": {"bits": 8}}, "model.layers.10.self_attn.o_proj", "w4a16", 128),
        ({r".*mlp\.experts\.\d+\.down_proj": {"bits": 8}}, "model.layers.0.mlp.experts.7.down_proj", "w8a16", 128),
        ({"(": {"bits": 8}}, O_PROJ, "w4a16", 128),
    ],
)
def test_rules_by_name_are_tried_in_order(dynamic, name, scheme, group):
    held = LAYOUT.held(linear(name), index_of({"bits": 4, "group_size": 128, "dynamic": dynamic}))
    assert (held.scheme, held.group) == (scheme, group)


def test_rules_may_change_zero_points_and_order():
    rules = {".*up_proj": {"sym": False, "desc_act": True}}
    held = LAYOUT.held(linear(), index_of({"group_size": 64, "sym": True, "dynamic": rules}))
    assert form(held) == row(4, 64, False, columns=K) and held.tensors[-1].role == "g_idx"


@pytest.mark.parametrize("rule", [r"-:.*block_sparse_moe\.experts\..*\.w3", r"-:.*mlp\.experts\..*\.up_proj"])
def test_rules_match_names_as_the_file_spells_them_and_as_the_model_does(rule):
    name = "model.layers.0.mlp.experts.3.up_proj"
    stored = kept("model.layers.0.block_sparse_moe.experts.3.w3")
    index = index_of({"dynamic": {rule: {}}}, stored)
    assert LAYOUT.held(linear(name), index).tensors[0].name == stored[0][0]
    assert codes(index, linear(name)) == []


HEAD = linear("lm_head", role=Role.HEAD)
BY_32 = {"lm_head": {"bits": 8, "group_size": 32}}


@pytest.mark.parametrize(
    ("config", "stored", "scheme", "problems"),
    [
        ({}, kept("lm_head"), "float", []),
        ({"lm_head": False}, kept("lm_head"), "float", []),
        ({"lm_head": True}, coded("lm_head"), "w4a16", []),
        ({"lm_head": True, "dynamic": BY_32}, coded("lm_head", 8, 8), "w8a16", []),
        ({"lm_head": True}, kept("lm_head"), "float", ["tensor-missing"]),
        ({}, coded("lm_head"), "float", ["description-missing"]),
        ({"lm_head": False}, coded("lm_head"), "float", ["description-missing"]),
    ],
)
def test_the_head_is_quantized_where_config_and_file_say_so(config, stored, scheme, problems):
    index = index_of({"bits": 4, "group_size": 128, **config}, stored)
    held, ledger = account([HEAD], index)
    assert held["lm_head"].scheme == scheme and ledger.problems == ()
    assert codes(index, HEAD) == problems


def test_a_tied_head_is_its_embedding_whatever_the_rules_say_of_that():
    tied = linear("lm_head", role=Role.HEAD, tied_to="model.embed_tokens")
    index = index_of({"lm_head": True}, kept("model.embed_tokens"))
    assert form(LAYOUT.held(tied, index)) == FLOAT and codes(index, tied) == []


def test_a_router_is_what_the_file_has():
    router = linear("model.layers.0.mlp.gate", role=Role.ROUTER)
    for stored, scheme in ((kept(router.name), "float"), (coded(router.name), "w4a16")):
        index = index_of({"bits": 4, "group_size": 128}, stored)
        held, ledger = account([router], index)
        assert held[router.name].scheme == scheme and ledger.problems == () and codes(index, router) == []


def test_float_weights_are_told_unless_something_leaves_them_out():
    model = [linear(f"model.layers.{i}.mlp.up_proj") for i in range(3)]
    stored = [entry for module in model for entry in kept(module.name)]
    (problem,) = told(index_of({}, stored), *model)
    assert problem.code == "tensor-missing" and "model.layers.0.mlp.up_proj and 2 more" in problem.what
    for left_out in ({"dynamic": {r"-:.*\.mlp\.": {}}},
                     {"modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.down_proj"]]}):  # fmt: skip
        assert codes(index_of(left_out, stored), *model) == []
    assert codes(index_of({"modules_in_block_to_quantize": [["mlp.up_proj"]]}, stored), *model) == ["tensor-missing"]


def test_codes_that_a_rule_leaves_out_are_told_and_used():
    index = index_of({"dynamic": {"-:.*up_proj": {}}}, coded(g_idx=True))
    (problem,) = LAYOUT.faults([linear()], index)
    assert problem.code == "description-missing" and NAME in problem.what
    assert account([linear()], index)[1].problems == ()


def test_a_quantized_embedding_is_refused():
    embedding = Module("model.embed_tokens", Kind.EMBEDDING, (N, K), Split.VOCAB)
    assert codes(index_of({}, coded(embedding.name)), embedding) == ["embedding-quantized"]


@pytest.mark.parametrize(
    ("config", "code", "said"),
    [
        ({"bits": 3}, "format-feature", "3 bits"),
        ({"bits": 2}, "format-feature", "2 bits"),
        ({"dynamic": {".*up_proj": {"bits": 3}}}, "format-feature", "3 bits"),
        ({"checkpoint_format": "gptq_p"}, "format-feature", "gptq_p"),
        ({"is_marlin_format": True}, "format-feature", "another layout"),
        ({"format": "bitblas"}, "format-feature", "bitblas"),
        ({"pack_dtype": "int64"}, "format-feature", "int64"),
        ({"bits": "four"}, "file-malformed", "'four'"),
        ({"bits": True}, "file-malformed", "True"),
        ({"group_size": -5}, "file-malformed", "-5"),
        ({"sym": 1}, "file-malformed", "sym"),
        ({"desc_act": "false"}, "file-malformed", "desc_act"),
        ({"dynamic": ["-:.*"]}, "file-malformed", "dynamic"),
        ({"dynamic": {"(": {}}}, "file-malformed", "'('"),
        ({"dynamic": {".*up_proj": {"bits": "8"}}}, "file-malformed", "'8'"),
        ({"modules_in_block_to_quantize": "mlp"}, "file-malformed", "modules_in_block"),
    ],
)
def test_what_cannot_be_run_is_one_problem_that_names_it(config, code, said):
    index = index_of({"group_size": 128, **config}, coded() + coded("model.layers.1.mlp.up_proj"))
    found = LAYOUT.faults([linear(), linear("model.layers.1.mlp.up_proj")], index)
    assert [problem.code for problem in found] == [code]
    assert said in found[0].what and found[0].fix
    assert found[0].where.startswith("model: config.json: quantization_config")


def test_widths_without_a_row_are_refused_though_the_file_lacks_their_tensors():
    (problem,) = told(index_of({"dynamic": {NAME: {"bits": 3}}}), linear())
    assert problem.code == "format-feature" and "4 and of 8 bits" in problem.why


def test_an_old_side_file_declares_and_may_not_contradict():
    side = {"bits": 8, "group_size": 64, "sym": True, "desc_act": False}
    alone = index_of(None, coded(bits=8, groups=4), {"quantize_config.json": side})
    assert detect(alone)[0] == "gptq" and form(LAYOUT.held(linear(), alone)) == row(8, 64)
    stored = coded(bits=8, groups=4)
    assert codes(index_of({"bits": 8, "group_size": 64}, stored, {"quantize_config.json": side}), linear()) == []
    other = index_of({"bits": 8, "group_size": 64, "desc_act": True}, coded(bits=8, groups=4, g_idx=True),
                     {"quantize_config.json": side})  # fmt: skip
    (problem,) = LAYOUT.faults([linear()], other)
    assert problem.code == "format-conflict" and "desc_act True" in problem.what and "desc_act False" in problem.what


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 300) | st.text(max_size=4) | st.sampled_from(["-:.*", "(", "gptq_v2"]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
KEYS = ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "pack_dtype", "lm_head", "meta",
        "modules_in_block_to_quantize", "is_marlin_format")  # fmt: skip
RULES = st.dictionaries(
    st.sampled_from([".*", "-:.*mlp", "(", "+:"]), JSON | st.dictionaries(st.sampled_from(KEYS), JSON)
)
CONFIG = st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, JSON) | {"dynamic": RULES | JSON})


@given(config=CONFIG, stored=st.sampled_from([[], coded(), kept(), [*coded(), *kept()], coded(bits=8)]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_the_config_holds_every_module_has_a_form_and_nothing_crashes(config, stored):
    index = index_of(config, stored, {"quantize_config.json": {"bits": 4}})
    held = LAYOUT.held(linear(), index)
    problems = LAYOUT.faults([linear(), HEAD], index)
    assert held.tensors or problems
    assert all(problem.code and problem.what and problem.fix for problem in problems)
    assert LAYOUT.detect(index).startswith("says gptq")


def read_back(made):
    return Index(Path("model"), "safetensors",
                 {name: TensorInfo(name, Path("model"), 0, 0, dtype, shape) for name, dtype, shape in made.tensors},
                 config=made.config)  # fmt: skip


def test_a_stand_in_has_the_tensors_of_the_real_file():
    index = open_index(GOLDEN / "tiny-qwen3-moe" / "gptq-w8g64-sym")
    made = LAYOUT.stand_in(list(modules(describe(index.config))), "w8a16", {"group_size": 64})
    assert {name: (dtype, shape) for name, dtype, shape in made.tensors} == {
        info.name: (info.dtype, info.shape) for info in index.tensors.values()
    }


def test_patterns_of_a_stand_in_are_tried_in_order_and_become_rules():
    model = list(modules(describe(json.loads((GOLDEN / "tiny-qwen3-moe/gptq-w8g64-sym/config.json").read_text()))))
    rules = [
        {"pattern": "*.self_attn.o_proj", "scheme": "float"},
        {"pattern": "*.self_attn.*", "scheme": "w8a16"},
        {"pattern": "*.layers.1.mlp.experts.*.down_proj", "scheme": "float"},
        {"pattern": "*.layers.0.mlp.experts.*.down_proj", "scheme": "w8a16"},
    ]
    index = read_back(LAYOUT.stand_in(model, "w4a16", {"group_size": 64, "layers": rules}))
    held, ledger = account(model, index)
    assert ledger.problems == () and LAYOUT.faults(model, index) == []
    for name, one in held.items():
        part = name.rpartition(".")[2]
        if part in ("q_proj", "o_proj", "up_proj", "down_proj"):
            down = "float" if "layers.1." in name else "w8a16"
            assert one.scheme == {"q_proj": "w8a16", "o_proj": "float", "up_proj": "w4a16", "down_proj": down}[part]
