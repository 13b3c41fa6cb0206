"""GGUF headers: stacked and single experts, what is refused by name, and the types llama.cpp gives tensors."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from framework.checkpoint.gguf import GGML_TYPES
from framework.checkpoint.index import Index, TensorInfo
from framework.checkpoint.ledger import settle
from framework.checkpoint.open import open_index
from framework.errors import InputError
from framework.families.base import modules
from framework.families.config import describe
from framework.families.gguf import config_of, describe_gguf
from framework.formats.gguf.layout import DECODABLE, GgufLayout
from framework.geometry import Kind, Module, Role, Split

GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = sorted(GOLDEN.glob("*/gguf-*"))
LAYOUT = GgufLayout()
EXPERTS = Module("model.layers.0.mlp.experts.*.up_proj", Kind.EXPERTS, (128, 256), Split.COLUMN, experts=8)


def index_of(tensors, architecture="qwen3moe"):
    infos = {name: TensorInfo(name, Path("m.gguf"), 0, 0, dtype, shape) for name, dtype, shape in tensors}
    return Index(Path("m.gguf"), "gguf", infos, {"general.architecture": architecture})


def account(model, index):
    held = {}
    for module in model:
        apart = module.kind is Kind.EXPERTS and not LAYOUT.stacked(module, index)
        for one in [module.expert(e) for e in range(module.experts)] if apart else [module]:
            held[one.name] = LAYOUT.held(one, index)
    tensors = {name: one.tensors for name, one in held.items()}
    return held, settle(index, tensors, lambda name: LAYOUT.ignorable(name, index))


def opened(folder):
    index = open_index(sorted(folder.glob("*.gguf"))[0])
    return index, list(modules(describe_gguf(index)))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_what_the_quantizer_wrote_is_read_and_no_tensor_is_left_over(folder):
    index, model = opened(folder)
    held, ledger = account(model, index)
    assert ledger.problems == () and set(ledger.consumed) == set(index.tensors)
    assert LAYOUT.faults(model, index) == []
    assert {one.scheme for one in held.values()} == {"float"}
    for name, one in held.items():
        assert {spec.name: index.tensors[spec.name].dtype for spec in one.tensors}[one.tensors[0].name] == one.label, (
            name
        )


def test_stacked_experts_have_one_tensor_and_projections_types_of_their_own():
    kinds = {"gate": "Q4_K", "up": "IQ4_XS", "down": "Q8_0"}
    shapes = {"gate": (8, 128, 256), "up": (8, 128, 256), "down": (8, 256, 128)}
    index = index_of([(f"blk.0.ffn_{part}_exps.weight", kind, shapes[part]) for part, kind in kinds.items()])
    model = [
        Module(f"model.layers.0.mlp.experts.*.{part}_proj", Kind.EXPERTS, shape[1:], Split.COLUMN, experts=8)
        for part, shape in shapes.items()
    ]
    held, ledger = account(model, index)
    assert ledger.problems == () and all(LAYOUT.stacked(module, index) for module in model)
    assert [one.label for one in held.values()] == list(kinds.values())
    assert {one.schemes for one in held.values()} == {("float",)}  # the grouped op takes no blocks


def test_experts_of_early_mixtral_files_have_tensors_of_their_own():
    parts = {"gate": (128, 256), "up": (128, 256), "down": (256, 128)}
    index = index_of(
        [(f"blk.0.ffn_{part}.{e}.weight", "Q4_0", shape) for part, shape in parts.items() for e in range(8)], "llama"
    )
    model = [
        Module(f"model.layers.0.mlp.experts.*.{part}_proj", Kind.EXPERTS, shape, Split.COLUMN, experts=8)
        for part, shape in parts.items()
    ]
    held, ledger = account(model, index)
    assert ledger.problems == () and len(ledger.consumed) == 24
    assert held["model.layers.0.mlp.experts.5.down_proj"].tensors[0].name == "blk.0.ffn_down.5.weight"


@pytest.mark.parametrize("kind", sorted(set(GGML_TYPES) - set(DECODABLE)))
def test_a_type_that_cannot_be_dequantized_is_named(kind):
    _, ledger = account([EXPERTS], index_of([("blk.0.ffn_up_exps.weight", kind, (8, 128, 256))]))
    (problem,) = ledger.problems
    assert problem.code == "gguf-type" and f"({kind})" in problem.what and "ffn_up_exps" in problem.what


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("blk.0.ffn_gate_up_exps.weight", "gate and up"),
        ("blk.0.attn_qkv.weight", "q, k and v"),
        ("blk.0.attn_k_b.weight", "kv_b_proj"),
        ("blk.0.ffn_down.scale", "scales"),
        ("blk.0.ffn_down.input_scale", "scales"),
    ],
)
def test_fused_and_split_weights_are_refused_by_name(name, said):
    (problem,) = LAYOUT.faults([], index_of([(name, "F32", (1,)), (name.replace("blk.0", "blk.1"), "F32", (1,))]))
    assert problem.code == "format-feature" and said in problem.what and f"{name} and 1 more" in problem.what


def test_a_module_without_a_gguf_name_is_missing_and_not_a_crash():
    odd = Module("model.layers.0.mlp.shared_expert_gate", Kind.LINEAR, (1, 8), Split.REPLICATED)
    _, ledger = account([odd], index_of([]))
    assert [problem.code for problem in ledger.problems] == ["tensor-missing"]


def test_the_bias_of_a_router_of_deepseek_is_a_vector():
    bias = Module(
        "model.layers.3.mlp.gate.e_score_correction_bias", Kind.PARAMETER, (8, 1), Split.REPLICATED, dims=(8,),
        role=Role.ROUTER,
    )  # fmt: skip
    _, ledger = account([bias], index_of([("blk.3.exp_probs_b.bias", "F32", (8,))], "deepseek2"))
    assert ledger.problems == ()


def made_types(model, mix, scheme="float", **options):
    made = LAYOUT.stand_in(model, scheme, {"mix": mix, **options} if mix else options)
    return {name: (dtype, shape) for name, dtype, shape in made.tensors}


# folders that llama.cpp made with one of its mixes, no tensor overridden
@pytest.mark.parametrize(
    ("folder", "mix"),
    [
        ("tiny-qwen3/gguf-q4_k_m", "Q4_K_M"),
        ("tiny-qwen3/gguf-q2_k-1l", "Q2_K"),
        ("tiny-qwen3/gguf-q4_0-split-1l", "Q4_0"),
        ("tiny-qwen3-moe/gguf-mxfp4_moe-1l", "MXFP4_MOE"),
    ],
)
def test_a_stand_in_has_the_types_and_shapes_of_the_real_file(folder, mix):
    index, model = opened(GOLDEN / folder)
    assert made_types(model, mix) == {info.name: (info.dtype, info.shape) for info in index.tensors.values()}


def moe(experts, width):
    index, _ = opened(GOLDEN / "tiny-qwen3-moe" / "gguf-mxfp4_moe-1l")
    config = config_of(index) | {"num_experts": experts, "moe_intermediate_size": width}
    return list(modules(describe(config)))


def test_eight_experts_and_narrow_columns_change_the_mix_as_in_llama_cpp():
    """Types of Q4_K_M files that llama.cpp wrote: 8 experts of width 128, then 4 of width 512."""
    common = {"attn_norm": "F32", "attn_q_norm": "F32", "attn_k_norm": "F32", "ffn_norm": "F32", "ffn_gate_inp": "F32",
              "attn_q": "Q4_K", "ffn_gate_exps": "Q4_K", "ffn_up_exps": "Q4_K"}  # fmt: skip
    top = {"token_embd.weight": "Q4_K", "output.weight": "Q6_K", "output_norm.weight": "F32"}
    of_8 = {"attn_k": "Q8_0", "attn_v": "Q8_0", "attn_output": "Q5_K", "ffn_down_exps": "Q8_0"}
    of_4 = {"attn_k": "Q4_K", "attn_v": "Q6_K", "attn_output": "Q4_K", "ffn_down_exps": "Q6_K"}
    for experts, width, own in ((8, 128, of_8), (4, 512, of_4)):
        made = made_types(moe(experts, width), "Q4_K_M")
        expected = {f"blk.0.{part}.weight": kind for part, kind in (common | own).items()} | top
        assert {name: kind for name, (kind, _) in made.items()} == expected


def dense(**changes):
    config = json.loads((GOLDEN / "tiny-qwen3" / "base" / "config.json").read_text()) | changes
    config.pop("layer_types", None)
    return list(modules(describe(config)))


def test_the_first_and_last_eighth_and_every_third_layer_get_more_bits():
    made = made_types(dense(num_hidden_layers=32), "Q4_K_M")
    raised = [i for i in range(32) if made[f"blk.{i}.ffn_down.weight"][0] == "Q6_K"]
    assert raised == [0, 1, 2, 3, 6, 9, 12, 15, 18, 21, 24, 27, 28, 29, 30, 31]
    assert raised == [i for i in range(32) if made[f"blk.{i}.attn_v.weight"][0] == "Q6_K"]
    assert {kind for name, (kind, _) in made.items() if "attn_q.w" in name or "ffn_up" in name} == {"Q4_K"}


def test_a_tied_embedding_has_the_type_of_the_output():
    tied = made_types(dense(tie_word_embeddings=True), "Q4_K_M")
    assert tied["token_embd.weight"][0] == "Q6_K" and "output.weight" not in tied


@pytest.mark.parametrize(
    ("scheme", "mix", "kind"),
    [("w4a16", None, "Q4_0"), ("w4a16", "Q4_1", "Q4_1"), ("w8a16", None, "Q8_0"), ("float", None, "Q4_K"),
     ("float", "Q4_K", "Q4_K"), ("float", "BF16", "BF16"), ("float", "Q5_K_S", "Q5_K")],
)  # fmt: skip
def test_a_stand_in_reads_back_and_serves_its_scheme(scheme, mix, kind):
    model = dense()
    made = LAYOUT.stand_in(model, scheme, {"mix": mix} if mix else {})
    held, ledger = account(model, index_of(made.tensors, "qwen3"))
    assert ledger.problems == () and made.documents == made.config == {}
    linears = [held[module.name] for module in model if module.quantizable and not module.role]
    assert all(scheme in one.schemes for one in linears)
    assert Counter(one.label for one in linears).most_common(1)[0][0] == kind


def test_a_stand_in_of_experts_and_of_gemma_reads_back_without_an_architecture():
    gemma = [
        Module(f"model.layers.0.{part}", Kind.NORM, (8, 1), Split.REPLICATED)
        for part in ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm",
                     "post_feedforward_layernorm")
    ]  # fmt: skip
    for model in (moe(8, 128), gemma):
        made = LAYOUT.stand_in(model, "float", {})
        _, ledger = account(model, index_of(made.tensors, "llama"))
        assert ledger.problems == () and len(made.tensors) == len(model)


def test_patterns_of_a_stand_in_set_types_in_order():
    rules = [
        {"pattern": "*.mlp.experts.*.down_proj", "scheme": "w8a16"},
        {"pattern": "re:.*mlp.experts.\\d+.*", "scheme": "Q5_K"},
        {"pattern": "*.self_attn.o_proj", "scheme": "float"},
    ]
    made = made_types(moe(4, 512), "Q4_K_M", layers=rules)
    kinds = [made[f"blk.0.{part}.weight"][0] for part in ("ffn_down_exps", "ffn_up_exps", "attn_output", "attn_q")]
    assert kinds == ["Q8_0", "Q5_K", "BF16", "Q4_K"]


@pytest.mark.parametrize(
    ("scheme", "options", "code", "fix"),
    [
        ("float", {"mix": "Q4_K_X"}, "quant-type-unknown", "model.assume.gguf_mix=Q4_K_S"),
        ("w4a16", {"mix": "Q4_K_M"}, "quant-type-unknown", "model.assume.gguf_mix=Q4_0"),
        ("w8a8_dynamic", {}, "quant-type-unknown", "model.assume.scheme=float"),
        (
            "float",
            {"layers": [{"pattern": "re:(", "scheme": "w4a16"}]},
            "pattern-syntax",
            "mend the expression   or   write a glob, without re:",
        ),
    ],
)
def test_a_stand_in_that_cannot_be_is_refused(scheme, options, code, fix):
    with pytest.raises(InputError) as caught:
        LAYOUT.stand_in(dense(), scheme, options)
    (problem,) = caught.value.problems
    assert (problem.code, problem.fix) == (code, fix)


@pytest.mark.parametrize(
    ("keys", "kind", "factor"),
    [
        ({}, None, None),
        ({"rope.scale_linear": 4.0}, "linear", 4.0),
        ({"rope.scaling.factor": 2.0}, "linear", 2.0),
        ({"rope.scaling.factor": 2.0, "rope.scaling.type": "yarn"}, "yarn", 2.0),
        ({"rope.scale_linear": 4.0, "rope.scaling.type": "none"}, None, None),
    ],
)
def test_positions_are_scaled_as_llama_cpp_reads_the_keys(keys, kind, factor):
    # llama.cpp: linear where no type is named, rope.scale_linear where rope.scaling.factor is not there
    index = open_index(GOLDEN / "tiny-qwen3" / "gguf-q4_k_m" / "model.gguf")
    metadata = index.metadata | {f"qwen3.{name}": value for name, value in keys.items()}
    scaling = config_of(replace(index, metadata=metadata)).get("rope_scaling", {})
    assert (scaling.get("rope_type"), scaling.get("factor")) == (kind, factor)
