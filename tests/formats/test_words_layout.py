"""Layouts of AWQ, GPTQ and auto-round: the tools' headers in full, stand-ins, configs of any kind."""

import json
from time import perf_counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from framework.errors import UserError
from framework.families.base import modules
from framework.families.config import describe
from framework.formats.registry import LAYOUTS
from framework.geometry import Kind, Module, Role, Split
from tests.formats.golden_words import EXPECTED, FORMATS, OPTIONS, format_of
from tests.formats.headers import CONFIGS, account, each, folders, headers, model_of, recorded, stood_in
from tests.formats.literal_words import linear


def test_every_golden_folder_of_these_formats_is_known():
    assert set(EXPECTED) == set(folders(*(f"{prefix}-" for prefix in FORMATS)))


@pytest.mark.parametrize("folder", EXPECTED)
def test_what_the_tool_wrote_is_read_and_no_tensor_is_left_over(folder):
    layout, index = LAYOUTS[format_of(folder)], headers(folder, **OPTIONS.get(folder, {}))
    model = model_of(index)
    held, ledger = account(layout, model, index)
    assert ledger.problems == () and ledger.ignored == () and set(ledger.consumed) == set(index.tensors)
    assert layout.faults(model, index) == []
    for module in each(model):
        wanted = next((one for part, one in EXPECTED[folder].items() if part in module.name), None)
        one = held[module.name]
        if wanted is None or not module.quantizable:
            assert one.scheme == "float", module.name
            continue
        bits, group, symmetric = wanted
        whole = group >= module.shape[1]
        assert (one.scheme, one.symmetric) == (f"w{bits}a16", symmetric), module.name
        assert one.group == (0 if whole else group) and one.label.startswith(f"{bits} bits"), module.name
        columns = module.shape[1] if "act order" in one.label else one.group or 1
        assert one.grain == (1, columns) and ("act order" in one.label) == ("descact" in folder)


MODEL = [
    linear(64, 256, "model.layers.0.mlp.up_proj"),
    linear(64, 256, "model.layers.1.self_attn.q_proj", bias=True),
    Module("model.layers.1.mlp.experts.*.down_proj", Kind.EXPERTS, (64, 256), Split.ROW, experts=3),
    linear(8, 64, "model.layers.1.mlp.gate", role=Role.ROUTER),
    linear(64, 64, "lm_head", role=Role.HEAD),
    Module("model.embed_tokens", Kind.EMBEDDING, (64, 64), Split.VOCAB),
    Module("model.norm", Kind.NORM, (64, 1), Split.REPLICATED),
]


@pytest.mark.parametrize("symmetric", [None, True, False])
@pytest.mark.parametrize("group", [None, -1, 64, 256])
@pytest.mark.parametrize("scheme", ["w4a16", "w8a16", "float"])
@pytest.mark.parametrize("own", FORMATS.values())
def test_a_stand_in_reads_back_as_what_was_asked(own, scheme, group, symmetric):
    given = {"group_size": group, "symmetric": symmetric}
    options = {key: value for key, value in given.items() if value is not None}
    layout, index = LAYOUTS[own], stood_in(LAYOUTS[own], MODEL, scheme, **options)
    held, ledger = account(layout, MODEL, index)
    assert ledger.problems == () and set(ledger.consumed) == set(index.tensors)
    assert scheme == "float" or layout.faults(MODEL, index) == []
    for module in each(MODEL):
        one = held[module.name]
        asked = scheme if module.quantizable and module.role is Role.NONE else "float"
        assert one.scheme == asked, module.name
        if asked != "float":
            assert one.group == {None: 128, 64: 64}.get(group, 0)
            assert one.symmetric == (own != "awq" if symmetric is None else symmetric)


@pytest.mark.parametrize("own", FORMATS.values())
def test_a_stand_in_takes_the_first_pattern_that_matches(own):
    layers = [{"pattern": "*experts*", "scheme": "w8a16"}, {"pattern": "*_proj", "scheme": "float"},
              {"pattern": "*", "scheme": "w4a16"}]  # fmt: skip
    for rules, wanted in ((layers, ["w8a16", "float"]), (layers[:1], ["w8a16", "w4a16"])):
        index = stood_in(LAYOUTS[own], MODEL, "w4a16", layers=rules)
        held, ledger = account(LAYOUTS[own], MODEL, index)
        assert ledger.problems == () and LAYOUTS[own].faults(MODEL, index) == []
        assert [held[name].scheme for name in ("model.layers.1.mlp.experts.2.down_proj", MODEL[0].name)] == wanted


@pytest.mark.parametrize(
    ("own", "published"), [("awq", "Qwen3-30B-A3B"), ("auto_round", "Qwen3-30B-A3B"), ("gptq", "DeepSeek-R1")]
)
def test_a_stand_in_of_a_published_model_closes(own, published):
    config = json.loads((CONFIGS / published / "config.json").read_text())
    model = list(modules(describe({key: value for key, value in config.items() if key != "quantization_config"})))
    started = perf_counter()
    index = stood_in(LAYOUTS[own], model, "w4a16", group_size=64)
    held, ledger = account(LAYOUTS[own], model, index)
    assert ledger.problems == () and set(ledger.consumed) == set(index.tensors)
    print(f"{published} as {own}: {len(index.tensors)} tensors in {perf_counter() - started:.1f} s")
    experts = [one for name, one in held.items() if ".experts." in name]
    assert {one.scheme for one in experts} == {"w4a16"} and len(experts) > 10000


KEYS = {
    "awq": ["bits", "w_bit", "group_size", "q_group_size", "zero_point", "version", "format", "checkpoint_format",
            "modules_to_not_convert", "dynamic", "meta", "quant_method"],
    "gptq": ["bits", "group_size", "sym", "desc_act", "checkpoint_format", "format", "is_marlin_format", "lm_head",
             "dynamic", "pack_dtype", "meta", "quant_method"],
    "auto_round": ["bits", "group_size", "sym", "data_type", "packing_format", "block_name_to_quantize",
                   "to_quant_block_names", "extra_config", "act_bits", "rotation_config", "quant_method"],
}  # fmt: skip
TEXTS = st.sampled_from(["model.layers", ".*proj", "-:.*", "+:(", "a{9999999999}", "[", "gptq_v2", "int32"]) | st.text()
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(TEXTS | st.sampled_from(KEYS["gptq"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # expressions that Python will read otherwise one day
@pytest.mark.parametrize("own", FORMATS.values())
@pytest.mark.parametrize("folder", ["tiny-qwen3/gptq-w4g128-sym", "tiny-qwen3-moe/awq-w4g64"])
def test_whatever_a_config_says_is_answered_by_user_errors(own, folder):
    method = recorded()[folder]["config"]["quantization_config"]

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(st.dictionaries(st.sampled_from(KEYS[own]), JSON, max_size=4))
    def answer(values):
        index = headers(folder)
        config = {**method, "quant_method": own.replace("_", "-"), **values}
        object.__setattr__(index, "config", {**index.config, "quantization_config": config})
        model = model_of(index)[:9]
        try:
            LAYOUTS[own].detect(index)
            held, _ = account(LAYOUTS[own], model, index)
            problems = LAYOUTS[own].faults(model, index)
        except UserError:
            return
        assert all(one.scheme in ("float", "w4a16", "w8a16") for one in held.values())
        assert all(problem.code and problem.what and problem.where and problem.fix for problem in problems)

    answer()


@pytest.mark.parametrize("own", FORMATS.values())
def test_values_of_a_wrong_type_or_size_are_named(own):
    wrong = {"bits": "four", "zero_point" if own == "awq" else "sym": 1, "group_size": -7}
    index = stood_in(LAYOUTS[own], MODEL, "w4a16")
    index.config["quantization_config"].update(wrong)
    problems = [problem for problem in LAYOUTS[own].faults(MODEL, index) if problem.code == "file-malformed"]
    assert [problem.what.split(" ")[0] for problem in problems] == list(wrong)
    assert "group size of 1 or more" in problems[-1].why
    index.config["quantization_config"].update({"bits": 4, "group_size": 0})
    assert "group_size of the quantization is 0" in [p.what for p in LAYOUTS[own].faults(MODEL, index)]


@pytest.mark.parametrize("own", FORMATS.values())
def test_other_widths_are_refused_with_their_number(own):
    index = stood_in(LAYOUTS[own], MODEL, "w4a16")
    index.config["quantization_config"]["bits"] = 3
    (problem,) = LAYOUTS[own].faults(MODEL, index)
    assert problem.code == "format-feature" and "3 bits" in problem.what and "and 4 more" in problem.what


@pytest.mark.parametrize("own", FORMATS.values())
@pytest.mark.parametrize("role", ["qweight", "qzeros", "scales"])
def test_half_a_linear_is_missing_its_other_half(own, role):
    index = stood_in(LAYOUTS[own], MODEL, "w4a16")
    lost = f"model.layers.1.mlp.experts.1.down_proj.{role}"
    index.tensors.pop(lost)
    _, ledger = account(LAYOUTS[own], MODEL, index)
    assert lost in ledger.missing or (role == "qweight" and any(lost in problem.what for problem in ledger.problems))


@pytest.mark.parametrize("own", FORMATS.values())
def test_a_config_beside_a_file_without_codes_is_refused(own):
    index = stood_in(LAYOUTS[own], MODEL, "float")
    (problem,) = LAYOUTS[own].faults(MODEL, index)
    assert problem.code == "description-missing" and "no linear of the file has codes" in problem.what
