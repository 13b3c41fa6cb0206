"""ModelSlim: what the description and the headers say of every module, without a byte of a weight."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from framework.checkpoint.index import Index, TensorInfo
from framework.checkpoint.ledger import settle
from framework.checkpoint.open import open_index
from framework.errors import InputError
from framework.families.base import modules
from framework.families.config import describe
from framework.families.diffusion import describe_transformer, diffusion_modules
from framework.formats.modelslim.description import described
from framework.formats.modelslim.layout import ModelslimLayout
from framework.geometry import Kind, Module, Role, Split

GOLDEN = Path(__file__).parents[1] / "golden"
LAYOUT = ModelslimLayout()
DESCRIPTION = "quant_model_description.json"
N, K = 64, 1024
P = "model.layers.0.mlp.up_proj"
EXPERTS = "model.layers.1.mlp.experts.*.down_proj"

ROW = {"weight_scale": ("F32", (N, 1)), "weight_offset": ("F32", (N, 1))}
BY_128 = {"weight_scale": ("F32", (N, 8)), "weight_offset": ("F32", (N, 8))}
STATIC = {"weight": ("I8", (N, K)), "input_scale": ("F32", (1,)), "input_offset": ("F32", (1,)),
          "quant_bias": ("I32", (N,)), "deq_scale": ("F32", (N,))}  # fmt: skip
SECOND = {"weight_scale_second": ("F32", (N, 8)), "weight_offset_second": ("I64", (N, 8))}
FP4 = {"weight": ("U8", (N, K // 2)), "weight_scale": ("U8", (N, 32))}
PAIRED_ROWS = {"weight": ("I8", (N // 2, K))}
INT8 = {"weight": ("I8", (N, K))}
# every form that the savers write: quant type, tensors; then scheme, group, grain
FORMS = {
    "static": ("W8A8", STATIC, "w8a8_static", 0, (1, 1)),
    "static, not of a bf16 model": ("W8A8", {**STATIC, "deq_scale": ("I64", (N,))}, "w8a8_static", 0, (1, 1)),
    "static, old saver": ("W8A8", STATIC | ROW, "w8a8_static", 0, (1, 1)),
    "mix": ("W8A8_MIX", STATIC | ROW, "w8a8_mix", 0, (1, 1)),
    "dynamic": ("W8A8_DYNAMIC", INT8 | ROW, "w8a8_dynamic", 0, (1, 1)),
    "dynamic by group": ("W8A8_DYNAMIC", INT8 | BY_128, "w8a8_dynamic", 128, (1, 128)),
    "int4": ("W4A4_DYNAMIC", INT8 | ROW, "w4a4_dynamic", 0, (1, 1)),
    "int4 in pairs": ("W4A4_DYNAMIC", PAIRED_ROWS | ROW, "w4a4_dynamic", 0, (2, 1)),
    "w4a8": ("W4A8_DYNAMIC", PAIRED_ROWS | ROW | {"scale_bias": ("F32", (N, 1))}, "w4a8_dynamic", 0, (2, 1)),
    "w4a8, down": ("W4A8_DYNAMIC", PAIRED_ROWS | ROW | {"scale_bias": ("F32", (N, 16))}, "w4a8_dynamic", 0, (2, 1)),
    "w4a8 in two stages": ("W4A8_DYNAMIC", PAIRED_ROWS | ROW | SECOND | {"scale_bias": ("F32", (N, 1))},
                           "w4a8_dynamic", 128, (2, 128)),
    "w8a16": ("W8A16", INT8 | ROW, "w8a16", 0, (1, 1)),
    "w8a16 by group": ("W8A16", INT8 | BY_128, "w8a16", 128, (1, 128)),
    "w4a16, pairs along K": ("W4A16", {"weight": ("I8", (N, K // 2))} | ROW, "w4a16", 0, (1, 2)),
    "w4a16 by group, pairs along N": ("W4A16", PAIRED_ROWS | BY_128, "w4a16", 128, (2, 128)),
    "mxfp8": ("W8A8_MXFP8", {"weight": ("F8_E4M3", (N, K)), "weight_scale": ("U8", (N, 32))}, "mxfp8", 32, (1, 32)),
    "mxfp4": ("W4A4_MXFP4", FP4, "mxfp4", 32, (1, 32)),
    "mxfp4 on two levels": ("W4A4_MXFP4_DUALSCALE", FP4 | {"weight_dual_scale": ("F32", (N, 2, 1))},
                            "mxfp4_dualscale", 32, (1, 512)),
    "w4a8_mxfp": ("W4A8_MXFP", FP4, "w4a8_mxfp", 32, (1, 32)),
}  # fmt: skip
SCHEMES = sorted({form[2] for form in FORMS.values()})
REQUIRED = [(form, suffix) for form, (_, tensors, *_) in FORMS.items() for suffix in tensors]


def linear(name=P, n=N, k=K, **more):
    return Module(name, Kind.LINEAR, (n, k), Split.COLUMN, **more)


def index_of(description, tensors=(), document=DESCRIPTION):
    infos = {name: TensorInfo(name, Path("model.safetensors"), 0, 0, dtype, shape) for name, dtype, shape in tensors}
    return Index(Path("model"), "safetensors", infos, documents={document: description})


def holding(label, tensors, name=P, *, inside=None):
    """Index of one linear, whose entries stand under `inside` where the description has other names."""
    entries = {f"{inside or name}.{suffix}": label for suffix in tensors}
    return index_of(entries, [(f"{name}.{suffix}", dtype, shape) for suffix, (dtype, shape) in tensors.items()])


def each(model):
    for module in model:
        yield from [module.expert(e) for e in range(module.experts)] if module.experts else [module]


def account(model, index):
    """Held by module, and the ledger of the file."""
    held = {module.name: LAYOUT.held(module, index) for module in each(model)}
    tensors = {name: one.tensors for name, one in held.items()}
    return held, settle(index, tensors, lambda name: LAYOUT.ignorable(name, index))


def codes(problems):
    return [problem.code for problem in problems]


def faults(index, *model):
    return LAYOUT.faults(model or [linear()], index)


def test_shifted_norms_and_what_follows_them_hold_their_biases():
    index = open_index(GOLDEN / "tiny-qwen3" / "modelslim-w8a8-smooth-asym")
    held, _ = account(list(modules(describe(index.config))), index)
    with_bias = {name for name, one in held.items() if any(spec.role == "bias" for spec in one.tensors)}
    parts = ("input_layernorm", "post_attention_layernorm", "self_attn.q_proj", "self_attn.k_proj",
             "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")  # fmt: skip
    assert with_bias == {f"model.layers.{layer}.{part}" for layer in (0, 1) for part in parts}


WAN = (  # names of the original to those of diffusers
    (r"\.linear\.(?=\w+$)", "."), (r"\.div\.mul_scale$", ".mul_scale"), (r"self_attn\.([qkv])\.", r"attn1.to_\1."),
    (r"cross_attn\.([qkv])\.", r"attn2.to_\1."), (r"self_attn\.o\.", "attn1.to_out.0."),
    (r"cross_attn\.o\.", "attn2.to_out.0."), ("self_attn", "attn1"), ("cross_attn", "attn2"), ("norm3", "norm2"),
    (r"ffn\.0", "ffn.net.0.proj"), (r"ffn\.2", "ffn.net.2"), (r"head\.head", "proj_out"),
    (r"(head\.)?modulation", "scale_shift_table"), (r"time_projection\.1", "condition_embedder.time_proj"),
    (r"(time|text)_embedding\.0", r"condition_embedder.\1_embedder.linear_1"),
    (r"(time|text)_embedding\.2", r"condition_embedder.\1_embedder.linear_2"),
)  # fmt: skip


def renamed(name):
    for pattern, new in WAN:
        name = re.sub(pattern, new, name)
    return name


def test_a_repacked_diffusion_transformer_closes_with_its_smoothing():
    original = open_index(GOLDEN / "diffusion" / "tiny-wan22-original" / "w4a4-mxfp4")
    config = json.loads((GOLDEN / "diffusion" / "tiny-wan2.2" / "transformer" / "config.json").read_text())
    tensors = {renamed(name): info._replace(name=renamed(name)) for name, info in original.tensors.items()}
    (description,) = original.documents.values()
    entries = {renamed(name) if "." in name else name: kind for name, kind in description.items()}
    index = replace(original, tensors=tensors, documents={"quant_model_description_w4a4_mxfp4.json": entries})
    model = list(diffusion_modules(describe_transformer(config)))
    held, ledger = account(model, index)
    assert ledger.problems == () and ledger.ignored == () and faults(index, *model) == []
    for module in model:
        block = re.match(r"blocks\.([01])\.(attn[12]\.to_|ffn)", module.name)
        wanted = {"0": "mxfp8", "1": "mxfp4"}[block[1]] if block and module.quantizable else "float"
        one = held[module.name]
        assert one.scheme == ("float" if module.name == "blocks.1.attn2.to_k" else wanted), module.name
        smoothed = bool(block) and module.name.endswith(("attn1.to_out.0", "ffn.net.2"))
        assert any(spec.role == "mul_scale" for spec in one.tensors) == smoothed, module.name


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_every_quant_type_is_held(form):
    label, tensors, scheme, group, grain = FORMS[form]
    held, ledger = account([linear()], holding(label, tensors))
    one = held[P]
    assert (one.scheme, one.group, one.grain) == (scheme, group, grain)
    assert {spec.name: spec.shape for spec in one.tensors} == {f"{P}.{s}": shape for s, (_, shape) in tensors.items()}
    assert ledger.problems == () and faults(holding(label, tensors)) == [] and label in one.label


@pytest.mark.parametrize(("form", "suffix"), REQUIRED)
def test_a_tensor_that_the_description_lists_and_the_file_lacks_is_missing(form, suffix):
    label, tensors, *_ = FORMS[form]
    whole = holding(label, tensors)
    left = {name: info for name, info in whole.tensors.items() if name != f"{P}.{suffix}"}
    _, ledger = account([linear()], replace(whole, tensors=left))
    assert f"{P}.{suffix}" in ledger.missing


@pytest.mark.parametrize(("form", "suffix"), REQUIRED)
def test_another_shape_or_container_is_named(form, suffix):
    label, tensors, *_ = FORMS[form]
    dtype, shape = tensors[suffix]
    for odd, code in (((dtype, (*shape, 1)), "tensor-shape"), (("F64", shape), "tensor-dtype")):
        _, ledger = account([linear()], holding(label, tensors | {suffix: odd}))
        assert code in codes(ledger.problems)


@pytest.mark.parametrize("groups", [0, 3, 7, 2048])
def test_scales_that_leave_part_of_a_group_are_misshapen(groups):
    scales = {"weight_scale": ("F32", (N, groups)), "weight_offset": ("F32", (N, groups))}
    _, ledger = account([linear()], holding("W8A16", INT8 | scales))
    assert codes(ledger.problems) == ["tensor-shape", "tensor-shape"]


def test_mx_blocks_may_be_odd_in_number_and_the_last_one_short():
    tensors = {"weight": ("F8_E4M3", (N, 80)), "weight_scale": ("U8", (N, 3))}
    _, ledger = account([linear(k=80)], holding("W8A8_MXFP8", tensors))
    assert ledger.problems == ()


def test_the_model_quant_type_decides_nothing():
    index = holding("W4A8_DYNAMIC", PAIRED_ROWS | ROW)
    notes = {"model_quant_type": "FLOAT", "version": "1.0.0", "group_size": 64, "metadata": {}, "optional": {"a": 1}}
    noted = replace(index, documents={DESCRIPTION: {**notes, **index.documents[DESCRIPTION]}})
    assert LAYOUT.held(linear(), noted).scheme == "w4a8_dynamic" and faults(noted) == []
    assert LAYOUT.detect(noted) == "says 1 W4A8_DYNAMIC"


EXPERT = "model.layers.0.mlp.experts.3.up_proj"
MIXTRAL = "model.layers.0.block_sparse_moe.experts.3.w3"


@pytest.mark.parametrize(
    ("module", "file", "description"),
    [
        (P, P, f"language_model.{P}"),
        (P, P, P.replace("model.", "model.language_model.", 1)),
        (EXPERT, MIXTRAL, MIXTRAL),
        (EXPERT, MIXTRAL, EXPERT),
        (EXPERT, EXPERT, f"language_model.{MIXTRAL}"),
    ],
)
def test_entries_are_found_under_the_names_of_wrappers_and_mixtral(module, file, description):
    index = holding("W8A8_DYNAMIC", INT8 | ROW, file, inside=description)
    held, ledger = account([linear(module)], index)
    assert held[module].scheme == "w8a8_dynamic" and ledger.problems == () and faults(index, linear(module)) == []
    assert LAYOUT.detect(index) == "says 1 W8A8_DYNAMIC" and described(index) is described(index)


def test_a_tensor_s_own_entry_goes_before_one_of_another_name():
    index = holding("W8A16", INT8 | ROW)
    entries = {f"language_model.{P}.weight": "W8A8_DYNAMIC"} | index.documents[DESCRIPTION]
    assert LAYOUT.held(linear(), replace(index, documents={DESCRIPTION: entries})).scheme == "w8a16"


def test_a_smoothed_linear_stands_under_linear_with_its_factor_beside_it():
    index = holding("W8A8_DYNAMIC", INT8 | ROW, f"{P}.linear")
    factor = {f"{P}.div.mul_scale": TensorInfo(f"{P}.div.mul_scale", Path("m"), 0, 0, "F32", (K,))}
    _, ledger = account([linear()], replace(index, tensors={**index.tensors, **factor}))
    assert ledger.problems == () and len(ledger.consumed) == 4


def test_a_float_linear_holds_the_bias_that_smoothing_left_it():
    index = holding("FLOAT", {"weight": ("BF16", (N, K)), "bias": ("F32", (N,))})
    held, ledger = account([linear()], index)
    assert held[P].scheme == "float" and ledger.problems == () and held[P].tensors[1].role == "bias"


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("W8A8_DYNAMC", "is W8A8_DYNAMIC meant?"),
        ("w8a8", "is W8A8 meant?"),
        ("Q8", "quantize with a type that is run here"),
        ("WFP8AFP8_DYNAMIC", "fp8"),
        ("W4A4_MXFP4_SVD", "low-rank"),
        ("W16A16S", "sparse"),
    ],
)
def test_strings_that_nobody_runs_are_refused_by_name_with_their_count(label, said):
    entries = {f"model.layers.{i}.mlp.up_proj.weight": label for i in range(3)}
    index = index_of(entries, [(name, "I8", (N, K)) for name in entries])
    (problem,) = faults(index, *(linear(name.removesuffix(".weight")) for name in entries))
    assert problem.code == "quant-type-unknown" and f"{label} of 3 linears" in problem.what
    assert said in problem.why + problem.fix


def test_each_contradiction_of_file_and_description_is_named_once():
    other = "model.layers.9.mlp.up_proj"
    quantized = holding("W8A8_DYNAMIC", INT8 | ROW)
    stale = {**quantized.documents[DESCRIPTION], f"{other}.weight": "W8A8"}
    cases = [
        (index_of({}, [(f"{P}.weight", "I8", (N, K))]), "has no entry"),
        (index_of({f"{P}.weight": "FLOAT"}, [(f"{P}.weight", "I8", (N, K))]), "has the entry FLOAT"),
        (index_of({f"{P}.weight": "W8A8"}, [(f"{P}.weight", "BF16", (N, K))]), "and BF16 weights"),
        (replace(quantized, documents={DESCRIPTION: stale}), other),
    ]
    for index, said in cases:
        (problem,) = faults(index)
        assert problem.code == "description-missing" and said in problem.what
    assert faults(replace(quantized, documents={DESCRIPTION: stale}), linear(), linear(other)) == []  # the ledger's


def test_a_value_that_is_no_word_is_named_with_the_file_that_has_it():
    index = index_of({f"{P}.weight": 8}, [(f"{P}.weight", "I8", (N, K))], "quant_model_description_w8a8.json")
    (problem,) = faults(index)
    assert (problem.code, problem.where) == ("file-malformed", "model/quant_model_description_w8a8.json")


def test_a_quantized_embedding_is_refused_and_a_quantized_head_is_a_linear():
    table = Module("model.embed_tokens", Kind.EMBEDDING, (N, K), Split.VOCAB)
    index = holding("W8A16", INT8 | ROW, table.name)
    assert codes(faults(index, table)) == ["embedding-quantized"]
    head = linear("lm_head", role=Role.HEAD, tied_to=table.name)
    held, ledger = account([head], holding("W8A8_DYNAMIC", INT8 | ROW, "lm_head"))
    assert held["lm_head"].scheme == "w8a8_dynamic" and ledger.problems == ()


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.o_proj.heads_rotation",
        "model.layers.0.mlp.down_proj.kronecker_rotation_m",
        f"{P}.left_trans",
        f"{P}.svd_lowrank_l1",
        f"{EXPERT}.bias",
        f"{EXPERT}.div.mul_scale",
        "model.layers.0.self_attn.kv_b_proj.bias",
    ],
)
def test_tensors_that_change_what_the_weights_mean_are_refused(name):
    index = index_of({}, [(name, "F32", (8, 8)), ("model.layers.0.mlp.shared_experts.up_proj.bias", "F32", (N,))])
    (problem,) = faults(index)
    assert problem.code == "format-feature" and name in problem.what and LAYOUT.ignorable(name, index) is None


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.k_proj.kv_cache_scale",
        "model.layers.0.self_attn.v_proj.kv_cache_offset",
        "model.layers.0.self_attn.fa_q.scale",
        "blocks.1.attn1.fa3_v.offset",
        "blocks.1.attn1.q_rot",
        "model.layers.0.input_layernorm.module.weight",
    ],
)
def test_tensors_that_float_caches_and_attention_do_not_need_are_left_out_with_a_reason(name):
    assert LAYOUT.ignorable(name, index_of({}))


def model_of_all_kinds():
    return [
        linear(),
        linear("model.layers.0.mlp.down_proj", bias=True),
        Module(EXPERTS, Kind.EXPERTS, (N, K), Split.ROW, experts=3),
        linear("model.layers.1.mlp.gate", 3, role=Role.ROUTER),
        linear("lm_head", role=Role.HEAD),
        Module("model.embed_tokens", Kind.EMBEDDING, (N, K), Split.VOCAB),
        Module("model.norm", Kind.NORM, (K, 1), Split.REPLICATED),
    ]


def assumed(scheme, **options):
    made = LAYOUT.stand_in(model_of_all_kinds(), scheme, options)
    return index_of(made.documents[DESCRIPTION], made.tensors)


@pytest.mark.parametrize("group", [None, -1, 128, K, 4 * K])
@pytest.mark.parametrize("scheme", [*SCHEMES, "float"])
def test_a_stand_in_reads_back_as_what_was_asked(scheme, group):
    # biases of experts are refused elsewhere: these have none
    index = assumed(scheme, **({} if group is None else {"group_size": group}))
    held, ledger = account(model_of_all_kinds(), index)
    assert ledger.problems == () and set(ledger.consumed) == set(index.tensors)
    assert faults(index, *model_of_all_kinds()) == []
    quantized = {name for name, one in held.items() if one.scheme != "float"}
    asked = {P, "model.layers.0.mlp.down_proj", *(EXPERTS.replace("*", str(e)) for e in range(3))}
    assert quantized == (set() if scheme == "float" else asked)
    assert {one.scheme for name, one in held.items() if name in asked} == {scheme}
    if scheme in ("w4a16", "w8a16", "w8a8_dynamic", "w4a4_dynamic", "w4a8_dynamic"):
        assert {one.group for name, one in held.items() if name in asked} == {128 if group == 128 else 0}


def test_a_stand_in_takes_the_first_pattern_that_matches():
    rules = [{"pattern": r"re:.*experts\.\d+\.down_proj", "scheme": "w4a8_dynamic"},
             {"pattern": "*down_proj", "scheme": "float"}]  # fmt: skip
    held, ledger = account(model_of_all_kinds(), assumed("w8a8_static", layers=rules))
    assert ledger.problems == ()
    found = [held[name].scheme for name in (P, "model.layers.0.mlp.down_proj", EXPERTS.replace("*", "2"))]
    assert found == ["w8a8_static", "float", "w4a8_dynamic"]


@pytest.mark.parametrize(
    ("options", "code"),
    [({"group_size": 96}, "format-feature"), ({"layers": [{"pattern": "re:(", "scheme": "float"}]}, "pattern-syntax")],
)
def test_a_stand_in_that_no_tool_writes_is_refused(options, code):
    with pytest.raises(InputError) as refused:
        assumed("w8a16", **options)
    assert codes(refused.value.problems) == [code]


SUFFIXES = sorted({suffix for _, tensors, *_ in FORMS.values() for suffix in tensors} | {"bias", "linear.weight"})
VALUES = st.sampled_from([*{form[0] for form in FORMS.values()}, "FLOAT", "W8A8S", "", 8, None, [], {}])
SHAPES = st.lists(st.sampled_from([0, 1, 2, 8, N // 2, N, K // 2, K]), max_size=3).map(tuple)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(st.sampled_from(SUFFIXES), VALUES),
    st.dictionaries(st.sampled_from(SUFFIXES), st.tuples(st.sampled_from(["I8", "U8", "F32", "BF16", "I64"]), SHAPES)),
)
def test_whatever_file_and_description_say_is_answered_by_problems(entries, tensors):
    index = index_of({f"{P}.{suffix}": value for suffix, value in entries.items()},
                     [(f"{P}.{suffix}", *info) for suffix, info in tensors.items()])  # fmt: skip
    held, ledger = account([linear()], index)
    problems = [*ledger.problems, *faults(index)]
    LAYOUT.detect(index)
    # a file that passes has the weight, and a scheme's tensors or float ones
    if not problems:
        dtype = index.tensors[held[P].tensors[0].name].dtype
        assert (dtype in ("BF16", "F32")) == (held[P].scheme == "float")
