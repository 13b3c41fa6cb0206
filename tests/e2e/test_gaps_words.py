"""AWQ, GPTQ and auto-round checkpoints that other runtimes load wrongly or not at all, by the gap's number."""

from itertools import pairwise, product

import numpy as np
import pytest
import torch

from framework.loading.load import load
from framework.quantization.registry import SCHEMES
from tests.checkpoints import DENSE, stand_in
from tests.e2e.literal import widened
from tests.e2e.made import AWQ_ORDER, pack, to_auto_round, to_awq8, to_gptq
from tests.e2e.tiny import (
    ALLOWED,
    EXPERTS,
    check,
    config_of,
    experts_of,
    literal,
    logits,
    near,
    plan_of,
    save,
    times,
    weights_of,
)  # fmt: skip
from tests.threads import on_ranks

MLP = "model.layers.0.mlp"
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
FLOAT_ATTENTION = {r"-:.*self_attn.*": {}}
BF16 = 2e-2  # of the largest output: bf16 keeps 8 bits
CPU = torch.device("cpu")


def integers(n, k, group, *, bits=4, symmetric=False, seed=0):
    """Codes [N, K], zeros and scales [N, G]; group 0: one scale a row."""
    rng = np.random.default_rng(seed)
    groups = k // (group or k)
    scale = (rng.uniform(0.5, 2, (n, groups)) / 2**bits / 8).astype(np.float16).astype(np.float32)
    zero = np.full((n, groups), 1 << bits - 1) if symmetric else rng.integers(0, 1 << bits, (n, groups))
    return rng.integers(0, 1 << bits, (n, k)), zero, scale


def to_awq4(codes, zero, scale):
    """AutoAWQ's gemm: eight columns a word, in the tool's order."""
    words = [pack(np.ascontiguousarray(f.T).reshape(f.shape[1], -1, 8)[..., AWQ_ORDER], 4) for f in (codes, zero)]
    return {"qweight": words[0], "qzeros": words[1], "scales": scale.T.astype(np.float16)}


def interleaved(codes, zero, scale):
    """The other order of the bytes of 8-bit AWQ: columns 0, 2, 1, 3."""
    turned = [f.reshape(-1, 4, f.shape[1])[:, [0, 2, 1, 3]].reshape(f.shape) for f in (codes, zero)]
    return to_awq8(*turned, scale)


def to_gptq_v2(bits):
    """Zero points as they are."""

    def made(codes, zero, scale):
        zeros = pack(np.ascontiguousarray(zero.T).reshape(zero.shape[1], -1, 32 // bits), bits)
        return to_gptq(bits)(codes, zero, scale) | {"qzeros": zeros}

    return made


def declared(method, bits, group, **more):
    """A quantization_config that leaves attention out."""
    made = {"quant_method": method, "bits": bits, "group_size": group or -1}
    made |= {"awq": {"version": "gemm", "zero_point": True, "meta": {"quantizer": ["gptqmodel:7.7.0"]},
                     "modules_to_not_convert": ["self_attn", "lm_head", "mlp.gate"]},
             "gptq": {"checkpoint_format": "gptq", "sym": False, "desc_act": False, "dynamic": FLOAT_ATTENTION},
             "auto-round": {"packing_format": "auto_round:auto_gptq", "sym": False, "data_type": "int",
                            "extra_config": {".*self_attn.*": {"bits": 16}, f"{MLP}.gate": {"bits": 16}}},
             }[method]  # fmt: skip
    return made | more


PACKINGS = {
    "gptq-v1": (to_gptq, declared("gptq", 4, 32)),
    "gptq-v2": (to_gptq_v2, declared("gptq", 4, 32, checkpoint_format="gptq_v2")),
    "auto-round": (to_auto_round, declared("auto-round", 4, 32)),
}


def mlp_names(experts):
    return [n for p in PROJECTIONS for n in (experts_of(p, experts) if experts else [f"{MLP}.{p}"])]


def save_mlp(folder, encode, quantization, group, *, bits=4, symmetric=False, **sizes):
    """A model whose MLP, or experts, are `integers` in words; float tensors, config, values by name."""
    config = config_of(**sizes)
    shapes = {"down_proj": (config["hidden_size"], config["intermediate_size"])}
    held, right = {}, {}
    for i, name in enumerate(mlp_names(sizes.get("experts", 0))):
        n, k = shapes.get(name.rsplit(".", 1)[1], shapes["down_proj"][::-1])
        codes, zero, scale = integers(n, k, group, bits=bits, symmetric=symmetric, seed=i)
        held[name], right[name] = encode(codes, zero, scale), widened(codes, scale, zero)
    return save(folder, config, held, quantization=quantization), config, right


def outputs(plan, kind, x, counts):
    """What one projection of a model on one rank makes of x, in the plan's dtype."""
    with weights_of(plan) as weights:
        x = torch.tensor(x).to(weights.dtype)
        name = f"{EXPERTS}.*.{kind}"
        if name not in weights.planned:
            return weights.linear(f"{MLP}.{kind}")(x)
        return weights.experts(name).multiply(x, torch.tensor(counts))


def expected(right, kind, x, counts):
    """The same from values in double."""
    if f"{MLP}.{kind}" in right:
        return times(right[f"{MLP}.{kind}"])(torch.tensor(x)).numpy()
    ends = np.cumsum([0, *counts])
    return np.concatenate([
        times(right[f"{EXPERTS}.{e}.{kind}"])(torch.tensor(x[a:b])).numpy()
        for e, (a, b) in enumerate(pairwise(ends))
    ])  # fmt: skip


def rows(count, k):
    x = np.random.default_rng(5).standard_normal((count, k)).astype(np.float32)
    return torch.tensor(x).bfloat16().float().numpy()


def runs_right(folder, right, sizes, *overrides, dtypes=("float32", "bfloat16")):
    """Assert that every projection multiplies by the values; in 16 bits codes and offsets go through the operator."""
    counts = [3, 4]
    for kind, dtype in product(PROJECTIONS, dtypes):
        x = rows(7, sizes[1] if kind == "down_proj" else sizes[0])
        ours = outputs(plan_of(folder, *overrides, dtype=dtype), kind, x, counts)
        assert ours.dtype is getattr(torch, dtype)
        part = 1e-5 if dtype == "float32" else BF16
        assert near(ours.float(), expected(right, kind, x, counts), part), (kind, dtype)


@pytest.mark.parametrize("experts", [0, 2])
@pytest.mark.parametrize(("encode", "order"), [(to_awq8, ""), (to_awq8, "natural"), (interleaved, "interleaved")])
def test_g16_awq_of_8_bits_runs_in_both_orders_of_its_bytes(tmp_path, encode, order, experts):
    quantization = declared("awq", 8, 32) | ({"meta": {}} if order else {})
    _, _, right = save_mlp(tmp_path, encode, quantization, 32, bits=8, experts=experts)
    asked = [f"quantization.awq_byte_order={order}"] if order else []
    rows_used = {use.row for use in check(tmp_path, ALLOWED, *asked).rows}
    assert f"awq.w8a16.{'moe' if experts else 'linear'}" in rows_used
    runs_right(tmp_path, right, (64, 128), *asked)


@pytest.mark.parametrize(("group", "tp_size"), [(128, 2), (128, 1), (0, 1), (0, 2), (256, 1), (16, 1)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_g17_a_group_as_long_as_a_ranks_columns_stays_in_4_bits_and_the_models_dtype(tmp_path, group, tp_size, dtype):
    sizes = dict(hidden=256, width=256)
    *_, right = save_mlp(tmp_path, to_awq4, declared("awq", 4, group), group, **sizes)
    plan = plan_of(tmp_path, tp_size=tp_size, dtype=dtype)
    down = next(m for m in plan.modules if m.name == f"{MLP}.down_proj")
    assert down.scheme == ("w4a16" if group != 16 else "float")  # the op takes groups from 32 on
    x, ends = rows(5, 256), [(r.k0, r.k1) for r in down.shards]

    def work(group):
        k0, k1 = ends[group.rank]
        with weights_of(plan, group) as weights:
            layer = weights.linear(f"{MLP}.down_proj")
            assert layer.nbytes <= 256 * (k1 - k0) * (0.6 if down.scheme == "w4a16" else 2)
            return layer(torch.tensor(x[:, k0:k1].copy()).to(weights.dtype))

    for ours in on_ranks(tp_size, work):
        assert ours.dtype is getattr(torch, dtype)
        assert near(ours.float(), expected(right, "down_proj", x, []), BF16)
    if group != 16 and (group in (0, 256) or tp_size == 2):
        with weights_of(plan) as weights:
            held = weights.decoder.decode(down.module, down.shards[0], "w4a16", weights.index, weights.reader)
            operands = SCHEMES["w4a16"].prepare(held, dtype=weights.dtype, device=CPU)
        assert (operands.group_size, operands.scale.shape, operands.scale.dtype) == (0, (1, 256), weights.dtype)


FORMATS = {"awq": to_awq4, "gptq": to_gptq(4)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tp_size", [4, 8])
@pytest.mark.parametrize("method", ["awq", "gptq"])
def test_g18_g25_experts_are_cut_between_groups_or_by_rows(tmp_path, method, tp_size, dtype):
    # 6 groups of 32: four even shares would be 1.5 groups, eight less than one
    sizes = dict(hidden=64, width=192, experts=2, heads=8, kv_heads=4, head_dim=8)
    tensors, config, right = save_mlp(tmp_path, FORMATS[method], declared(method, 4, 32), 32, **sizes)
    plan = plan_of(tmp_path, tp_size=tp_size, dtype=dtype)
    down = next(m for m in plan.modules if m.name == f"{EXPERTS}.*.down_proj")
    assert all(r.k0 % 32 == 0 and r.k1 % 32 == 0 for r in down.shards)
    assert sum(r.size for r in down.shards) == 64 * 192
    part = 1e-5 if dtype == "float32" else 5e-2
    assert near(logits(tmp_path, tp_size=tp_size, dtype=dtype), literal(tensors, config, right), part)


@pytest.mark.parametrize("skipped", ["model.layers.1", "layers.1.mlp"])
def test_g19_an_excluded_layer_does_not_exclude_those_whose_names_begin_like_it(tmp_path, skipped):
    rule = {"pattern": "model.layers.1.*", "scheme": "float"}
    twelve = stand_in("awq", "w4a16", DENSE | {"num_hidden_layers": 12}, layers=[rule])
    twelve.declared["modules_to_not_convert"] = [skipped, "lm_head"]
    checked = check(twelve.write(tmp_path / "model"), ALLOWED)
    assert checked.ok, checked.problems
    found = {p.assigned.name: p.assigned.scheme for p in checked.placed if p.assigned.module.quantizable}
    own = {name for name, scheme in found.items() if scheme == "float"}
    assert {".".join(name.split(".")[:3]) for name in own - {"lm_head"}} == {"model.layers.1"}
    assert found["model.layers.10.mlp.up_proj"] == found["model.layers.11.self_attn.q_proj"] == "w4a16"


@pytest.mark.parametrize("experts", [0, 2])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("packing", PACKINGS)
def test_g20_asymmetric_zero_points_are_subtracted(tmp_path, packing, bits, experts):
    encode, quantization = PACKINGS[packing]
    *_, right = save_mlp(tmp_path, encode(bits), quantization | {"bits": bits}, 32, bits=bits, experts=experts)
    runs_right(tmp_path, right, (64, 128), dtypes=("bfloat16", "float16"))


def act_order(encode):
    """Words whose input features are dealt to groups as g_idx says, of every linear otherwise."""

    def made(codes, zero, scale):
        k = codes.shape[1]
        index = np.random.default_rng(int(codes.sum())).permutation(
            np.arange(k, dtype=np.int32) // (k // scale.shape[1])
        )
        return encode(codes, zero, scale) | {"g_idx": index}

    return made


@pytest.mark.parametrize("encode", [to_gptq(4), act_order(to_gptq(4))], ids=["trivial", "permuted"])
def test_g21_the_groups_of_experts_are_those_of_g_idx(tmp_path, encode):
    config = config_of(experts=2)
    held, right = {}, {}
    for i, name in enumerate(mlp_names(2)):
        shape = (64, 128) if name.endswith("down_proj") else (128, 64)
        codes, zero, scale = integers(*shape, 32, seed=i)
        held[name] = encode(codes, zero, scale)
        index = held[name]["g_idx"]
        right[name] = (codes - zero[:, index]) * scale[:, index]
    tensors = save(tmp_path, config, held, quantization=declared("gptq", 4, 32, desc_act=True))
    runs_right(tmp_path, right, (64, 128), dtypes=("float32", "bfloat16", "float16"))
    whole = literal(tensors, config, right)
    for tp_size in (1, 2, 4):
        plan = plan_of(tmp_path, tp_size=tp_size)
        assert {m.scheme for m in plan.modules if m.module.experts} == {"w4a16"}
        assert near(logits(tmp_path, tp_size=tp_size), whole)


@pytest.mark.parametrize("experts", [0, 2])
@pytest.mark.parametrize("bits", [4, 8])
def test_g22_one_scale_a_row_is_no_group(tmp_path, bits, experts):
    sizes = dict(hidden=256, width=256)
    *_, right = save_mlp(tmp_path, to_gptq(bits), declared("gptq", bits, 0), 0, bits=bits, experts=experts, **sizes)
    plan = plan_of(tmp_path)
    assert {m.scheme for m in plan.modules if m.name.startswith(MLP) and m.name.endswith("_proj")} == {f"w{bits}a16"}
    runs_right(tmp_path, right, (256, 256))


def test_g23_rules_by_module_decide_bits_groups_and_what_stays_float(tmp_path):
    config = config_of(layers=2)
    rules = FLOAT_ATTENTION | {
        r"-:model\.layers\.1\..*": {},
        r"+:.*down_proj": {"bits": 8, "group_size": 64},
        "lm_head": {"bits": 8},
    }
    quantization = declared("gptq", 4, 32, dynamic=rules, lm_head=True)
    held, right = {}, {}
    for name, shape, bits, group in [
        (f"{MLP}.gate_proj", (128, 64), 4, 32), (f"{MLP}.up_proj", (128, 64), 4, 32),
        (f"{MLP}.down_proj", (64, 128), 8, 64), ("lm_head", (96, 64), 8, 32),
    ]:  # fmt: skip
        codes, zero, scale = integers(*shape, group, bits=bits)
        held[name], right[name] = to_gptq(bits)(codes, zero, scale), widened(codes, scale, zero)
    tensors = save(tmp_path, config, held, quantization=quantization)
    schemes = {m.name: (m.scheme, m.group) for m in plan_of(tmp_path).modules}
    assert schemes[f"{MLP}.down_proj"] == ("w8a16", 64) and schemes["lm_head"] == ("w8a16", 32)
    assert schemes[f"{MLP}.up_proj"] == ("w4a16", 32) and schemes["model.layers.1.mlp.down_proj"] == ("float", 0)
    assert near(logits(tmp_path), literal(tensors, config, right))


@pytest.mark.parametrize(("group", "scheme"), [(0, "w8a16"), (32, "float"), (64, "float")])
def test_g26_experts_of_8_bits_are_widened_where_the_operator_takes_no_groups(tmp_path, group, scheme):
    *_, right = save_mlp(
        tmp_path, to_gptq(8), declared("gptq", 8, group), group, bits=8, experts=2, hidden=128, width=128
    )
    plan = plan_of(tmp_path, dtype="bfloat16")
    planned = {m.scheme for m in plan.modules if m.name == f"{EXPERTS}.*.gate_proj"}
    assert planned == {scheme}
    runs_right(tmp_path, right, (128, 128))
    loaded = on_ranks(1, lambda ranks: load(plan, ranks, lambda done, total: None))[0]
    assert abs(loaded.bytes_held() / plan.ranks[0].weights_bytes - 1) <= 0.05


@pytest.mark.parametrize("method", FORMATS)
@pytest.mark.parametrize("experts", [0, 2])
def test_g27_the_lowest_code_keeps_its_value_under_a_negative_scale(tmp_path, method, experts):
    def negative(codes, zero, scale):
        return np.where(np.arange(codes.shape[1]) % 3, 0, codes), zero, np.where(scale % 2e-3 < 1e-3, -scale, scale)

    encode = FORMATS[method]
    config = config_of(experts=experts)
    held, right = {}, {}
    for i, name in enumerate(mlp_names(experts)):
        shape = (64, 128) if name.endswith("down_proj") else (128, 64)
        codes, zero, scale = negative(*integers(*shape, 32, symmetric=True, seed=i))
        assert (scale < 0).any() and (codes[scale[:, 0] < 0, :32] == 0).any()
        held[name], right[name] = encode(codes, zero, scale), widened(codes, scale, zero)
    save(tmp_path, config, held, quantization=declared(method, 4, 32, sym=True, zero_point=False))
    runs_right(tmp_path, right, (64, 128), dtypes=("bfloat16", "float16"))


@pytest.mark.parametrize(("bits", "experts"), [(4, 0), (4, 2), (8, 0), (8, 2)])
def test_g28_auto_rounds_awq_packing_runs_as_awq_does(tmp_path, bits, experts):
    quantization = declared("auto-round", bits, 32, packing_format="auto_round:auto_awq")
    encode = to_awq4 if bits == 4 else to_awq8
    *_, right = save_mlp(tmp_path, encode, quantization, 32, bits=bits, experts=experts)
    order = [] if bits == 4 else ["quantization.awq_byte_order=natural"]
    found = check(tmp_path, ALLOWED, *order)
    assert f"auto_round.w{bits}a16.{'moe' if experts else 'linear'}" in {use.row for use in found.rows}
    runs_right(tmp_path, right, (64, 128), *order)
