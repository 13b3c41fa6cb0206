"""Scales that are NaN, Inf, 0 or negative: the result is right, or the file is refused with the module's name."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from framework.errors import InputError
from framework.layers.group import Alone
from framework.loading.load import load
from framework.loading.scales import check_values
from framework.quantization.registry import SCHEMES
from framework.quantization.tensor import QuantTensor
from tests.plans import plan_for
from tests.quantization.weights import CASES, WITHOUT_EXPERTS, activations, inputs, values, weight

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parents[1] / "golden"
N, K = 16, 512
QUANTIZED = [case for case in CASES if case[0] != "float"]
FLOAT_SCALES = [case for case in QUANTIZED if weight(case[0], 1, K, case[1]).scale.is_floating_point()]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def both_forms(scheme, held, x, dtype):
    """The product of a linear, and of one expert where the scheme has experts."""
    made, x = SCHEMES[scheme], torch.from_numpy(x).to(dtype)
    yield made.linear(x, made.prepare(held, dtype=dtype, device=CPU))
    if scheme not in WITHOUT_EXPERTS:
        yield made.grouped(x, torch.tensor([len(x)]), made.prepare_experts([held], dtype=dtype, device=CPU))


def multiplies_rightly(scheme, held, dtype):
    x = torch.from_numpy(inputs(scheme, 5, K)).to(dtype).float().numpy()
    expected = activations(scheme, x) @ values(held).T
    # the operator rounds activations over their outer scale to bf16: a code in a hundred moves
    tolerance = TOLERANCE[dtype] * (2 if scheme == "mxfp4_dualscale" else 1)
    for y in both_forms(scheme, held, x, dtype):
        assert np.abs(y.double().numpy() - expected).max() <= tolerance * np.abs(expected).max()
        # rows whose activations are 0, and features whose weights are
        assert not y[np.abs(x).max(1) == 0].any() and not y[:, np.abs(values(held)).max(1) == 0].any()


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("scheme", "group"), FLOAT_SCALES)
def test_scales_of_zero_and_below_multiply_as_they_are(scheme, group, dtype):
    held = weight(scheme, N, K, group)
    scale = held.scale.clone()
    scale[1], scale[2, 0], scale[3] = 0, 0, -scale[3]
    changed = replace(held, scale=scale)
    check_values(changed, "m", "file", dtype)
    multiplies_rightly(scheme, changed, dtype)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(("scheme", "group"), QUANTIZED)
def test_rows_of_zeros_give_zeros(scheme, group, dtype):
    held = weight(scheme, N, K, group)
    codes = held.codes.view(torch.uint8).clone()
    codes[1], codes[N - 1] = 0, 0
    multiplies_rightly(scheme, replace(held, stored=codes.view(held.codes.dtype)), dtype)
    nothing = replace(held, stored=torch.zeros_like(codes).view(held.codes.dtype))
    multiplies_rightly(scheme, nothing, dtype)


@pytest.mark.parametrize("byte", [0, 1, 240])
def test_bytes_far_apart_are_powers_of_two(byte):
    held = weight("mxfp4", N, K)
    scale = held.scale.clone()
    scale[4, 3] = byte
    changed = replace(held, scale=scale, stored=held.codes & 1)
    check_values(changed, "m", "file", torch.float32)
    multiplies_rightly("mxfp4", changed, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1e-9, 1e-4, -1e-9])
def test_a_group_whose_minimum_dwarfs_its_scale_holds_the_minimum(scale, dtype):
    """A quotient minimum / scale that fp16 has no room for must not become infinite."""
    codes = torch.randint(0, 16, (N, K), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    scales = torch.full((N, K // 32), 0.05)
    scales[3, 2] = scale
    held = QuantTensor(codes, scales, minimum=torch.full_like(scales, -8.0), group_size=32, bits=4)
    x = torch.randn(4, K, generator=torch.Generator().manual_seed(1)).to(dtype)
    y = SCHEMES["w4a16"].linear(x, SCHEMES["w4a16"].prepare(held, dtype=dtype, device=CPU))
    expected = x.double().numpy() @ values(held).T
    assert np.abs(y.double().numpy() - expected).max() <= 2e-2 * np.abs(expected).max()


BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}
PLACES = {
    "scale": lambda held, bad: replace(held, scale=bad(held.scale)),
    "zero": lambda held, bad: replace(held, zero=bad(torch.zeros(N, K // 64))),
    "minimum": lambda held, bad: replace(held, minimum=bad(torch.zeros(N, K // 64))),
    "outer": lambda held, bad: replace(held, outer=bad(torch.ones(N, 1))),
    "deq_scale": lambda held, bad: replace(held, rows={"deq_scale": bad(torch.ones(N))}),
    "mul_scale": lambda held, bad: replace(held, columns={"mul_scale": bad(torch.ones(K))}),
    "input_scale": lambda held, bad: replace(held, whole={"input_scale": bad(torch.ones(1))}),
    "value": lambda held, bad: QuantTensor(bad(torch.ones(N, K))),
}


@pytest.mark.parametrize("name", BAD)
@pytest.mark.parametrize("role", PLACES)
def test_what_is_no_number_is_refused_with_its_place(role, name):
    def spoiled(values):
        spoiled = values.clone()
        spoiled.view(-1)[-1] = BAD[name]
        return spoiled

    held = PLACES[role](weight("w4a16", N, K, 64), spoiled)
    with pytest.raises(InputError) as refused:
        check_values(held, "model.layers.3.mlp.up_proj", "folder", torch.bfloat16)
    (problem,) = refused.value.problems
    assert (problem.code, problem.where) == ("scale-values", "folder")
    assert "model.layers.3.mlp.up_proj" in problem.what and f"{role} is {name} in 1 of" in problem.what
    check_values(PLACES[role](weight("w4a16", N, K, 64), torch.clone), "m", "folder", torch.bfloat16)


def test_an_input_scale_of_zero_is_refused_and_the_nan_of_e8m0():
    held = weight("w8a8_static", N, K)
    nan = weight("mxfp8", N, K)
    nan.scale[2, 5] = 255
    for bad in (replace(held, whole=held.whole | {"input_scale": torch.zeros(1)}), nan):
        with pytest.raises(InputError, match="scale-values"):
            check_values(bad, "m", "file", torch.float32)


def test_a_scale_beyond_the_activations_dtype_is_refused_there_alone():
    held = weight("w4a16", N, K, 64)
    large = replace(held, scale=held.scale * 1e6)
    check_values(large, "m", "file", torch.bfloat16)
    with pytest.raises(InputError, match="scale-values"):
        check_values(large, "m", "file", torch.float16)


def test_float_values_whose_sums_overflow_are_numbers():
    check_values(QuantTensor(torch.full((2, 64), 6e4, dtype=torch.float16)), "m", "file", torch.float16)


FILES = {
    "tiny-qwen3/modelslim-mixed": [
        ("layers.0.self_attn.q_proj.deq_scale", float("nan")),
        ("layers.0.self_attn.k_proj.input_scale", 0),
        ("layers.1.self_attn.o_proj.weight_scale", float("inf")),
        ("layers.0.mlp.down_proj.weight_scale", float("nan")),
    ],
    "tiny-qwen3-moe/modelslim-mxfp4": [("layers.1.mlp.experts.5.up_proj.weight_scale", 255)],
    "tiny-qwen3-moe/awq-w4g64": [("layers.0.mlp.experts.3.down_proj.scales", float("nan"))],
    "tiny-qwen3/base": [("layers.1.mlp.gate_proj.weight", float("inf"))],
}


@pytest.mark.parametrize(("folder", "tensor", "bad"), [(f, *case) for f, cases in FILES.items() for case in cases])
def test_a_file_with_one_bad_scale_is_refused_at_load(tmp_path, folder, tensor, bad):
    copy = tmp_path / "model"
    shutil.copytree(GOLDEN / folder, copy)
    path = next(copy.glob("*.safetensors"))
    tensors = load_file(path)
    tensors[f"model.{tensor}"].view(-1)[-1] = bad
    path.chmod(0o644)
    save_file(tensors, path)
    plan = plan_for(copy, "hardware=a5", "capability.allow=[tbd,wip]", dtype="float32")
    with pytest.raises(InputError) as refused:
        load(plan, Alone(), lambda done, total: None)
    (problem,) = refused.value.problems
    assert problem.code == "scale-values" and tensor.rsplit(".", 1)[0] in problem.what
    assert str(copy) in problem.where
