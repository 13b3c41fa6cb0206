"""compressed-tensors: what the config and the headers say of every module, without a byte of a weight."""

import json
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
from framework.formats.compressed_tensors.groups import parse
from framework.formats.compressed_tensors.layout import CompressedTensorsLayout
from framework.geometry import Kind, Module, Role, Split

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = sorted(GOLDEN.glob("*/ct-*"))
LAYOUT = CompressedTensorsLayout()
FLOAT = ("float", 0, True, "")
W8A8 = ("w8a8_dynamic", 0, True, "")
TOKEN = {"num_bits": 8, "strategy": "token", "dynamic": True}
NAME = "model.layers.0.mlp.up_proj"


def linear(name=NAME, n=64, k=256, **more):
    return Module(name, Kind.LINEAR, (n, k), Split.COLUMN, **more)


def index_of(config, tensors=()):
    infos = {name: TensorInfo(name, Path("model.safetensors"), 0, 0, dtype, shape) for name, dtype, shape in tensors}
    return Index(Path("model"), "safetensors", infos, config=config)


def declaring(weights=None, tensors=(), *, group=None, **top):
    """Index of one group on the class Linear."""
    group = {"targets": ["Linear"], "weights": weights, **(group or {})}
    given = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **top}
    return index_of({"quantization_config": given}, tensors)


def each(model, index):
    for module in model:
        yield from [module.expert(e) for e in range(module.experts)] if module.experts else [module]


def account(model, index):
    """Held by module, and the ledger of the file."""
    held = {module.name: LAYOUT.held(module, index) for module in each(model, index)}
    tensors = {name: one.tensors for name, one in held.items()}
    return held, settle(index, tensors, lambda name: LAYOUT.ignorable(name, index))


def form(held):
    return held.scheme, held.group, held.symmetric, held.variant


# of each folder: the form of the modules that a part of a name selects, first match; all others are float
EXPECTED = {
    "ct-mixed": {"layers.1.mlp.down_proj": FLOAT, "self_attn": W8A8, "gate_proj": ("w4a16", 128, True, ""),
                 "up_proj": ("w4a16", 128, True, ""), "down_proj": ("w8a16", 0, True, "")},
    "ct-w4a16-g128-1l": {"_proj": ("w4a16", 128, True, "")},
    "ct-w4a16-g128-asym-1l": {"_proj": ("w4a16", 128, False, "")},
    "ct-w8a8-static-1l": {"_proj": ("w8a8_static", 0, True, "")},
    "ct-w4a8-channel-1l": {"self_attn": W8A8, ".experts.": ("w4a8_dynamic", 0, True, "")},
    "ct-w4a8-clip-1l": {"self_attn": W8A8, ".experts.": ("w4a8_dynamic", 0, True, "clip")},
}  # fmt: skip


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_what_the_tools_wrote_is_read_and_no_tensor_is_left_over(folder):
    index = open_index(folder)
    model = list(modules(describe(index.config)))
    held, ledger = account(model, index)
    assert ledger.problems == () and ledger.ignored == () and set(ledger.consumed) == set(index.tensors)
    assert LAYOUT.faults(model, index) == []
    assert LAYOUT.detect(index).startswith("says compressed-tensors, format ")
    recorded = json.loads((folder / "tensors.json").read_text())
    quantized = {name for name, one in held.items() if one.scheme != "float"}
    assert quantized == set(recorded.get("modules", recorded))
    for module in each(model, index):
        known = EXPECTED[folder.name].items() if module.quantizable and "_norm" not in module.name else ()
        wanted = next((one for part, one in known if part in module.name), FLOAT)
        assert form(held[module.name]) == wanted, module.name


def test_every_copied_folder_has_its_expectation():
    assert {folder.name for folder in FOLDERS} == set(EXPECTED)


def scheme_of(name, config, **more):
    module = linear(name, **more)
    return LAYOUT.held(module, index_of({"quantization_config": config})).scheme


def config_of(*groups, ignore=()):
    """Groups by targets: int4 for the first, int8 for the second."""
    made = {
        f"group_{i}": {"targets": targets, "weights": {"num_bits": bits, "strategy": "channel"}}
        for i, (targets, bits) in enumerate(groups)
    }
    return {"quant_method": "compressed-tensors", "config_groups": made, "ignore": list(ignore)}


EXPERT = "model.layers.0.mlp.experts.3.up_proj"


@pytest.mark.parametrize(
    ("name", "groups", "ignore", "scheme"),
    [
        (NAME, [(["Linear"], 4)], (), "w4a16"),
        (NAME, [(["linear"], 4)], (), "w4a16"),
        (NAME, [(["Linear"], 4), ([NAME], 8)], (), "w8a16"),  # a name goes before a class
        (NAME, [([r"re:.*up_proj$"], 4), ([NAME], 8)], (), "w4a16"),  # names and expressions in order
        (NAME, [([r"re:.*mlp\.up"], 4)], (), "w4a16"),  # from the start, not to the end
        (NAME, [([r"re:mlp\.up_proj"], 4)], (), "float"),
        (NAME, [(["up_proj"], 4)], (), "float"),  # a target is a whole name
        (NAME, [(["Linear"], 4)], [NAME], "float"),
        (NAME, [([NAME], 4)], ["mlp.up_proj"], "float"),  # ignored by the end of the name
        (NAME, [(["Linear"], 4)], ["model.layers.0.mlp", "p_proj", "model.layers"], "w4a16"),  # no other part
        (NAME, [(["Linear"], 4)], [r"re:.*\.mlp\."], "float"),
        ("lm_head", [(["Linear"], 4)], (), "float"),  # the class does not reach the head
        ("lm_head", [(["lm_head"], 4)], (), "w4a16"),
        ("model.layers.0.mlp.gate", [(["Linear"], 4)], (), "float"),
        (EXPERT, [(["Linear"], 4)], (), "w4a16"),
        (EXPERT, [(["Linear"], 8), (["MoEGMM"], 4)], (), "w4a16"),  # the special class first
        (NAME, [(["Linear"], 8), (["MoEGMM"], 4)], (), "w8a16"),
        (NAME, [(["MoEGMM"], 4)], (), "float"),
    ],
)
def test_names_expressions_and_classes_choose_the_group(name, groups, ignore, scheme):
    role = {"lm_head": Role.HEAD, "model.layers.0.mlp.gate": Role.ROUTER}.get(name, Role.NONE)
    assert scheme_of(name, config_of(*groups, ignore=ignore), role=role) == scheme


def test_mixtral_and_wrapped_names_match_as_the_file_spells_them():
    embedding = ("language_model.model.embed_tokens.weight", "BF16", (8, 256))
    w3 = "language_model.model.layers.0.block_sparse_moe.experts.3.w3"
    tensors = [embedding, (f"{w3}.weight_packed", "I32", (64, 32)), (f"{w3}.weight_scale", "BF16", (64, 1))]
    for target in (r"re:.*block_sparse_moe\.experts\..*\.w[123]$", w3, EXPERT):
        config = config_of(([target], 4))
        held = LAYOUT.held(linear(EXPERT), index_of({"quantization_config": config}, tensors))
        assert held.scheme == "w4a16" and held.tensors[0].name == f"{w3}.weight_packed"


def test_an_old_compression_config_is_read_with_what_it_nests():
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, "strategy": "channel"}, "input_activations": TOKEN}
    plain = {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group}}
    for config in (plain, {"quantization_config": plain, "sparsity_config": {"format": "dense"}}):
        index = index_of({"compression_config": config})
        assert LAYOUT.held(linear(), index).scheme == "w8a8_dynamic"
        assert LAYOUT.faults([], index) == []


@pytest.mark.parametrize(
    ("preset", "scheme", "group", "symmetric"),
    [
        ("W8A8", "w8a8_dynamic", 0, True),
        ("INT8", "w8a8_dynamic", 0, True),
        ("W4A16", "w4a16", 128, True),
        ("W4A16_ASYM", "w4a16", 128, False),
        ("W8A16", "w8a16", 128, True),
        ("W4A8", "w4a8_dynamic", 128, True),
    ],
)
def test_a_preset_stands_for_its_arguments(preset, scheme, group, symmetric):
    config = {"quant_method": "compressed-tensors", "config_groups": {preset: ["Linear"]}}
    assert form(LAYOUT.held(linear(), index_of({"quantization_config": config}))) == (scheme, group, symmetric, "")


def test_the_names_in_the_file_say_how_codes_are_stored_whatever_the_format_says():
    weights = {"num_bits": 4, "strategy": "group", "group_size": 128}
    for stored, declared in (("weight_packed", "int-quantized"), ("weight", "pack-quantized")):
        index = declaring(weights, [(f"{NAME}.{stored}", "I32", (64, 32))], format=declared)
        assert LAYOUT.held(linear(), index).tensors[0].role == stored
    assert LAYOUT.held(linear(), declaring(weights, format="int-quantized")).tensors[0].role == "weight"


def test_rows_packed_by_two_are_known_by_their_shape_and_need_alpha_only_with_clip():
    down = "model.layers.0.mlp.experts.0.down_proj"
    halves = [(f"{down}.weight", "I8", (32, 256))]
    group = {"targets": ["MoEGMM"], "input_activations": TOKEN}
    for clip, roles in ((False, 3), (True, 4)):
        index = declaring({"num_bits": 4, "strategy": "channel"}, halves, group={**group, "activation_use_clip": clip})
        held = LAYOUT.held(linear(down), index)
        assert (held.scheme, held.variant, held.grain) == ("w4a8_dynamic", "clip" if clip else "paired", (2, 1))
        assert [spec.role for spec in held.tensors] == ["weight", "weight_scale", "bias", "alpha"][:roles]


@pytest.mark.parametrize(
    ("weights", "packed", "k", "grain"),
    [
        ({"num_bits": 4, "group_size": 128}, True, 256, (1, 128)),
        ({"num_bits": 4, "group_size": 128}, True, 128, (1, 8)),  # one group: its scale is every rank's
        ({"num_bits": 4, "group_size": 128, "symmetric": False}, True, 256, (8, 128)),  # words of zeros hold 8 rows
        ({"num_bits": 8, "group_size": 32, "symmetric": False}, True, 256, (4, 32)),
        ({"num_bits": 4, "group_size": 12}, True, 48, (1, 24)),  # whole words and whole groups
        ({"num_bits": 4, "group_size": 128, "symmetric": False}, False, 256, (1, 128)),
        ({"num_bits": 4, "strategy": "channel"}, True, 256, (1, 8)),
        ({"num_bits": 8, "strategy": "channel"}, False, 256, (1, 1)),
        ({"num_bits": 4, "group_size": 128, "actorder": "group"}, True, 256, (1, 256)),  # of any columns
    ],
)
def test_a_cut_leaves_whole_words_and_whole_groups(weights, packed, k, grain):
    index = declaring(weights, format="pack-quantized" if packed else "int-quantized")
    assert LAYOUT.held(linear(k=k), index).grain == grain


@pytest.mark.parametrize(
    ("weights", "group", "tensors"),
    [
        ({"num_bits": 4, "group_size": 64, "symmetric": False}, {"format": "pack-quantized"},
         {"weight_packed": (60, 32), "weight_shape": (2,), "weight_scale": (60, 4), "weight_zero_point": (8, 4)}),
        ({"num_bits": 8, "strategy": "channel", "symmetric": False}, {"format": "int-quantized"},
         {"weight": (60, 256), "weight_scale": (60, 1), "weight_zero_point": (60, 1)}),
        ({"num_bits": 4, "group_size": 64, "actorder": "group"}, {"format": "pack-quantized"},
         {"weight_packed": (60, 32), "weight_shape": (2,), "weight_scale": (60, 4), "weight_g_idx": (256,)}),
        ({"num_bits": 8}, {"input_activations": {"symmetric": False}, "format": "int-quantized"},
         {"weight": (60, 256), "weight_scale": (1,), "input_scale": (1,), "input_zero_point": (1,)}),
    ],
)  # fmt: skip
def test_every_strategy_has_its_tensors(weights, group, tensors):
    held = LAYOUT.held(linear(n=60), declaring(weights, group=group))
    assert {spec.role: spec.shape for spec in held.tensors} == tensors


def test_a_scale_of_one_value_may_have_any_number_of_dimensions():
    tensors = [(f"{NAME}.weight", "I8", (64, 256)), (f"{NAME}.weight_scale", "BF16", ())]
    _, ledger = account([linear()], declaring({"num_bits": 8}, tensors))
    assert ledger.problems == ()


@pytest.mark.parametrize(
    ("group", "top", "code", "said"),
    [
        ({"weights": {"num_bits": 3, "group_size": 128}}, {}, "format-feature", "3-bit int weights"),
        ({"weights": {"type": "float"}}, {"format": "float-quantized"}, "format-feature", "float-quantized"),
        ({"weights": {"num_bits": 8}}, {"format": "marlin-24"}, "format-feature", "marlin-24"),
        ({"weights": {"num_bits": 8}}, {"format": "int-quantised"}, "quant-type-unknown", "int-quantized"),
        ({"weights": {"strategy": "block"}}, {}, "format-feature", "by block"),
        ({"weights": {"strategy": "blok"}}, {}, "quant-type-unknown", "blok"),
        ({"weights": {"actorder": "up"}}, {}, "quant-type-unknown", "actorder"),
        ({"weights": {"num_bits": "four"}}, {}, "file-malformed", "'four'"),
        ({"weights": {"num_bits": True}}, {}, "file-malformed", "True"),
        ({"weights": {"group_size": -5}}, {}, "file-malformed", "-5"),
        ({"weights": {"strategy": "group"}}, {}, "file-malformed", "group_size 0"),
        ({"weights": [4]}, {}, "file-malformed", "[4]"),
        ({"weights": {}, "targets": "Linear"}, {}, "file-malformed", "targets"),
        ({"weights": {}, "output_activations": TOKEN}, {}, "format-feature", "outputs"),
        ({"weights": {}, "input_activations": {**TOKEN, "num_bits": 4}}, {}, "format-feature", "4-bit int act"),
        ({"weights": {}, "input_activations": {**TOKEN, "type": "float"}}, {}, "format-feature", "float activations"),
        ({"weights": {}, "input_activations": {"dynamic": "local"}}, {}, "format-feature", "dynamic activations"),
        ({"weights": {"num_bits": 4}, "input_activations": {}}, {}, "format-feature", "static activations"),
        ({"weights": {}}, {"sparsity_config": {"format": "sparse-24-bitmask"}}, "format-feature", "sparsity_config"),
        ({"weights": {}}, {"transform_config": {"config_groups": {"u": {}}}}, "format-feature", "transform_config"),
        ({"weights": {}}, {"ignore": "lm_head"}, "file-malformed", "ignore"),
        ({"weights": {}}, {"ignore": ["re:("]}, "file-malformed", "re:("),
        ({"weights": {}}, {"config_groups": {}}, "file-malformed", "config_groups"),
        ({"weights": {}}, {"config_groups": {"FP8_DYNAMIC": ["Linear"]}}, "quant-type-unknown", "FP8_DYNAMIC"),
        ({"weights": {}}, {"config_groups": {"group_0": 5}}, "file-malformed", "group_0"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_one_problem_that_names_it(group, top, code, said):
    index = declaring(group=group, **top)
    found = LAYOUT.faults([linear(), linear("model.layers.1.mlp.up_proj")], index)
    assert [problem.code for problem in found] == [code]
    assert said in found[0].what + found[0].why and found[0].fix and found[0].where


def test_all_modules_of_a_refused_group_are_counted_in_one_problem_and_their_tensors_used():
    stored = [(f"model.layers.{i}.mlp.up_proj.{suffix}", dtype, (64, 256)) for i in range(3)
              for suffix, dtype in (("weight", "F8_E4M3"), ("weight_scale", "F32"))]  # fmt: skip
    model = [linear(f"model.layers.{i}.mlp.up_proj") for i in range(3)]
    index = declaring({"type": "float"}, stored, format="float-quantized")
    (problem,) = LAYOUT.faults(model, index)
    assert "model.layers.0.mlp.up_proj and 2 more" in problem.what
    assert account(model, index)[1].problems == ()


PACKED = (("weight_packed", "I32", (64, 32)), ("weight_scale", "BF16", (64, 1)), ("weight_shape", "I64", (2,)))


def stored_packed(name):
    return [(f"{name}.{suffix}", dtype, shape) for suffix, dtype, shape in PACKED]


def test_codes_that_nothing_declares_and_float_weights_that_are_declared_quantized_are_told():
    weights = {"num_bits": 4, "strategy": "channel"}
    forgotten = declaring(weights, stored_packed(NAME), ignore=[NAME])
    frozen = declaring(weights, [(f"{NAME}.weight", "BF16", (64, 256)), (f"{NAME}.weight_scale", "BF16", (64, 1))],
                       quantization_status="frozen")  # fmt: skip
    dense = declaring(None, stored_packed(NAME), format="dense")
    for index in (forgotten, frozen, dense):
        (problem,) = LAYOUT.faults([linear()], index)
        assert problem.code == "description-missing" and NAME in problem.what
        assert account([linear()], index)[1].problems == ()


def test_a_quantized_embedding_is_refused():
    embedding = Module("model.embed_tokens", Kind.EMBEDDING, (64, 256), Split.VOCAB)
    index = declaring({"num_bits": 4, "strategy": "channel"}, stored_packed(embedding.name),
                      group={"targets": ["Linear", "model.embed_tokens"]})  # fmt: skip
    assert [problem.code for problem in LAYOUT.faults([embedding], index)] == ["embedding-quantized"]
    assert account([embedding], index)[1].problems == ()


@pytest.mark.parametrize(("name", "role"), [("lm_head", Role.HEAD), ("model.layers.0.mlp.gate", Role.ROUTER)])
def test_heads_and_routers_that_the_class_took_are_read_as_the_file_has_them(name, role):
    index = declaring({"num_bits": 4, "strategy": "channel"}, stored_packed(name))
    assert LAYOUT.held(linear(name, role=role), index).scheme == "w4a16"
    assert LAYOUT.faults([linear(name, role=role)], index) == []


@pytest.mark.parametrize("name", ["k_scale", "v_scale", "attn.k_scale", "k_proj.output_scale", "v_zero_point"])
def test_scales_of_a_quantized_cache_are_left_out_with_a_reason(name):
    index = declaring({"num_bits": 8}, kv_cache_scheme={"num_bits": 8, "type": "float"})
    assert "KV cache" in LAYOUT.ignorable(f"model.layers.0.self_attn.{name}", index)
    assert LAYOUT.ignorable("model.layers.0.self_attn.k_proj.weight_scale", index) is None


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 300)
    | st.text(max_size=4)
    | st.sampled_from(["group", "Linear", "re:("]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)
ARGS = st.dictionaries(
    st.sampled_from(["num_bits", "type", "symmetric", "strategy", "group_size", "dynamic", "actorder"]), JSON
)
GROUP = st.fixed_dictionaries(
    {},
    optional={"targets": st.just(["Linear"]) | JSON, "weights": ARGS | JSON, "input_activations": ARGS | JSON,
              "output_activations": JSON, "format": JSON, "activation_use_clip": JSON},
)  # fmt: skip
CONFIG = st.fixed_dictionaries(
    {"quant_method": st.just("compressed-tensors")},
    optional={"config_groups": st.dictionaries(st.sampled_from(["group_0", "W4A16", "x"]), GROUP | JSON) | JSON,
              "ignore": JSON, "format": JSON, "sparsity_config": JSON, "transform_config": JSON,
              "quantization_config": JSON},
)  # fmt: skip


@given(config=CONFIG, stored=st.sampled_from([[], stored_packed(NAME), [(f"{NAME}.weight", "I8", (32, 256))]]))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_whatever_the_config_holds_every_module_has_a_form_and_nothing_crashes(config, stored):
    index = index_of({"quantization_config": config}, stored)
    assert LAYOUT.held(linear(), index).tensors
    assert all(problem.code and problem.what for problem in LAYOUT.faults([linear()], index))


def model_of(folder):
    return list(modules(describe(json.loads((GOLDEN / folder / "config.json").read_text()))))


def read_back(made):
    return index_of(made.config, made.tensors)


@pytest.mark.parametrize("folder", ["tiny-qwen3/base", "tiny-qwen3-moe/ct-w4a16-g128-1l"])
@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "w4a8_dynamic", "w8a8_dynamic", "w8a8_static", "float"])
@pytest.mark.parametrize("options", [{}, {"group_size": 32}, {"group_size": -1, "symmetric": False}])
def test_a_stand_in_reads_back_as_its_scheme(folder, scheme, options):
    model = model_of(folder)
    index = read_back(LAYOUT.stand_in(model, scheme, options))
    held, ledger = account(model, index)
    assert ledger.problems == () and ledger.ignored == () and LAYOUT.faults(model, index) == []
    for module in each(model, index):
        one = held[module.name]
        quantized = module.quantizable and module.role is Role.NONE and scheme != "float"
        assert one.scheme == (scheme if quantized else "float")
        if quantized and "a16" in scheme:
            assert one.group == {32: 32, -1: 0}.get(options.get("group_size"), 128)
            assert one.symmetric == options.get("symmetric", True)


def test_a_stand_in_has_the_tensors_of_the_real_file():
    for folder, scheme in (
        ("tiny-qwen3/ct-w8a8-static-1l", "w8a8_static"),
        ("tiny-qwen3-moe/ct-w4a16-g128-1l", "w4a16"),
    ):
        index = open_index(GOLDEN / folder)
        made = LAYOUT.stand_in(list(modules(describe(index.config))), scheme, {})
        assert {name: (dtype, shape) for name, dtype, shape in made.tensors} == {
            info.name: (info.dtype, info.shape) for info in index.tensors.values()
        }


def test_patterns_of_a_stand_in_are_tried_in_order():
    model = model_of("tiny-qwen3-moe/ct-w4a16-g128-1l")
    rules = [
        {"pattern": "*.self_attn.o_proj", "scheme": "float"},
        {"pattern": "*.self_attn.*", "scheme": "w8a8_static"},
        {"pattern": r"re:.*\.experts\.\d+\.down_proj", "scheme": "w8a8_dynamic"},
        {"pattern": "*.mlp.experts.*", "scheme": "w4a8_dynamic"},
    ]
    index = read_back(LAYOUT.stand_in(model, "w4a16", {"layers": rules}))
    held, ledger = account(model, index)
    assert ledger.problems == () and LAYOUT.faults(model, index) == []
    schemes = {name.rpartition(".")[2]: one.scheme for name, one in held.items()}
    assert (schemes["o_proj"], schemes["q_proj"]) == ("float", "w8a8_static")
    assert (schemes["down_proj"], schemes["up_proj"]) == ("w8a8_dynamic", "w4a8_dynamic")
    assert (schemes["gate"], schemes["lm_head"]) == ("float", "float")


def test_a_stand_in_of_a_scheme_that_nobody_writes_is_refused():
    with pytest.raises(InputError) as caught:
        LAYOUT.stand_in(model_of("tiny-qwen3/base"), "w4a8_dynamics", {})
    (problem,) = caught.value.problems
    assert problem.code == "quant-type-unknown" and problem.fix == "model.assume.scheme=w4a8_dynamic"


def test_a_group_without_weights_leaves_its_modules_float():
    parsed = parse({"config_groups": {"group_0": {"targets": ["Linear"], "weights": None}}})
    assert parsed.problems == () and parsed.find((NAME,))[0].scheme == "float"
