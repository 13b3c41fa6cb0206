"""Every scheme: the quantizers' own vectors, grouped against one expert at a time, float64 formulas, cuts of K."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from framework import ops
from framework.checkpoint.open import open_index
from framework.checkpoint.reader import Reader
from framework.formats.registry import LAYOUTS, decoder
from framework.geometry import Kind, Module, Split
from framework.loading.weights import RankWeights
from framework.ops.layout import tiled
from framework.quantization.registry import SCHEMES
from framework.quantization.schemes.w4a4 import as_int64
from tests.plans import plan_for
from tests.quantization.weights import CASES, WITHOUT_EXPERTS, activations, inputs, values, weight

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parents[1] / "golden"
FOLDERS = sorted(path.parent for path in GOLDEN.glob("tiny-*/modelslim-*/linear.npz"))
COMMITTED = [folder for folder in FOLDERS if (folder / "quant_model_description.json").exists()]
VECTORS = [
    (folder, name.removesuffix(".x"))
    for folder in COMMITTED
    for name in np.load(folder / "linear.npz").files
    if name.endswith(".x")
]
EXPERT_CASES = [case for case in CASES if case[0] not in WITHOUT_EXPERTS]
# K of a weight, and its cuts in two and in three, none of them even
CUTS = {2: (0, 256, 768), 3: (0, 256, 320, 768)}
DUAL_CUTS = {2: (0, 512, 2048), 3: (0, 512, 1536, 2048)}
N = 16


def close(y, expected, tolerance=1e-5):
    expected = np.asarray(expected, np.float64)
    assert y.shape == expected.shape
    assert np.abs(y.double().numpy() - expected).max() <= tolerance * np.abs(expected).max()


def linear(scheme, held, x, dtype=torch.float32):
    operands = SCHEMES[scheme].prepare(held, dtype=dtype, device=CPU)
    return SCHEMES[scheme].linear(torch.as_tensor(x).to(dtype), operands)


class Golden:
    """One linear of a ModelSlim folder and its recorded vectors."""

    def __init__(self, folder, name):
        with np.load(folder / "linear.npz") as file:
            keys = [key.rsplit(".", 1)[1] for key in file.files if key.startswith(f"{name}.")]
            self.vectors = {key: file[f"{name}.{key}"] for key in keys}
        self.index = open_index(folder)
        shape = (len(self.vectors["W_rowsum"]), self.vectors["x"].shape[1])
        bias = f"{name}.bias" in self.index.tensors
        self.module = Module(name, Kind.LINEAR, shape, Split.COLUMN, bias=bias)
        self.scheme = LAYOUTS["modelslim"].held(self.module, self.index).scheme

    def decode(self, scheme):
        with Reader() as reader:
            arguments = (self.module, self.module.full, scheme, self.index, reader)
            return decoder("modelslim").decode(*arguments, dtype=torch.float32)

    def bias(self):
        if not self.module.bias:
            return torch.zeros(())
        with Reader() as reader:
            return decoder("modelslim").bias(self.module, self.module.full, self.index, reader)


@pytest.mark.parametrize(("folder", "name"), VECTORS, ids=lambda v: v.name if isinstance(v, Path) else v)
def test_a_linear_of_the_real_quantizer_gives_its_recorded_products(folder, name):
    golden = Golden(folder, name)
    recorded, held = golden.vectors, golden.decode(golden.scheme)
    close(linear(golden.scheme, held, recorded["x"]), recorded.get("y_sim", recorded["y_dequant"]))
    plain = golden.decode("float").codes
    np.testing.assert_allclose(plain[:16].numpy(), recorded["W_rows16"], rtol=1e-6)
    np.testing.assert_allclose(plain.double().sum(1), recorded["W_rowsum"], rtol=1e-5, atol=1e-5)
    close(linear("float", golden.decode("float"), recorded["x"]) + golden.bias(), recorded["y_dequant"])


def test_the_golden_linears_are_of_every_scheme_that_the_tool_writes():
    found = {Golden(folder, name).scheme for folder, name in VECTORS}
    assert found == set(SCHEMES) - {"float", "w8a8_mix"}


@pytest.mark.parametrize(("scheme", "group"), CASES)
def test_a_linear_is_its_formula_in_float64(scheme, group):
    held, x = weight(scheme, N, 768, group), inputs(scheme, 5, 768)
    close(linear(scheme, held, x), activations(scheme, x) @ values(held).T)


@pytest.mark.parametrize(("scheme", "group"), [case for case in CASES if case[0] in ("w8a8_dynamic", "w4a16", "w8a16")])
def test_zero_points_are_taken_off(scheme, group):
    held, x = weight(scheme, N, 768, group, zeros=True), inputs(scheme, 5, 768)
    close(linear(scheme, held, x), activations(scheme, x) @ values(held).T)


def test_zero_points_cost_no_accuracy_in_bf16():
    held = replace(weight("w8a8_dynamic", N, 768), zero=torch.full((N, 1), 100.0))
    x = torch.tensor(np.random.default_rng(1).normal(1.0, 0.5, (5, 768))).bfloat16()
    expected = activations("w8a8_dynamic", x.double().numpy()) @ values(held).T
    close(linear("w8a8_dynamic", held, x, torch.bfloat16), expected, 4e-3)  # one rounding to bf16


COUNTS = (2, 0, 5, 1)


def experts_of(scheme, group, k=768):
    return [weight(scheme, N, k, group, seed) for seed in range(len(COUNTS))]


def rows_of(x):
    """Each expert with its rows."""
    ends = np.cumsum(COUNTS)
    return [(e, x[end - count : end]) for e, (end, count) in enumerate(zip(ends, COUNTS, strict=True)) if count]


def grouped(scheme, held, x, dtype):
    operands = SCHEMES[scheme].prepare_experts(held, dtype=dtype, device=CPU)
    return SCHEMES[scheme].grouped(torch.as_tensor(x).to(dtype), torch.tensor(COUNTS), operands)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("scheme", "group"), EXPERT_CASES)
def test_grouped_experts_are_one_linear_after_another(scheme, group, dtype):
    held, x = experts_of(scheme, group), inputs(scheme, sum(COUNTS), 768)
    one_by_one = torch.cat([linear(scheme, held[e], rows, dtype) for e, rows in rows_of(x)])
    y = grouped(scheme, held, x, dtype)
    assert y.dtype is dtype
    close(y, one_by_one.double(), {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-9}[dtype])


@pytest.mark.parametrize(("scheme", "group"), EXPERT_CASES)
def test_grouped_experts_are_their_formula_in_float64(scheme, group):
    held, x = experts_of(scheme, group), inputs(scheme, sum(COUNTS), 768)
    expected = [activations(scheme, rows) @ values(held[e]).T for e, rows in rows_of(x)]
    close(grouped(scheme, held, x, torch.float32), np.concatenate(expected))


@pytest.mark.parametrize("group", [0, 64])
def test_clipped_activations_are_cut_at_their_experts_share_of_the_row(group):
    shares = (0.5, 0.9, 0.25, 1.0)
    held = [
        type(one)(one.codes, one.scale, group_size=one.group_size, bits=4, whole={"alpha": torch.tensor([share])})
        for one, share in zip(experts_of("w4a8_dynamic", group), shares, strict=True)
    ]
    x = inputs("w4a8_dynamic", sum(COUNTS), 768)
    expected = []
    for e, rows in rows_of(x):
        most = shares[e] * np.abs(rows).max(1, keepdims=True)
        expected.append(activations("w4a8_dynamic", np.clip(rows, -most, most)) @ values(held[e]).T)
    # a clipped row has another scale, so that a code may move by one where x lies between two
    close(grouped("w4a8_dynamic", held, x, torch.float32), np.concatenate(expected), 1e-3)


@pytest.mark.parametrize("pieces", [2, 3])
@pytest.mark.parametrize(("scheme", "group"), [case for case in CASES if case[1] != 256])
def test_a_cut_of_k_is_each_ranks_own_quantization_summed(scheme, group, pieces):
    ends = (DUAL_CUTS if scheme == "mxfp4_dualscale" else CUTS)[pieces]
    cuts = list(pairwise(ends))
    held, x = weight(scheme, N, ends[-1], group), inputs(scheme, 5, ends[-1], cuts)
    w = values(held)
    y = sum(linear(scheme, held.slice(0, N, k0, k1), x[:, k0:k1]) for k0, k1 in cuts)
    close(y, sum(activations(scheme, x[:, k0:k1]) @ w[:, k0:k1].T for k0, k1 in cuts))


class Rank:
    def __init__(self, rank, size):
        self.rank, self.size = rank, size


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("name", ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj"])
def test_a_correction_is_added_once_however_many_ranks_there_are(name, size):
    """Static activations have one scale: cut or whole, the sums are the same integers."""
    folder = GOLDEN / "tiny-qwen3" / "modelslim-w8a8-smooth-asym"
    golden = Golden(folder, name)
    plan = plan_for(folder, tp_size=size, dtype="float32")
    shards = next(m.shards for m in plan.modules if m.module.name == name)
    assert [shard.k0 for shard in shards] == [0, *(shard.k1 for shard in shards[:-1])]
    x, total = torch.from_numpy(golden.vectors["x"]), 0
    for rank, shard in enumerate(shards):
        with Reader() as reader:
            arguments = (plan, golden.index, reader, decoder(plan.format), Rank(rank, size), CPU, lambda *_: None)
            layer = RankWeights(*arguments).linear(name)
        assert layer.bias is None
        total = total + layer.multiply(x[:, shard.k0 : shard.k1])
    close(total, golden.vectors["y_sim"])


@pytest.mark.parametrize("grouped", [False, True])
def test_fp4_beside_fp8_is_tiled_as_fp8_on_an_npu(grouped, monkeypatch):
    """NPU_OPS: FRACTAL_NZ with the tiles of e4m3 (292) for bytes of packed e2m1 (296), before it is transposed."""
    casts = []

    def cast(tensor, form, **how):
        casts.append((tensor.shape[-2:], form, how))
        return tensor

    monkeypatch.setattr(ops, "npu_format_cast", cast)
    held, on = weight("w4a8_mxfp", 64, 1024, 32), {"dtype": torch.bfloat16, "device": torch.device("meta")}
    scheme = SCHEMES["w4a8_mxfp"]
    operands = scheme.prepare_experts([held, held], **on) if grouped else scheme.prepare(held, **on)
    assert casts == [((64, 512), 29, {"customize_dtype": 292, "input_dtype": 296})]
    assert operands.weight.shape[-2:] == (512, 64) and not operands.weight.is_contiguous()


def test_a_negative_scale_keeps_to_the_low_half_of_int64():
    assert as_int64(torch.tensor([-0.5, 1.0])).tolist() == [0xBF000000, 0x3F800000]


@pytest.mark.parametrize(("shape", "is_tiled"), [((64, 32), True), ((60, 32), False), ((64, 24), False)])
def test_what_does_not_fill_tiles_stays_plain(shape, is_tiled, monkeypatch):
    monkeypatch.setattr(ops, "npu_format_cast", lambda tensor, form: "tiled")
    assert (tiled(torch.zeros(shape, dtype=torch.int8)) == "tiled") is is_tiled
