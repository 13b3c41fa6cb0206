"""Experts of compressed-tensors that other runtimes load wrongly or not at all, by the gap's number."""

import numpy as np
import pytest
import torch

from tests.e2e.literal import integers, per_token, widened
from tests.e2e.made import GOLDEN, pack
from tests.e2e.tiny import (
    ALLOWED,
    EXPERTS,
    check,
    close,
    codes_of,
    config_of,
    experts_of,
    float_model,
    literal,
    logits,
    near,
    plan_of,
    save,
    times,
    weights_of,
)  # fmt: skip

NAMES = [name for p in ("gate_proj", "up_proj", "down_proj") for name in experts_of(p, 2)]
TOKEN = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
BY_EXPERTS = r"re:.*mlp\.experts\..*_proj$"
ROWS = "compressed_tensors."


def config_with(bits, group, form, *, inputs=None, symmetric=True, targets=("Linear",), **more):
    """A quantization_config of one group of modules; attention, router and head are float."""
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "dynamic": False,
               "strategy": "group" if group else "channel", "group_size": group or None}  # fmt: skip
    made = {"targets": list(targets), "weights": weights, "input_activations": inputs, "output_activations": None}
    ignored = ["lm_head", "re:.*self_attn.*", r"re:.*mlp\.gate$"]
    return {"quant_method": "compressed-tensors", "format": form, "quantization_status": "compressed",
            "config_groups": {"group_0": made}, "ignore": ignored} | more  # fmt: skip


def held_in(form, codes, zero, scale, bits):
    """Signed codes [N, K] and zeros [N, G], as LLM-Compressor saves them."""
    half = 1 << bits - 1
    if form == "int-quantized":
        held = {"weight": codes.astype(np.int8), "weight_scale": scale}
        return held if zero is None else held | {"weight_zero_point": zero.astype(np.int8)}
    held = {"weight_packed": pack((codes + half).reshape(len(codes), -1, 32 // bits), bits), "weight_scale": scale,
            "weight_shape": np.array(codes.shape, np.int64)}  # fmt: skip
    if zero is None:
        return held
    along_n = np.ascontiguousarray((zero + half).T).reshape(zero.shape[1], -1, 32 // bits)
    return held | {"weight_zero_point": pack(along_n, bits).T}


def save_experts(folder, bits, group, form, *, inputs=None, symmetric=True, **more):
    """A model whose experts are quantized; its float tensors, its config, the experts' values by name."""
    config = config_of(experts=2)
    found, held, right = float_model(config), {}, {}
    for i, name in enumerate(NAMES):
        codes, scale = integers(found[f"{name}.weight"].numpy(), (1 << bits - 1) - 1, group)
        zero = None if symmetric else np.random.default_rng(i).integers(-3, 4, scale.shape)
        held[name] = held_in(form, codes.astype(np.int64), zero, scale, bits)
        right[name] = widened(codes, scale, 0 if zero is None else zero)
    quantization = config_with(bits, group, form, inputs=inputs, symmetric=symmetric, **more)
    return save(folder, config, held, quantization=quantization), config, right


def inputs_of(k):
    return torch.tensor(np.random.default_rng(6).standard_normal((7, k)).astype(np.float32)).bfloat16().float()


def multiply(plan, kind, x):
    with weights_of(plan) as weights:
        return weights.experts(f"{EXPERTS}.*.{kind}").multiply(x.to(weights.dtype), torch.tensor([3, 4])).float()


def by_expert(right, kind, x, linear):
    one, two = (linear(right[f"{EXPERTS}.{e}.{kind}"])(x) for e in (0, 1))
    return torch.cat([one[:3], two[3:]])


def row_of_experts(checked):
    (row,) = {use.row for use in checked.rows if use.layer_type == "moe"}
    return row


def test_g29_symmetric_int8_experts_have_no_offset_and_run(tmp_path):
    tensors, config, right = save_experts(tmp_path, 8, 0, "int-quantized", inputs=TOKEN)
    assert row_of_experts(check(tmp_path, ALLOWED)) == f"{ROWS}w8a8_dynamic.moe"
    linears = {name: per_token(values, 127) for name, values in right.items()}
    whole = literal(tensors, config, linears)
    assert close(logits(tmp_path), whole, 1e-3)
    for kind, k in (("gate_proj", 64), ("down_proj", 128)):
        x = inputs_of(k)
        assert close(multiply(plan_of(tmp_path), kind, x), by_expert(right, kind, x, lambda w: per_token(w, 127)), 1e-3)


@pytest.mark.parametrize("form", ["int-quantized", "pack-quantized"])
@pytest.mark.parametrize("group", [0, 32, 64])
def test_g30_int4_experts_of_llm_compressor_run_with_the_correction_computed(tmp_path, group, form):
    *_, right = save_experts(tmp_path, 4, group, form, inputs=TOKEN)
    assert row_of_experts(check(tmp_path, ALLOWED)) == f"{ROWS}w4a8_dynamic.moe"
    plan = plan_of(tmp_path)
    assert {m.scheme for m in plan.modules if m.module.experts} == {"w4a8_dynamic"}
    for kind, k in (("gate_proj", 64), ("down_proj", 128)):
        x = inputs_of(k)
        assert close(multiply(plan, kind, x), by_expert(right, kind, x, lambda w: per_token(w, 127)), 1e-3)


@pytest.mark.parametrize("folder", ["ct-w4a8-clip-1l", "ct-w4a8-channel-1l"])
def test_g30_the_groups_of_the_ascend_layout_select_and_its_logits_come_out(folder):
    path = GOLDEN / "tiny-qwen3-moe" / folder
    checked = check(path, ALLOWED)
    assert {use.row for use in checked.rows if use.scheme != "float"} == {
        f"{ROWS}w4a8_dynamic.moe", f"{ROWS}w8a8_dynamic.linear",
    }  # fmt: skip
    with np.load(path / "reference.npz") as reference:
        ids, right = reference["prompt0.input_ids"].tolist(), reference["prompt0.logits_sim"]
    assert close(logits(path, ids=ids), right, 3e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("group", [0, 32])
def test_g31_every_packed_tensor_of_experts_is_used(tmp_path, group, dtype):
    tensors, config, right = save_experts(tmp_path, 4, group, "pack-quantized")
    checked = check(tmp_path, ALLOWED)
    packed = {f"{name}.{part}" for name in NAMES for part in ("weight_packed", "weight_scale", "weight_shape")}
    assert packed <= checked.ledger.consumed.keys() and not checked.ledger.ignored
    part = 1e-5 if dtype == "float32" else 5e-2
    assert near(logits(tmp_path, dtype=dtype), literal(tensors, config, right), part)


@pytest.mark.parametrize("targets", [["Linear"], [BY_EXPERTS], ["MoEGMM"]])
@pytest.mark.parametrize("group", [0, 32, 64])
def test_g32_the_group_is_that_of_the_target_that_matched(tmp_path, group, targets):
    tensors, config, right = save_experts(tmp_path, 4, group, "pack-quantized", targets=targets)
    plan = plan_of(tmp_path)
    assert {(m.scheme, m.group) for m in plan.modules if m.module.experts} == {("w4a16", group)}
    assert near(logits(tmp_path), literal(tensors, config, right))


@pytest.mark.parametrize(("bits", "symmetric", "row"), [(8, True, "w8a16"), (4, False, "w4a16"), (8, False, "w8a16")])
def test_g32_weight_only_experts_of_other_kinds_are_judged_by_their_row_not_left_float(tmp_path, bits, symmetric, row):
    *_, right = save_experts(tmp_path, bits, 32, "pack-quantized", symmetric=symmetric)
    checked = check(tmp_path)
    assert not checked.ok and codes_of(checked.problems) == {"row-tbd"}
    assert all(f"{ROWS}{row}.moe" in problem.why for problem in checked.problems)
    plan = plan_of(tmp_path, dtype="bfloat16")
    assert {m.row for m in plan.modules if m.module.experts} == {f"{ROWS}{row}.moe"}
    for kind, k in (("gate_proj", 64), ("down_proj", 128)):
        x = inputs_of(k)
        assert near(multiply(plan, kind, x), by_expert(right, kind, x, times), 2e-2)
