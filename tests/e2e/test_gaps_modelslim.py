"""ModelSlim checkpoints that other runtimes load wrongly or not at all: the gap's number is in each test's name."""

import json
import shutil
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from framework.errors import Refused
from framework.families.base import Moe
from framework.geometry import Split
from framework.layers.experts import Experts
from framework.layers.group import Alone
from framework.layers.linear import ParallelLinear, Part
from framework.loading.load import load
from framework.quantization.registry import SCHEMES
from tests.e2e.literal import integers, per_token, widened
from tests.e2e.made import rounded
from tests.e2e.tiny import (
    EXPERTS,
    check,
    close,
    codes_of,
    config_of,
    dequantized,
    experts_of,
    float_model,
    literal,
    logits,
    near,
    plan_of,
    save,
    weights_of,
)  # fmt: skip
from tests.quantization.weights import CASES, WITHOUT_EXPERTS, activations, clear_of_ties, values, weight
from tests.threads import on_ranks

ATTENTION, MLP = "model.layers.0.self_attn", "model.layers.0.mlp"
CPU = torch.device("cpu")
GROUPED = [case for case in CASES if case[0] not in (*WITHOUT_EXPERTS, "float") and case != ("w4a8_dynamic", 256)]
MX_TYPES = {"mxfp8": "W8A8_MXFP8", "mxfp4": "W4A4_MXFP4", "w4a8_mxfp": "W4A8_MXFP"}


def rows(count, k, seed=3, cuts=None):
    """fp32 [T, K] away from the middle between two codes of 8 and of 4 bits, in each of the cuts."""
    x = np.random.default_rng(seed).standard_normal((count, k)).astype(np.float32)
    for most in (127, 7, 127, 7):
        x = clear_of_ties(x, most, cuts or [(0, k)])
    return x


def matrix(n, k, seed):
    return np.random.default_rng(seed).standard_normal((n, k)).astype(np.float32)


def pairs(codes):
    """Two rows a byte, the even row low."""
    return ((codes[::2] & 15) | (codes[1::2] << 4)).astype(np.int8)


def test_g03_parts_of_one_fused_layer_run_each_with_its_own_type(tmp_path):
    config = config_of()
    found = {k: v.float().numpy() for k, v in float_model(config).items()}
    types = {"q_proj": ("w8a8_dynamic", "W8A8_DYNAMIC"), "k_proj": ("w4a4_dynamic", "W4A4_DYNAMIC")}
    made = {f"{ATTENTION}.{p}": rounded(scheme, found[f"{ATTENTION}.{p}.weight"]) for p, (scheme, _) in types.items()}
    labels = {f"{ATTENTION}.{p}": label for p, (_, label) in types.items()}
    save(tmp_path, config, {name: held for name, (_, held) in made.items()}, labels=labels)
    x = torch.tensor(rows(6, 64))
    with weights_of(plan_of(tmp_path)) as weights:
        ours = weights.linear(*(f"{ATTENTION}.{p}_proj" for p in "qkv"))(x)
    right = [made[f"{ATTENTION}.{p}_proj"][0](1)(x) for p in "qk"]
    assert near(ours, torch.cat([*right, x @ torch.tensor(found[f"{ATTENTION}.v_proj.weight"]).T], 1))


@pytest.mark.parametrize("floats", ["layer", "down_proj", "gate_up"])
def test_g04_float_experts_run_beside_quantized_ones(tmp_path, floats):
    config = config_of(layers=2, experts=4)
    found = {k: v.float().numpy() for k, v in float_model(config).items()}
    kept = {"layer": lambda name: ".layers.1." in name, "down_proj": lambda name: name.endswith("down_proj"),
            "gate_up": lambda name: not name.endswith("down_proj")}[floats]  # fmt: skip
    names = [n for layer in (0, 1) for p in ("gate", "up", "down") for n in experts_of(f"{p}_proj", 4, layer)]
    made = {n: rounded("w8a8_dynamic", found[f"{n}.weight"]) for n in names if not kept(n)}
    labels = dict.fromkeys(made, "W8A8_DYNAMIC")
    tensors = save(tmp_path, config, {name: held for name, (_, held) in made.items()}, labels=labels)
    schemes = {m.name: m.scheme for m in plan_of(tmp_path).modules if m.module.experts}
    assert set(schemes.values()) == {"float", "w8a8_dynamic"}
    right = literal(tensors, config, {name: run(1) for name, (run, _) in made.items()})
    assert close(logits(tmp_path), right, 1e-3)


def two_stage(folder, group, **sizes):
    """A W4A8_DYNAMIC model of experts by channel and, if asked, by group; the codes and scales of each by name."""
    config = config_of(experts=2, **sizes)
    found, parts, held = float_model(config), {}, {}
    rng = np.random.default_rng(8)
    for name in [n for p in ("gate_proj", "up_proj", "down_proj") for n in experts_of(p, 2)]:
        codes, scale = integers(found[f"{name}.weight"].numpy(), 7)
        n, k = codes.shape
        second = np.float32(2.0) ** rng.integers(-3, 4, (n, k // group)) if group else np.ones((n, 1), np.float32)
        effective = scale * second
        sums = 8 * widened(codes, effective).reshape(n, 16 if "down" in name else 1, -1).sum(2)
        parts[name] = widened(codes, effective)
        held[name] = {"weight": pairs(codes), "weight_scale": scale, "weight_offset": np.zeros_like(scale),
                      "scale_bias": sums.astype(np.float32)}  # fmt: skip
        if group:
            held[name] |= {"weight_scale_second": second.astype(np.float32),
                           "weight_offset_second": np.zeros(second.shape, np.float32)}  # fmt: skip
    save(folder, config, held, labels=dict.fromkeys(held, "W4A8_DYNAMIC"))
    return parts


@pytest.mark.parametrize("group", [32, 64])
def test_g05_the_second_scale_of_a_group_multiplies_the_first(tmp_path, group):
    right = two_stage(tmp_path, group, width=64)
    plan = plan_of(tmp_path)
    for e, p in product((0, 1), ("gate_proj", "down_proj")):
        assert near(dequantized(plan, f"{EXPERTS}.*.{p}", expert=e), right[f"{EXPERTS}.{e}.{p}"], 1e-6)
    x, counts = rows(7, 64), torch.tensor([3, 4])
    with weights_of(plan) as weights:
        ours = weights.experts(f"{EXPERTS}.*.gate_proj").multiply(torch.tensor(x), counts)
    by_expert = [per_token(right[f"{EXPERTS}.{e}.gate_proj"], 127)(torch.tensor(x)) for e in (0, 1)]
    assert near(ours, torch.cat([by_expert[0][:3], by_expert[1][3:]]))


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
def test_g06_the_shift_of_int4_experts_is_summed_from_a_ranks_own_columns(tmp_path, tp_size):
    right = two_stage(tmp_path, 0, width=96)
    plan = plan_of(tmp_path, tp_size=tp_size)
    name, counts = f"{EXPERTS}.*.down_proj", torch.tensor([3, 4])
    ends = [(r.k0, r.k1) for r in next(m for m in plan.modules if m.name == name).shards]
    assert len(set(ends)) == tp_size and ends[-1][1] == 96
    x = rows(7, 96, cuts=ends)
    expected = np.zeros((7, 64))
    for k0, k1 in ends:
        share = torch.tensor(x[:, k0:k1])
        own = [per_token(right[f"{EXPERTS}.{e}.down_proj"][:, k0:k1], 127)(share).numpy() for e in (0, 1)]
        expected += np.concatenate([own[0][:3], own[1][3:]])

    def work(group):
        k0, k1 = ends[group.rank]
        with weights_of(plan, group) as weights:
            layer = weights.experts(name)
            return layer.join(layer.multiply(torch.tensor(x[:, k0:k1].copy()), counts))

    for ours in on_ranks(tp_size, work):
        assert near(ours, expected)


def test_g06_the_correction_is_eight_times_the_sum_of_the_shards_values():
    whole = [weight("w4a8_dynamic", 16, 96, seed=seed) for seed in (0, 1)]
    for k0, k1 in [(0, 96), (0, 48), (48, 96), (32, 64)]:
        operands = SCHEMES["w4a8_dynamic"].prepare_experts(
            [one.slice(0, 16, k0, k1) for one in whole], dtype=torch.float32, device=CPU
        )
        assert near(operands.bias, 8 * np.stack([values(one)[:, k0:k1].sum(1) for one in whole]), 1e-6)


class Given(nn.Module):
    """A router that says what it was told."""

    def __init__(self, chances, chosen):
        super().__init__()
        self.given = chances, chosen

    def forward(self, x):
        return self.given


def grouped_part(scheme, group, n, k):
    """Three experts of one scheme as a layer, and as values."""
    held = [weight(scheme, n, k, group, seed=10 * n + e) for e in range(3)]
    operands = SCHEMES[scheme].prepare_experts(held, dtype=torch.float32, device=CPU)
    part = Part(lambda x, counts: SCHEMES[scheme].grouped(x, counts, operands), operands.nbytes)
    layer = ParallelLinear([part], None, Split.REPLICATED, Alone(), [[k]], [n])
    return layer, [values(one) for one in held]


@pytest.mark.parametrize("second", GROUPED, ids=str)
def test_g08_every_pair_of_schemes_of_experts_quantizes_the_inputs_of_each_matmul_by_itself(second):
    hidden, width = 64, 128
    x = np.random.default_rng(1).standard_normal((8, hidden)).astype(np.float32)
    chosen = torch.tensor([[t % 3, (t + 1) % 3] for t in range(8)], dtype=torch.int32)
    chances = torch.rand(8, 2, generator=torch.Generator().manual_seed(2))
    moe = Moe(experts=3, top_k=2, intermediate=width, layers=(True,))
    down, w2 = grouped_part(*second, hidden, width)
    for first in GROUPED:
        gate_up, w13 = grouped_part(*first, 2 * width, hidden)
        ours = Experts(Given(chances, chosen), gate_up, down, None, moe, (0, 3))(torch.tensor(x)).numpy()
        right = np.zeros((8, hidden))
        for t, place in product(range(8), (0, 1)):
            e = int(chosen[t, place])
            gate, up = np.split(activations(first[0], x[t : t + 1]) @ w13[e].T, 2, axis=1)
            inner = (gate * (1 + np.tanh(gate / 2)) / 2 * up).astype(np.float32)
            right[t] += float(chances[t, place]) * (activations(second[0], inner) @ w2[e].T)[0]
        assert np.isfinite(ours).all()
        assert close(ours, right, 2e-2), (first, second)


@pytest.mark.parametrize("setting", ["0", "1"])
@pytest.mark.parametrize("layers", ["dense", "experts"])
def test_g09_codes_of_int4_are_unpacked_as_the_header_says(tmp_path, monkeypatch, layers, setting):
    monkeypatch.setenv("SGLANG_NPU_W4A4_NEW_PACKING", setting)
    config = config_of(experts=2 if layers == "experts" else 0)
    names = experts_of("up_proj", 2) if layers == "experts" else [f"{MLP}.up_proj"]
    found = float_model(config)
    decoded = {}
    for form in ("bytes", "pairs"):
        held, right = {}, {}
        for name in names:
            codes, scale = integers(found[f"{name}.weight"].numpy(), 7)
            right[name] = widened(codes, scale)
            held[name] = {"weight": codes if form == "bytes" else pairs(codes), "weight_scale": scale,
                          "weight_offset": np.zeros_like(scale)}  # fmt: skip
        save(tmp_path / form, config, held, labels=dict.fromkeys(held, "W4A4_DYNAMIC"))
        plan = plan_of(tmp_path / form)
        name = f"{EXPERTS}.*.up_proj" if layers == "experts" else names[0]
        each = range(2) if layers == "experts" else [None]
        decoded[form] = np.stack([dequantized(plan, name, expert=e) for e in each])
        assert near(decoded[form], np.stack(list(right.values())), 1e-6)
    assert np.array_equal(decoded["bytes"], decoded["pairs"])


@pytest.mark.parametrize("layers", ["dense", "experts"])
@pytest.mark.parametrize("scheme", MX_TYPES)
def test_g10_mx_blocks_are_cut_in_pairs_or_not_at_all(tmp_path, scheme, layers):
    experts = 2 if layers == "experts" else 0
    # even shares would be 3 blocks on two ranks; operators that take odd counts get them: 3 blocks, and 9
    hidden, width = (64, 192) if experts or scheme == "w4a8_mxfp" else (96, 288)
    config = config_of(hidden=hidden, width=width, experts=experts)
    names = [
        n for p in ("gate_proj", "up_proj", "down_proj") for n in (experts_of(p, 2) if experts else [f"{MLP}.{p}"])
    ]
    found = float_model(config)
    made = {name: rounded(scheme, found[f"{name}.weight"].numpy()) for name in names}
    labels = dict.fromkeys(made, MX_TYPES[scheme])
    save(tmp_path, config, {name: held for name, (_, held) in made.items()}, labels=labels)
    joined = f"{EXPERTS}.*" if experts else MLP
    both, counts = rows(7, width), torch.tensor([3, 4])

    def run(weights, kind, x):
        if not experts:
            return weights.linear(f"{joined}.{kind}")(x)
        layer = weights.experts(f"{joined}.{kind}")
        return layer.join(layer.multiply(layer.spread(x), counts))

    def literally(kind, x):
        if not experts:
            return made[f"{joined}.{kind}"][0](1)(x)
        one, two = (made[f"{EXPERTS}.{e}.{kind}"][0](1)(x) for e in (0, 1))
        return torch.cat([one[:3], two[3:]])

    for tp_size in (1, 2, 4):
        plan = plan_of(tmp_path, tp_size=tp_size)
        up = next(m for m in plan.modules if m.name == f"{joined}.up_proj")
        down = next(m for m in plan.modules if m.name == f"{joined}.down_proj")
        assert all(r.k0 % 64 == 0 for r in down.shards)

        def work(group, plan=plan, up=up):
            mine = up.shards[group.rank]
            with weights_of(plan, group) as weights:
                upwards = run(weights, "up_proj", torch.tensor(both[:, :hidden].copy()))
                return upwards, run(weights, "down_proj", torch.tensor(both[:, mine.n0 : mine.n1].copy()))

        made_by_ranks = on_ranks(tp_size, work)
        assert near(
            torch.cat([ours for ours, _ in made_by_ranks], 1), literally("up_proj", torch.tensor(both[:, :hidden]))
        )
        assert near(made_by_ranks[0][1], literally("down_proj", torch.tensor(both)))


def int8_mlp(folder, config):
    """A checkpoint with an MLP in W8A8_DYNAMIC, and its values."""
    found = float_model(config)
    names = [f"{MLP}.{p}_proj" for p in ("gate", "up", "down")]
    made = {name: rounded("w8a8_dynamic", found[f"{name}.weight"].numpy()) for name in names}
    labels = dict.fromkeys(made, "W8A8_DYNAMIC")
    tensors = save(folder, config, {name: held for name, (_, held) in made.items()}, labels=labels)
    return tensors, {name: run(1) for name, (run, _) in made.items()}


def test_g13_a_description_named_after_its_type_is_found(tmp_path):
    config = config_of()
    tensors, linears = int8_mlp(tmp_path, config)
    for old, new in {"quant_model_description.json": "quant_model_description_w8a8_dynamic.json",
                     "model.safetensors": "quant_model_weight_w8a8_dynamic.safetensors"}.items():  # fmt: skip
        shutil.move(tmp_path / old, tmp_path / new)
    checked = check(tmp_path)
    assert checked.format == "modelslim"
    assert "modelslim.w8a8_dynamic.linear" in {use.row for use in checked.rows}
    assert close(logits(tmp_path), literal(tensors, config, linears), 1e-3)


def test_g14_the_bias_of_a_norm_is_added_by_that_norm_alone(tmp_path):
    from safetensors.torch import load_file, save_file

    config = config_of(layers=2)
    int8_mlp(tmp_path / "shifted", config)
    int8_mlp(tmp_path / "plain", config)
    before = logits(tmp_path / "plain")
    name, shift = "model.layers.1.input_layernorm.bias", torch.linspace(-1, 1, 64)
    tensors = load_file(tmp_path / "shifted" / "model.safetensors")
    save_file(tensors | {name: shift}, tmp_path / "shifted" / "model.safetensors")
    described = tmp_path / "shifted" / "quant_model_description.json"
    described.write_text(json.dumps(json.loads(described.read_text()) | {name: "FLOAT"}))
    model = load(plan_of(tmp_path / "shifted"), Alone(), lambda done, total: None).model
    held = {n: m.bias for n, m in model.named_modules() if n.endswith("norm")}
    (own,) = [bias for bias in held.values() if bias is not None]
    assert torch.equal(held["layers.1.input_layernorm"], own) and torch.equal(own, shift)
    x = torch.tensor(rows(4, 64))
    norm, other = model.layers[1].input_layernorm, model.layers[0].input_layernorm
    right = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.weight + shift
    assert near(norm(x), right) and near(norm.add(x, torch.zeros_like(x))[0], right)
    assert near(other(x), x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * other.weight)
    assert not near(logits(tmp_path / "shifted"), before) and np.array_equal(logits(tmp_path / "plain"), before)


@pytest.mark.parametrize("tp_size", [1, 2])
def test_g15_parts_with_input_scales_of_their_own_are_quantized_by_them(tmp_path, tp_size):
    config = config_of()
    given = {"q_proj": (0.031, -5.0), "k_proj": (0.012, 17.0), "v_proj": (0.031, -5.0)}
    found, held, right = float_model(config), {}, {}
    x = np.random.default_rng(4).uniform(-1, 1, (6, 64)).astype(np.float32)
    for part, (scale, offset) in given.items():
        name = f"{ATTENTION}.{part}"
        codes, own = integers(found[f"{name}.weight"].numpy(), 127)
        x[np.abs(np.abs(x / np.float32(scale)) % 1 - 0.5) < 1e-3] = 0
        held[name] = {
            "weight": codes, "input_scale": np.full(1, scale, np.float32),
            "input_offset": np.full(1, offset, np.float32), "deq_scale": own[:, 0] * np.float32(scale),
            "quant_bias": (-offset * codes.sum(1, dtype=np.int64)).astype(np.int32),
        }  # fmt: skip
    for part, (scale, offset) in given.items():
        codes = np.clip(np.rint(x.astype(np.float64) / np.float32(scale) + offset), -128, 127) - offset
        name = f"{ATTENTION}.{part}"
        right[part] = (codes @ held[name]["weight"].T.astype(np.float64)) * held[name]["deq_scale"]
    save(tmp_path, config, held, labels=dict.fromkeys(held, "W8A8"))
    plan = plan_of(tmp_path, tp_size=tp_size)

    def work(group):
        with weights_of(plan, group) as weights:
            layer = weights.linear(*(f"{ATTENTION}.{p}_proj" for p in "qkv"))
            return layer(torch.tensor(x)).split(layer.widths, dim=1)

    by_rank = on_ranks(tp_size, work)
    for i, part in enumerate(given):
        assert near(torch.cat([parts[i] for parts in by_rank], 1), right[part])


@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "relu"])
def test_g59_experts_of_another_activation_are_refused_not_run_as_swiglu(tmp_path, activation):
    config = config_of(experts=2) | {"hidden_act": activation}
    found = float_model(config)
    made = {n: rounded("w8a8_dynamic", found[f"{n}.weight"].numpy())[1] for n in experts_of("down_proj", 2)}
    save(tmp_path, config, made, labels=dict.fromkeys(made, "W8A8_DYNAMIC"))
    with pytest.raises(Refused) as refused:
        check(tmp_path)
    assert codes_of(refused.value.problems) == {"architecture-unsupported"}
    assert activation in str(refused.value)
