"""auto-round: which packing, and of which width every module is, by config and headers alone."""

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
from framework.formats.auto_round.layout import AutoRoundLayout
from framework.formats.registry import LAYOUTS, detect
from framework.geometry import Kind, Module, Role, Split

GOLDEN = Path(__file__).parents[1] / "golden"
LAYOUT = AutoRoundLayout()
N, K = 64, 256
NAME = "model.layers.1.mlp.up_proj"
HEAD = Module("lm_head", Kind.LINEAR, (N, K), Split.VOCAB, role=Role.HEAD)


def linear(name=NAME, n=N, k=K, **more):
    return Module(name, Kind.LINEAR, (n, k), Split.COLUMN, **more)


def index_of(config, tensors=(), documents=None, **options):
    infos = {name: TensorInfo(name, Path("model.safetensors"), 0, 0, dtype, shape) for name, dtype, shape in tensors}
    declared = {"quantization_config": {"quant_method": "auto-round", **config}} if config is not None else {}
    return Index(Path("model"), "safetensors", infos, config=declared, documents=documents or {}, options=options)


def coded(name=NAME, bits=4, groups=2, n=N, k=K, along="gptq"):
    """Tensors of one linear, by the format's definition."""
    codes = (k * bits // 32, n) if along == "gptq" else (k, n * bits // 32)
    return [(f"{name}.qweight", "I32", codes), (f"{name}.qzeros", "I32", (groups, n * bits // 32)),
            (f"{name}.scales", "F16", (groups, n))]  # fmt: skip


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


def row(bits, group, symmetric=True, variant="v1"):
    return f"w{bits}a16", group, symmetric, variant, (1, group or 1)


@pytest.mark.parametrize(
    ("given", "along", "variant"),
    [
        ({}, "gptq", "v1"),
        ({"packing_format": "auto_round:auto_gptq"}, "gptq", "v1"),
        ({"packing_format": "auto_round:gptq"}, "gptq", "v1"),
        ({"packing_format": "auto"}, "gptq", "v1"),
        ({"packing_format": "auto_round:gptqmodel"}, "gptq", "v2"),
        ({"packing_format": "auto_round"}, "gptq", "v2"),
        ({"packing_format": "auto_round:exllamav2"}, "gptq", "v2"),
        ({"packing_format": "auto_round:auto_gptq", "checkpoint_format": "gptq_v2"}, "gptq", "v2"),
        ({"packing_format": "auto_round:auto_awq"}, "awq", ""),
        ({"packing_format": "auto_round:awq"}, "awq", ""),
        ({"backend": "awq:marlin"}, "awq", ""),
        ({"backend": "gptq:marlin"}, "gptq", "v1"),
        ({"backend": "awq", "packing_format": "auto_round:auto_gptq"}, "gptq", "v1"),
    ],
)
def test_the_packing_decides_where_words_run_and_how_zero_points_are_stored(given, along, variant):
    index = index_of({"bits": 4, "group_size": 128, **given}, coded(along=along))
    held, ledger = account([linear()], index)
    assert held[NAME].variant == variant and ledger.problems == () and codes(index, linear()) == []


@pytest.mark.parametrize("along", ["gptq", "awq"])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_tensors_are_those_of_the_format_that_packs(along, bits):
    config = {"bits": bits, "group_size": 64, "sym": True}
    ours = LAYOUT.held(linear(bias=True), index_of({**config, "packing_format": f"auto_round:auto_{along}"}))
    theirs = index_of({**config, "quant_method": along, "zero_point": False})
    assert ours == LAYOUTS[along].held(linear(bias=True), theirs)


def test_an_order_sequential_or_not_may_be_in_the_file():
    # the packing of gptqmodel writes g_idx, the others do not
    index = index_of({"packing_format": "auto_round:gptqmodel"}, [*coded(), (f"{NAME}.g_idx", "I32", (K,))])
    held, ledger = account([linear()], index)
    assert held[NAME].tensors[3].role == "g_idx" and held[NAME].grain == (1, 128) and ledger.problems == ()


def test_eight_bits_in_awq_words_need_an_order_of_bytes():
    given = {"bits": 8, "group_size": 128, "packing_format": "auto_round:auto_awq"}
    stored = coded(bits=8, along="awq")
    assert codes(index_of(given, stored), linear()) == ["awq-byte-order"]
    told = index_of(given, stored, awq_byte_order="natural")
    assert codes(told, linear()) == [] and LAYOUT.held(linear(), told).variant == "natural"


EXPERT = "model.layers.0.mlp.experts.3.up_proj"


@pytest.mark.parametrize(
    ("extra", "name", "wanted"),
    [
        ({NAME: {"bits": 8}}, NAME, row(8, 128)),
        ({NAME: {"bits": 8, "group_size": -1, "sym": False}}, NAME, row(8, 0, False)),
        ({NAME: {"bits": None, "group_size": 32}}, NAME, row(4, 32)),
        ({NAME: {"bits": 16}}, NAME, FLOAT),
        ({NAME: {"bits": 32}}, NAME, FLOAT),
        ({NAME: {}}, NAME, row(4, 128)),
        ({NAME: {}, r".*up_proj": {}, r"up_proj$": {"bits": 8}}, NAME, row(8, 128)),  # empty ones say nothing
        ({r".*layers\.1\.mlp.*": {"bits": 8}, NAME: {"group_size": 32}}, NAME, row(4, 32)),  # a name before all
        ({r".*up_proj.*": {"bits": 8}, r".*layers\.1\..*": {"bits": 16}}, NAME, row(8, 128)),  # the first of two
        ({r"up_proj$": {"bits": 16}, r".*\.mlp\..*": {"bits": 8}}, NAME, row(8, 128)),  # all of a name before a part
        ({r"layers\.\d+\.mlp\.up": {"bits": 8}}, NAME, row(8, 128)),
        ({"mlp.up_proj": {"bits": 8}}, NAME, row(4, 128)),  # without operators: a whole name
        ({r".*layers\.1\.mlp.*": {"bits": 8}}, "model.layers.10.mlp.up_proj", row(4, 128)),
        ({r".*layers.1.mlp.*": {"bits": 8}}, "model.layers.1.mlp.up_proj", row(8, 128)),  # dots of any character
        ({r".*model\.layers\.0\.mlp\.gate.*": {"bits": 16, "data_type": "float"}}, EXPERT, row(4, 128)),
        ({r".*experts\.3\..*": {"bits": 8}}, EXPERT, row(8, 128)),
        ({"lm_head": {"bits": 8}}, "lm_head", row(8, 128)),
        ({NAME: {"bits": 8}}, "lm_head", FLOAT),
        ({"(": {"bits": 8}}, NAME, row(4, 128)),
    ],
)
def test_extra_config_speaks_of_modules_by_name_then_by_expression(extra, name, wanted):
    role = Role.HEAD if name == "lm_head" else Role.NONE
    index = index_of({"bits": 4, "group_size": 128, "block_name_to_quantize": "model.layers", "extra_config": extra})
    assert form(LAYOUT.held(linear(name, role=role), index)) == wanted


def test_entries_match_names_as_the_file_spells_them_and_as_the_model_does():
    written = "model.layers.0.block_sparse_moe.experts.3.w3"
    for key in (written, EXPERT, r".*block_sparse_moe\.experts.*", r".*\.mlp\.experts\..*"):
        index = index_of({"group_size": 64, "extra_config": {key: {"bits": 8}}}, coded(written, 8, 4))
        assert LAYOUT.held(linear(EXPERT), index).scheme == "w8a16" and codes(index, linear(EXPERT)) == []


@pytest.mark.parametrize(
    ("blocks", "inside"),
    [
        ({}, True),
        ({"block_name_to_quantize": "model.layers"}, True),
        ({"block_name_to_quantize": "model.layers.1"}, True),
        ({"block_name_to_quantize": "model.layers.10"}, False),
        ({"block_name_to_quantize": "model.lay"}, False),  # a dotted prefix
        ({"block_name_to_quantize": "visual.blocks, model.layers"}, True),
        ({"to_quant_block_names": ["visual.blocks", "model.layers"]}, True),
        ({"to_quant_block_names": [["model.layers.0", "model.layers.1"]]}, True),
        ({"to_quant_block_names": [["model.layers.0"]]}, False),
        ({"block_name_to_quantize": None, "to_quant_block_names": "visual"}, False),
    ],
)
def test_outside_the_blocks_modules_are_float(blocks, inside):
    held = LAYOUT.held(linear(), index_of({"bits": 4, "group_size": 128, **blocks}))
    assert form(held) == (row(4, 128) if inside else FLOAT)
    exempt = LAYOUT.held(linear(), index_of({**blocks, "extra_config": {NAME: {"bits": 8, "group_size": 64}}}))
    assert form(exempt) == row(8, 64)


def test_float_weights_are_told_unless_something_leaves_them_out():
    (problem,) = told(index_of({}, kept()), linear())
    assert problem.code == "tensor-missing" and NAME in problem.what
    for left_out in ({"extra_config": {NAME: {"bits": 16}}}, {"modules_to_not_convert": ["mlp"]},
                     {"block_name_to_quantize": "model.layers.0"}):  # fmt: skip
        assert codes(index_of(left_out, kept()), linear()) == []


def test_codes_that_nothing_describes_are_told_and_used():
    for left_out in ({"extra_config": {NAME: {"bits": 16}}}, {"block_name_to_quantize": "model.layers.0"}):
        index = index_of(left_out, coded())
        (problem,) = LAYOUT.faults([linear()], index)
        assert problem.code == "description-missing" and NAME in problem.what
        assert account([linear()], index)[1].problems == ()


def test_heads_and_routers_are_what_entry_and_file_say():
    router = linear("model.layers.1.mlp.gate", role=Role.ROUTER)
    index = index_of({}, kept(router.name) + kept("lm_head"))
    assert codes(index, router, HEAD) == []
    assert {held.scheme for held in account([router, HEAD], index)[0].values()} == {"float"}
    assert codes(index_of({}, coded("lm_head")), HEAD) == ["description-missing"]
    named = {"extra_config": {"lm_head": {"bits": 8, "group_size": 64}}}
    assert codes(index_of(named, coded("lm_head", 8, 4)), HEAD) == []
    assert codes(index_of(named, kept("lm_head")), HEAD) == ["tensor-missing"]


@pytest.mark.parametrize(
    ("config", "code", "said"),
    [
        ({"packing_format": "auto_round:llm_compressor"}, "format-feature", "llm_compressor"),
        ({"packing_format": "auto_round:nv_fp4"}, "format-feature", "nv_fp4"),
        ({"data_type": "mx_fp"}, "format-feature", "mx_fp"),
        ({"extra_config": {NAME: {"data_type": "nv_fp", "bits": 4}}}, "format-feature", "nv_fp"),
        ({"act_bits": 8}, "format-feature", "8 bits"),
        ({"extra_config": {NAME: {"act_bits": 4}}}, "format-feature", "activations of 4"),
        ({"rotation_config": {"a": 1}}, "format-feature", "rotation_config"),
        ({"spinquant_config": "hadamard"}, "format-feature", "spinquant_config"),
        ({"extra_config": {NAME: {"rotation_config": {"a": 1}}}}, "format-feature", "rotation_config"),
        ({"bits": 3}, "format-feature", "3 bits"),
        ({"extra_config": {r".*mlp.*": {"bits": 2}}}, "format-feature", "2 bits"),
        ({"bits": "four"}, "file-malformed", "'four'"),
        ({"group_size": -4}, "file-malformed", "-4"),
        ({"sym": "yes"}, "file-malformed", "sym"),
        ({"data_type": 5}, "file-malformed", "data_type"),
        ({"extra_config": [NAME]}, "file-malformed", "extra_config"),
        ({"extra_config": {NAME: {"bits": "8"}}}, "file-malformed", "'8'"),
        ({"extra_config": {"(": {"bits": 8}}}, "file-malformed", "'('"),
        ({"block_name_to_quantize": 5}, "file-malformed", "block_name_to_quantize"),
        ({"modules_to_not_convert": 5}, "file-malformed", "modules_to_not_convert"),
    ],
)
def test_what_cannot_be_run_is_one_problem_that_names_it(config, code, said):
    index = index_of({"group_size": 128, **config}, coded() + coded("model.layers.2.mlp.up_proj"))
    found = LAYOUT.faults([linear(), linear("model.layers.2.mlp.up_proj")], index)
    assert [problem.code for problem in found] == [code]
    assert said in found[0].what and found[0].fix
    assert found[0].where.startswith("model: config.json: quantization_config")


def test_all_may_be_float_but_what_is_named():
    extra, model = {NAME: {"bits": 4, "group_size": 64}}, [linear(), linear("other")]
    index = index_of({"bits": 16, "extra_config": extra}, coded(groups=4) + kept("other"))
    held, ledger = account(model, index)
    assert form(held[NAME]) == row(4, 64) and form(held["other"]) == FLOAT
    assert ledger.problems == () and LAYOUT.faults(model, index) == []


def test_float_modules_may_say_what_they_like_of_types():
    extra = {r".*mlp\.gate.*": {"bits": 16, "data_type": "float", "act_bits": 16}}
    assert codes(index_of({"data_type": "int", "act_bits": 16, "extra_config": extra}, coded()), linear()) == []


def test_the_tools_own_file_declares_alone_and_may_not_contradict():
    side = {"quant_method": "auto-round", "bits": 8, "group_size": 64, "sym": True}
    alone = index_of(None, coded(bits=8, groups=4), {"quantization_config.json": side})
    assert detect(alone)[0] == "auto_round" and form(LAYOUT.held(linear(), alone)) == row(8, 64)
    other = index_of({"bits": 8, "group_size": 32}, coded(bits=8, groups=8), {"quantization_config.json": side})
    (problem,) = LAYOUT.faults([linear()], other)
    assert problem.code == "format-conflict" and "group_size 32" in problem.what and "group_size 64" in problem.what


@pytest.mark.parametrize(
    ("config", "found"),
    [
        ({"quant_method": "intel/auto-round"}, "auto_round"),
        ({"quant_method": "gptq", "provider": "auto-round"}, "gptq"),
        ({"quant_method": "awq", "provider": "auto-round", "sym": True, "zero_point": False}, "awq"),
    ],
)
def test_exports_of_the_tool_are_of_the_format_that_they_name(config, found):
    index = index_of({"bits": 4, "group_size": 128, **config}, coded(along="awq" if found == "awq" else "gptq"))
    assert detect(index)[0] == found and LAYOUTS[found].faults([linear()], index) == []
    assert LAYOUTS[found].held(linear(), index).symmetric


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 300)
    | st.text(max_size=4)
    | st.sampled_from(["int", "auto_round", "("]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
KEYS = ("bits", "group_size", "sym", "data_type", "act_bits", "packing_format", "backend", "block_name_to_quantize",
        "to_quant_block_names", "modules_to_not_convert", "rotation_config", "checkpoint_format")  # fmt: skip
EXTRA = st.dictionaries(st.sampled_from([NAME, ".*", "(", ".*mlp.*"]),
                        JSON | st.dictionaries(st.sampled_from(KEYS), JSON))  # fmt: skip
CONFIG = st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, JSON) | {"extra_config": EXTRA | JSON})


@given(config=CONFIG, stored=st.sampled_from([[], coded(), kept(), [*coded(), *kept()], coded(along="awq")]))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_the_config_holds_every_module_has_a_form_and_nothing_crashes(config, stored):
    index = index_of(config, stored)
    held, problems = LAYOUT.held(linear(), index), LAYOUT.faults([linear(), HEAD], index)
    assert held.tensors or problems
    assert all(problem.code and problem.what and problem.fix for problem in problems)
    assert LAYOUT.detect(index).startswith("says auto-round")


MOE = json.loads((GOLDEN / "tiny-qwen3-moe" / "awq-w4g64" / "config.json").read_text())


def read_back(made):
    return Index(Path("model"), "safetensors",
                 {name: TensorInfo(name, Path("model"), 0, 0, dtype, shape) for name, dtype, shape in made.tensors},
                 config=made.config)  # fmt: skip


def test_a_stand_in_has_the_tensors_of_the_real_file():
    index = open_index(GOLDEN / "tiny-qwen3-moe" / "ar-w4g64-gptq")
    made = LAYOUT.stand_in(list(modules(describe(MOE))), "w4a16", {"group_size": 64})
    tensors = {name: (dtype, shape) for name, dtype, shape in made.tensors}
    assert index.tensors and all(tensors[info.name] == (info.dtype, info.shape) for info in index.tensors.values())


def test_patterns_of_a_stand_in_are_tried_in_order_and_become_entries():
    model = list(modules(describe(MOE)))
    rules = [
        {"pattern": "*.self_attn.o_proj", "scheme": "float"},
        {"pattern": "*.self_attn.*", "scheme": "w8a16"},
        {"pattern": "*.layers.1.mlp.experts.*.down_proj", "scheme": "float"},
        {"pattern": "*.mlp.experts.*.down_proj", "scheme": "w8a16"},
    ]
    index = read_back(LAYOUT.stand_in(model, "w4a16", {"group_size": 64, "layers": rules}))
    held, ledger = account(model, index)
    assert ledger.problems == () and LAYOUT.faults(model, index) == []
    for name, one in held.items():
        part = name.rpartition(".")[2]
        down = "float" if "layers.1." in name else "w8a16"
        wanted = {"q_proj": "w8a16", "o_proj": "float", "up_proj": "w4a16", "down_proj": down, "gate": "float"}
        assert one.scheme == wanted.get(part, one.scheme), name
