"""What other runtimes load wrongly and a check refuses from headers alone, by the gap's number: verdict and message."""

import re
import shutil
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from framework.checkpoint.write import write_gguf_headers, write_headers
from framework.errors import UserError
from framework.geometry import Split
from framework.jobs.common import read_capability
from framework.planning.assume import assumed_indexes
from framework.planning.check import check
from framework.planning.parts import open_indexes
from framework.recipe.compose import compose
from framework.recipe.schema import Assume, LayerRule
from tests.checkpoints import DENSE, DESCRIPTION, GOLDEN, MOE, golden, stand_in

Q = "model.layers.0.self_attn.q_proj"
W8 = stand_in("modelslim", "w8a8_dynamic")  # 2 layers of 7 linears, a float head
W8_MOE = stand_in("modelslim", "w8a8_dynamic", MOE)  # 8 experts of 3 linears a layer
TBD, ALL = "capability.allow=[tbd]", "capability.allow=[tbd,wip]"
ONLINE = "quantization.online=true"
WAN = GOLDEN / "diffusion" / "tiny-wan2.2"  # two transformers of 2 blocks, 10 linears a block


def to(scheme, pattern="*_proj"):
    return f'quantization.layers=[{{pattern: "{pattern}", scheme: {scheme}}}]'


@cache
def composed(overrides):
    return compose(["recipe=llm/local", "model.path=/model", "job=check", *overrides])


@pytest.fixture
def verdict(tmp_path):
    """Return what a check of a checkpoint (or of the headers at a path) says, or the problems that end it early."""

    def run(model, *overrides, cann=None):
        recipe = composed(overrides)
        path = model if isinstance(model, Path) else model.write(tmp_path / f"model{len(list(tmp_path.iterdir()))}")
        judges = replace(read_capability(recipe), cann=cann)
        try:
            return check(recipe, open_indexes(path, recipe.model.kind), judges)
        except UserError as error:
            return error

    return run


def codes(said):
    return [problem.code for problem in said.problems]


def only(said, code):  # the one problem, as text
    assert codes(said) == [code]
    (one,) = said.problems
    assert one.where and one.fix
    return f"{one.what}\n{one.where}\n{one.why}\n{one.fix}"


def rows(said):
    assert said.problems == ()
    return {use.row: use.modules for use in said.rows}


def relabelled(given, label, *names):
    """A checkpoint whose description gives all tensors of some modules another type (None: no entry)."""
    made = given.copy()
    for name in [name for name in made.declared if name.rsplit(".", 1)[0] in names]:
        if label is None:
            del made.declared[name]
        else:
            made.declared[name] = label
    return made


def quantized(given, name, n, k, label):
    """A checkpoint with one more W8A8_DYNAMIC weight, described as `label`."""
    made = given.copy()
    made.tensors |= {f"{name}.weight": ("I8", (n, k))}
    made.tensors |= {f"{name}.{suffix}": ("F32", (n, 1)) for suffix in ("weight_scale", "weight_offset")}
    made.declared.update({f"{name}.{suffix}": label for suffix in ("weight", "weight_scale", "weight_offset")})
    return made


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors", "awq"])
def test_g01_two_sources_that_contradict_are_refused_and_either_can_be_picked(verdict, method):
    both = W8.copy()
    both.config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": 128}
    text = only(verdict(both), "format-conflict")
    assert DESCRIPTION in text and "config.json" in text and method.replace("-", "_") in text
    assert "quantization.format=modelslim" in text
    assert rows(verdict(both, "quantization.format=modelslim")) == rows(verdict(W8))


@pytest.mark.parametrize(
    ("label", "code", "said"),
    [
        ("W8A16", "row-tbd", "modelslim.w8a16.linear"),
        ("W4A8_DYNAMIC", "row-tbd", "modelslim.w4a8_dynamic.linear"),
        ("WFP8AFP8_DYNAMIC", "quant-type-unknown", "WFP8AFP8_DYNAMIC of 2 linears"),
        ("W4A4_MXFP4_SVD", "quant-type-unknown", "low-rank"),
        ("W8A8_DYNAMICS", "quant-type-unknown", "is W8A8_DYNAMIC meant?"),
    ],
)
def test_g02_a_type_that_is_not_run_is_refused_with_count_and_name(verdict, label, code, said):
    text = only(verdict(relabelled(W8, label, Q, Q.replace("q_proj", "o_proj"))), code)
    assert said in text and ("2 modules" in text or Q in text)


@pytest.mark.parametrize("label", ["W8A8_MIX", "W4A4_MXFP4_DUALSCALE"])
def test_g02_tensors_of_another_type_than_described_are_refused(verdict, label):
    assert "tensor-missing" in codes(verdict(relabelled(W8, label, Q), "hardware=a5", TBD))


def test_g02_codes_without_an_entry_are_refused_and_a_float_weight_is_float(verdict):
    absent = relabelled(W8, None, Q)
    text = only(verdict(absent), "description-missing")
    assert f"{Q}.weight" in text and "I8" in text
    absent.tensors[f"{Q}.weight"] = ("BF16", (256, 256))
    assert set(codes(verdict(absent))) == {"tensor-unexpected"}  # the scale beside it
    del absent.tensors[f"{Q}.weight_scale"], absent.tensors[f"{Q}.weight_offset"]
    assert rows(verdict(absent)) == {"modelslim.w8a8_dynamic.linear": 13, "none.float.linear": 1 + 1}


@pytest.mark.parametrize(("label", "also"), [("W8A16", set()), ("FLOAT", {"description-missing"})])
def test_g07_an_expert_unlike_the_others_is_refused_by_number(verdict, label, also):
    part = "model.layers.1.mlp.experts.{}.up_proj"
    said = verdict(relabelled(W8_MOE, label, part.format(3), part.format(6)))
    assert set(codes(said)) == {"experts-differ"} | also
    text = next(f"{p.what} {p.why}" for p in said.problems if p.code == "experts-differ")
    assert part.format("*") in text and "expert 3, 6 unlike expert 0" in text and f"expert 3 is {label}" in text


WIDE = MOE | {"hidden_size": 2048, "moe_intermediate_size": 768, "num_attention_heads": 32, "num_hidden_layers": 1}


def placed(said, end):
    assert said.problems == ()
    return next(one for one in said.placed if one.assigned.name.endswith(end))


@pytest.mark.parametrize(
    ("scheme", "experts"), [("mxfp8", True), ("mxfp4", True), ("w4a8_mxfp", True), ("mxfp4", False)]
)
def test_g10_mx_weights_are_cut_between_pairs_of_blocks(verdict, scheme, experts):
    config = WIDE if experts else WIDE | DENSE | {"intermediate_size": 768, "hidden_size": 2048}
    made = stand_in("modelslim", scheme, config | {"num_attention_heads": 32})
    said = verdict(made, "hardware=a5", ALL, "parallel.tp_size=8")
    down = placed(said, "experts.*.down_proj" if experts else "mlp.down_proj")
    # 12 pairs of blocks of 32 over 8 ranks; 768 / 8 = 96 would be three blocks
    assert [(r.k0, r.k1) for r in down.shards[:5]] == [(0, 128), (128, 256), (256, 384), (384, 512), (512, 576)]
    assert all(r.k0 % 64 == r.k1 % 64 == 0 for r in down.shards)


def test_g10_a_block_count_that_the_shape_does_not_give_is_refused(verdict):
    made = stand_in("modelslim", "mxfp8", MOE)
    name = "model.layers.0.mlp.experts.2.gate_proj.weight_scale"
    assert made.tensors[name] == ("U8", (128, 256 // 32))
    made.tensors[name] = ("U8", (128, 12))
    assert "[128, 12]; by the config it is [128, 8]" in only(verdict(made, "hardware=a5", ALL), "tensor-shape")


def test_g10_an_odd_count_of_blocks_is_refused_where_the_operator_takes_pairs(verdict):
    text = only(
        verdict(stand_in("modelslim", "mxfp8", MOE | {"moe_intermediate_size": 96}), "hardware=a5", ALL), "op-limit"
    )
    assert "down_proj" in text and "multiples of 64, not 96" in text


@pytest.mark.parametrize("tier", ["a2", "a3"])
@pytest.mark.parametrize("scheme", ["mxfp8", "mxfp4", "mxfp4_dualscale", "w4a8_mxfp"])
def test_g11_mx_schemes_are_refused_on_tiers_without_the_units(verdict, tier, scheme):
    text = only(verdict(stand_in("modelslim", scheme), f"hardware={tier}", ALL), "row-unsupported")
    assert f"modelslim.{scheme}.linear" in text and f"do not run on {tier} (14 modules)" in text
    assert rows(verdict(stand_in("modelslim", scheme), "hardware=a5", ALL))[f"modelslim.{scheme}.linear"] == 14


def test_g11_online_mxfp8_is_judged_by_tier_and_the_machines_cann_is_compared(verdict):
    assert "online.mxfp8.linear" in only(verdict(stand_in("none", "float"), ONLINE, to("mxfp8")), "row-unsupported")
    made = stand_in("modelslim", "mxfp8")
    text = only(verdict(made, "hardware=a5", cann="8.0.RC2"), "cann-version")
    assert "CANN 8.0.RC3 or newer" in text and "8.0.RC2" in text
    assert verdict(made, "hardware=a5", cann="8.0.RC3").problems == ()


def test_g12_a_quantized_embedding_is_refused_and_a_head_runs_by_its_row(verdict):
    embedding = quantized(W8, "model.embed_tokens", 512, 256, "W8A8_DYNAMIC")
    said = verdict(embedding)
    assert said.problems[0].code == "embedding-quantized" and "model.embed_tokens" in said.problems[0].what
    assert rows(verdict(quantized(W8, "lm_head", 512, 256, "W8A8_DYNAMIC"))) == {"modelslim.w8a8_dynamic.linear": 15}
    assert "modelslim.w8a16.linear" in only(verdict(quantized(W8, "lm_head", 512, 256, "W8A16")), "row-tbd")
    assert "lm_head" in only(verdict(quantized(W8, "lm_head", 512, 256, "NF4")), "quant-type-unknown")


@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_g18_experts_are_cut_between_groups_or_refused_with_sizes_that_work(verdict, method):
    made = stand_in(method, "w4a16", WIDE | {"head_dim": 64}, group_size=128)
    down = placed(verdict(made, "parallel.tp_size=4"), "experts.*.down_proj")
    # 6 groups over 4 ranks: 2, 2, 1, 1
    assert [(r.k0, r.k1) for r in down.shards] == [(0, 256), (256, 512), (512, 640), (640, 768)]
    down = placed(verdict(made, "parallel.tp_size=8"), "experts.*.down_proj")
    assert down.split is Split.ROWS_GATHER and [r.n1 - r.n0 for r in down.shards] == [256] * 8
    text = only(verdict(made, "parallel.tp_size=16", "parallel.ep_size=2"), "tp-align")  # 8 ranks an expert
    assert "columns can be cut at multiples of 128 only" in text and "sizes that split: 2, 4, 6, 8, 10, 12" in text
    assert verdict(made, "parallel.tp_size=12", "parallel.ep_size=2").problems == ()


def test_g21_experts_in_activation_order_need_their_index(verdict):
    made = stand_in("gptq", "w4a16", MOE, group_size=64)
    made.config["quantization_config"]["desc_act"] = True
    said = verdict(made, "parallel.tp_size=2")
    assert placed(said, "experts.*.down_proj").split is Split.ROWS_GATHER  # columns of a group lie anywhere
    indices = [name for name in made.tensors if name.endswith("g_idx")]
    assert len(indices) == 2 * (4 + 8 * 3) and set(indices) <= set(said.ledger.consumed)
    without = made.copy()
    for name in indices:
        if ".experts." in name:
            del without.tensors[name]
    said = verdict(without)
    assert set(codes(said)) == {"tensor-missing"} and "experts.*.down_proj.g_idx" in str(said.problems)


@pytest.mark.parametrize("bits", [2, 3])
@pytest.mark.parametrize("method", ["gptq", "auto_round"])
def test_g24_codes_of_2_and_3_bits_are_refused_naming_4_and_8(verdict, method, bits):
    made = stand_in(method, "w4a16", group_size=64)
    made.config["quantization_config"]["bits"] = bits
    for name in [name for name in made.tensors if name.endswith(("qweight", "qzeros"))]:
        dtype, (n, k) = made.tensors[name]
        made.tensors[name] = (dtype, (n * bits // 4, k) if name.endswith("qweight") else (n, k * bits // 4))
    text = only(verdict(made), "format-feature")
    assert f"13 more have {bits} bits" in text and Q in text and "4 or 8 bits" in text


@pytest.mark.parametrize("given", ["tiny-qwen3/ct-w4a16-g128-asym-1l", None])
def test_g33_g57_linears_at_w4a16_are_judged_by_a_row_of_their_own(verdict, given):
    made = golden(given) if given else stand_in("compressed_tensors", "w4a16")
    text = only(verdict(made), "row-tbd")
    assert "compressed_tensors.w4a16.linear" in text and TBD in text
    assert "a checkpoint in a format that runs on a2: " in text and "awq, gptq" in text
    assert rows(verdict(made, TBD)) == {"compressed_tensors.w4a16.linear": 7 if given else 14, "none.float.linear": 1}


def test_g34_static_activations_are_refused_unless_allowed(verdict):
    made = golden("tiny-qwen3/ct-w8a8-static-1l")
    text = only(verdict(made), "row-tbd")
    assert "compressed_tensors.w8a8_static.linear" in text and TBD in text and "w8a8_dynamic" in text
    assert rows(verdict(made, TBD))["compressed_tensors.w8a8_static.linear"] == 7


QWEN3 = {
    "general.architecture": "qwen3", "qwen3.block_count": 2, "qwen3.context_length": 2048,
    "qwen3.embedding_length": 256, "qwen3.feed_forward_length": 512, "qwen3.attention.head_count": 8,
    "qwen3.attention.head_count_kv": 4, "qwen3.attention.key_length": 32, "qwen3.attention.value_length": 32,
    "qwen3.attention.layer_norm_rms_epsilon": 1e-6, "qwen3.rope.freq_base": 10000.0,
}  # fmt: skip


def gguf(path, types=None, without=(), **keys):
    made = stand_in("gguf", "float", mix="Q8_0").tensors
    entries = [(name, (types or {}).get(name, kind), shape) for name, (kind, shape) in made.items()]
    write_gguf_headers(path, [entry for entry in entries if entry[0] not in without], QWEN3 | keys)
    return path


@pytest.mark.parametrize(
    ("kind", "number"), [("Q8_1", 9), ("Q8_K", 15), ("Q1_0", 41), ("TQ1_0", None), ("NVFP4", None)]
)
def test_g38_types_that_cannot_be_dequantized_are_refused_by_name(verdict, tmp_path, kind, number):
    names = ("blk.0.ffn_down.weight", "blk.1.ffn_down.weight")
    said = verdict(gguf(tmp_path / "model.gguf", dict.fromkeys(names, kind)))
    if number is None:
        assert rows(said) == {"gguf.all.linear": 15}
    else:
        text = only(said, "gguf-type")
        assert f"2 tensors of type {number} ({kind})" in text and f"{names[0]} and 1 more" in text


def test_g42_parts_and_tensors_that_are_not_there_are_named(verdict, tmp_path):
    parts = {"split.no": 0, "split.count": 2}
    first = gguf(tmp_path / "model-00001-of-00002.gguf", **parts)
    assert "model-00002-of-00002.gguf" in only(verdict(first), "file-missing")
    assert "split.count is 2" in only(verdict(gguf(tmp_path / "model.gguf", **parts)), "file-malformed")
    part = gguf(tmp_path / "part.gguf", without=("blk.1.ffn_up.weight",))
    assert "blk.1.ffn_up.weight" in only(verdict(part), "tensor-missing")


@pytest.mark.parametrize("overrides", [(), (ONLINE, to("mxfp8"))])
def test_g43_codes_of_mxfp8_are_never_cast(verdict, overrides):
    made = stand_in("none", "float")
    for name, (_, shape) in list(made.tensors.items()):
        if name.endswith("_proj.weight"):
            made.tensors[name] = ("F8_E4M3", shape)
            made.tensors[f"{name}_scale_inv"] = ("U8", (shape[0], shape[1] // 32))
    undeclared = codes(verdict(made, "hardware=a5", TBD, *overrides))
    assert set(undeclared) == {"tensor-dtype", "tensor-unexpected"}
    made.config["quantization_config"] = {"quant_method": "mxfp8"}
    text = only(verdict(made, "hardware=a5", TBD, *overrides), "format-unsupported")
    assert "format mxfp8" in text and "quantization_config" in text
    text = only(verdict(stand_in("modelslim", "mxfp8"), "hardware=a5", ONLINE, to("mxfp8")), "online-quantized")
    assert f"{Q} and 13 more" in text and "W8A8_MXFP8" in text


@pytest.mark.parametrize("scheme", ["mxfp4", "w4a8_mxfp", "mxfp4_dualscale"])
def test_g44_experts_that_cannot_be_quantized_at_load_are_refused_not_left_float(verdict, scheme):
    made = stand_in("none", "float", MOE)
    text = only(verdict(made, "hardware=a5", ALL, ONLINE, to(scheme, "*.experts.*")), "row-unknown")
    assert f"{scheme} on 48 moe modules quantized at load" in text
    said = verdict(made, "hardware=a5", ALL, ONLINE, to("mxfp4", "*.self_attn.*"))
    assert rows(said) == {"online.mxfp4.linear": 8, "none.float.linear": 2 + 1, "none.float.moe": 48}


def wan(folder, scheme):
    """The headers of a quantized pipeline: both transformers, every linear of their blocks."""
    folder.mkdir()
    shutil.copy(WAN / "model_index.json", folder)
    assume = Assume(str(WAN), "modelslim", layers=(LayerRule("blocks.*", scheme),))
    for prefix, index in assumed_indexes(assume, "diffusion").items():
        (folder / prefix.rstrip(".")).mkdir()
        tensors = [(info.name, info.dtype, info.shape) for info in index.tensors.values()]
        write_headers(folder / prefix.rstrip("."), tensors, {"config.json": index.config, **index.documents})
    return folder


def test_g45_quantizing_at_load_needs_float_weights(verdict, tmp_path):
    asked = ("model.kind=diffusion", "hardware=a5", ONLINE, to("mxfp8", "*.blocks.*"))
    text = only(verdict(wan(tmp_path / "wan", "w8a8_dynamic"), *asked), "online-quantized")
    assert "transformer.blocks.0.attn1.to_q and 39 more" in text and "W8A8_DYNAMIC" in text and ONLINE in text
    assert rows(verdict(WAN, *asked)) == {"diffusion.mxfp8.online": 40, "none.float.linear": 12}


def test_g52_several_descriptions_are_refused_and_listed(verdict, tmp_path):
    folder = wan(tmp_path / "wan", "w8a8_dynamic")
    described = folder / "transformer" / DESCRIPTION
    described = described.rename(described.with_name("quant_model_description_w8a8_dynamic.json"))
    assert rows(verdict(folder, "model.kind=diffusion"))["diffusion.w8a8_dynamic.offline"] == 40
    shutil.copy(described, described.with_name("quant_model_description_w4a4.json"))
    text = only(verdict(folder, "model.kind=diffusion"), "format-conflict")
    assert "quant_model_description_w4a4.json, quant_model_description_w8a8_dynamic.json" in text
    several = W8.copy()
    several.documents |= {"quant_model_description_old.json": {"model.norm.weight": "FLOAT"}}
    assert rows(verdict(several)) == rows(verdict(W8))  # the exact name is the one
    several.documents["quant_model_description_new.json"] = several.documents.pop(DESCRIPTION)
    only(verdict(several), "format-conflict")


def test_g54_fused_modules_that_no_family_knows_are_left_over_and_refused(verdict):
    made = W8.copy()
    for layer, (part, n) in [(i, p) for i in range(2) for p in (("in_proj_qkvz", 768), ("in_proj_ba", 32))]:
        made = quantized(made, f"model.layers.{layer}.linear_attn.{part}", n, 256, "W8A8_DYNAMIC")
    said = verdict(made)
    assert set(codes(said)) == {"tensor-unexpected"} and len(said.ledger.unexpected) == 2 * 2 * 3
    for part in ("in_proj_qkvz", "in_proj_ba"):
        assert f"2 tensors of the file belong to no module: model.layers.*.linear_attn.{part}.weight" in str(
            said.problems
        )


@pytest.mark.parametrize("asked", ["modelslim", "awq", "gptq", "auto_round", "gguf", "none"])
def test_g55_a_forced_format_that_does_not_match_names_the_one_that_was_found(verdict, asked):
    text = only(
        verdict(stand_in("compressed_tensors", "w8a8_dynamic"), f"quantization.format={asked}"), "format-mismatch"
    )
    assert f"says the checkpoint is {asked}, it is compressed_tensors" in text
    assert "quantization.format=auto" in text and "config.json" in text


@pytest.mark.parametrize(
    ("scheme", "group", "layer", "runs", "calls", "said"),
    [
        ("w4a16", 256, "mlp.down_proj", "w4a16", 1, ""),
        ("w4a16", 16, "mlp.down_proj", "float", 1, "groups in multiples of 32 from 32, not 16: dequantized at load"),
        ("w4a8_dynamic", 256, "experts.*.gate_proj", "w4a8_dynamic", 1, ""),
        ("w4a8_dynamic", 128, "experts.*.gate_proj", "w4a8_dynamic", 4, "groups of 256, not groups of 128: 4 calls"),
    ],
)
def test_g56_groups_that_the_operator_does_not_take_run_otherwise_and_it_is_said(
    verdict, scheme, group, layer, runs, calls, said
):
    config = (MOE if "experts" in layer else DENSE) | {"hidden_size": 512, "intermediate_size": 512}
    config |= {"moe_intermediate_size": 512, "num_attention_heads": 16}
    found = verdict(stand_in("modelslim", scheme, config, group_size=group), TBD)
    made = placed(found, layer).fit
    assert (made.scheme, made.pieces) == (runs, calls)
    notes = [note for note in found.notes if "tokenizer" not in note]
    assert any(said in note for note in notes) if said else not notes


def test_every_gap_that_a_check_closes_has_a_test():
    closed = {1, 2, 7, 10, 11, 12, 18, 21, 24, 33, 34, 38, 42, 43, 44, 45, 52, 54, 55, 56, 57}
    assert {int(number) for name in globals() for number in re.findall(r"_g(\d\d)(?=_)", name)} == closed
