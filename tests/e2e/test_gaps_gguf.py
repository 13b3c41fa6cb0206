"""GGUF files that other runtimes load wrongly or not at all, by the gap's number."""

import shutil
from itertools import pairwise

import gguf
import numpy as np
import pytest
import torch

from framework.errors import UserError
from tests.e2e.made import GOLDEN
from tests.e2e.tiny import (
    ALLOWED,
    EXPERTS,
    check,
    codes_of,
    config_of,
    dequantized,
    float_model,
    literal,
    logits,
    near,
    plan_of,
    times,
    weights_of,
)  # fmt: skip
from tests.threads import on_ranks

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
TYPE = gguf.GGMLQuantizationType
PARTS = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def named(name):
    """The GGUF's name of a module; all experts of a projection have one."""
    if name in TOP:
        return TOP[name]
    _, _, layer, part = name.split(".", 3)
    if ".experts." in part:
        return f"blk.{layer}.ffn_{part.rsplit('.', 1)[1].removesuffix('_proj')}_exps"
    return f"blk.{layer}.{PARTS[part]}"


def export(path, config, types, order=()):
    """Write a Qwen3 GGUF; types by GGUF name (all others F32); tensors in `order` come first. Return the values."""
    experts = config.get("num_experts", 0)
    arch = "qwen3moe" if experts else "qwen3"
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    tensors = float_model(config)
    members = {}
    for name in tensors:
        members.setdefault(named(name.removesuffix(".weight")), []).append(name)
    right = dict(tensors)
    for own in sorted(members, key=lambda own: list(order).index(own) if own in order else len(order)):
        names = members[own]
        stacked = np.stack([tensors[name].numpy() for name in names])
        kind = types.get(own, TYPE.F32)
        data = gguf.quants.quantize(stacked, kind) if kind is not TYPE.F32 else stacked
        values = gguf.quants.dequantize(data, kind) if kind is not TYPE.F32 else stacked
        right |= {name: torch.tensor(value.copy()) for name, value in zip(names, values, strict=True)}
        written = data if own.endswith("_exps") else data[0]
        writer.add_tensor(f"{own}.weight", written, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return right


@pytest.mark.parametrize("tp_size", [2, 3, 4])
def test_g35_columns_are_cut_inside_a_block_where_ranks_need_it(tp_size):
    path = GOLDEN / "tiny-qwen3" / "gguf-q4_k_m" / "model.gguf"
    held = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    plan = plan_of(path, tp_size=tp_size)
    for layer, label in enumerate(("Q4_K", "Q6_K")):
        name = f"model.layers.{layer}.mlp.down_proj"
        down = next(m for m in plan.modules if m.name == name)
        assert down.label == label and all(a.k1 == b.k0 for a, b in pairwise(down.shards))
        assert tp_size == 2 or any(r.k0 % 256 for r in down.shards)
        joined = np.concatenate([dequantized(plan, name, rank) for rank in range(tp_size)], axis=1)
        assert np.array_equal(joined.astype(np.float32), held[f"blk.{layer}.ffn_down.weight"])


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("kind", [TYPE.F16, TYPE.F32, TYPE.Q8_0], ids=lambda kind: kind.name)
def test_g36_fused_parts_are_ordered_by_name_not_by_their_place_in_the_file(tmp_path, kind, tp_size):
    config = config_of(hidden=64)
    order = [f"blk.0.attn_{part}" for part in ("k", "output", "q", "v")] + ["blk.0.ffn_up", "blk.0.ffn_gate"]
    right = export(tmp_path / "model.gguf", config, dict.fromkeys(order, kind), order)
    written = [t.name for t in gguf.GGUFReader(tmp_path / "model.gguf").tensors]
    assert written[:6] == [f"{name}.weight" for name in order]
    assert near(logits(tmp_path / "model.gguf", tp_size=tp_size), literal(right, config, {}))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_g37_float_parts_take_the_models_dtype_beside_quantized_ones(tmp_path, dtype):
    config = config_of()
    types = {"blk.0.attn_q": TYPE.F16, "blk.0.attn_k": TYPE.Q8_0, "blk.0.attn_v": TYPE.BF16, "blk.0.ffn_up": TYPE.F16}
    right = export(tmp_path / "model.gguf", config, types)
    plan = plan_of(tmp_path / "model.gguf", dtype=dtype)
    x = torch.tensor(np.random.default_rng(2).standard_normal((5, 64)).astype(np.float32)).bfloat16()
    part = 1e-5 if dtype == "float32" else 2e-2
    with weights_of(plan) as weights:
        for names in ([f"{ATTENTION}.{p}_proj" for p in "qkv"], [f"{MLP}.gate_proj", f"{MLP}.up_proj"]):
            ours = weights.linear(*names)(x.to(weights.dtype))
            assert ours.dtype is weights.dtype
            assert near(ours.float(), torch.cat([times(right[f"{name}.weight"])(x.float()) for name in names], 1), part)
    assert near(logits(tmp_path / "model.gguf", dtype=dtype), literal(right, config, {}), 2 * part)


MIXED = {
    "blk.0.ffn_gate_exps": TYPE.Q8_0, "blk.0.ffn_up_exps": TYPE.Q4_0, "blk.0.ffn_down_exps": TYPE.F16,
    "blk.1.ffn_gate_exps": TYPE.BF16, "blk.1.ffn_up_exps": TYPE.Q5_1, "blk.1.ffn_down_exps": TYPE.Q4_1,
}  # fmt: skip


def test_g39_projections_of_experts_have_types_of_their_own(tmp_path):
    config = config_of(layers=2, experts=4)
    right = export(tmp_path / "model.gguf", config, MIXED)
    plan = plan_of(tmp_path / "model.gguf")
    assert {m.label for m in plan.modules if m.module.experts} == {kind.name for kind in MIXED.values()}
    for kind in ("gate_proj", "up_proj", "down_proj"):
        for e in range(4):
            ours = dequantized(plan, f"{EXPERTS}.*.{kind}", expert=e)
            assert np.array_equal(ours.astype(np.float32), right[f"{EXPERTS}.{e}.{kind}.weight"].numpy())
    assert near(logits(tmp_path / "model.gguf"), literal(right, config, {}))


@pytest.mark.parametrize("tp_size", [2, 3, 4])
def test_g40_the_experts_outputs_are_added_over_the_ranks_once(tmp_path, tp_size):
    config = config_of(layers=2, experts=4)
    right = export(tmp_path / "model.gguf", config, MIXED)
    plan = plan_of(tmp_path / "model.gguf", tp_size=tp_size)
    down = next(m for m in plan.modules if m.name == f"{EXPERTS}.*.down_proj")
    x, counts = np.random.default_rng(3).standard_normal((6, 128)).astype(np.float32), torch.tensor([1, 2, 0, 3])

    def work(group):
        rect = down.shards[group.rank]
        with weights_of(plan, group) as weights:
            layer = weights.experts(down.name)
            return layer.join(layer.multiply(torch.tensor(x[:, rect.k0 : rect.k1].copy()), counts))

    by_hand = [times(right[f"{EXPERTS}.{e}.down_proj.weight"])(torch.tensor(x)) for e in (0, 1, 1, 3, 3, 3)]
    whole = torch.stack([out[row] for row, out in enumerate(by_hand)])
    for ours in on_ranks(tp_size, work):
        assert near(ours, whole)
    assert near(logits(tmp_path / "model.gguf", tp_size=tp_size), literal(right, config, {}))


def test_g41_the_chosen_experts_weights_are_divided_by_their_sum(tmp_path):
    config = config_of(layers=2, experts=4)
    right = export(tmp_path / "model.gguf", config, {})
    assert plan_of(tmp_path / "model.gguf").spec.moe.renormalize
    # the literal forward pass divides
    assert near(logits(tmp_path / "model.gguf"), literal(right, config, {}))


def test_g42_all_parts_of_a_split_file_are_read_or_it_is_refused(tmp_path):
    source = GOLDEN / "tiny-qwen3" / "gguf-q4_0-split-1l"
    shutil.copytree(source, tmp_path / "model")
    parts = sorted((tmp_path / "model").glob("*.gguf"))
    count = sum(len(gguf.GGUFReader(part).tensors) for part in parts)
    for given in (tmp_path / "model", parts[0], parts[2]):
        checked = check(given, ALLOWED)
        assert checked.ok and len(checked.ledger.consumed) == count
    with np.load(source / "reference.npz") as reference:
        ids, right = reference["prompt0.input_ids"].tolist(), reference["prompt0.logits_dequant_fp32"]
    assert near(logits(parts[0], ids=ids), right, 1e-4)
    for missing in parts[1:]:
        missing.rename(tmp_path / "away")
        with pytest.raises(UserError) as refused:
            check(parts[0], ALLOWED)
        assert codes_of(refused.value.problems) == {"file-missing"}
        assert missing.name in refused.value.problems[0].why
        (tmp_path / "away").rename(missing)
