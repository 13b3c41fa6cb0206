"""What another runtime loads wrongly of quantized diffusion checkpoints, by the gap's number."""

import json
import math
import shutil

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from framework import cli
from framework.diffusion.repack import repack
from tests.diffusion.made import WAN
from tests.diffusion.runs import checked_for, outputs
from tests.diffusion.test_transformer import apart, golden_call
from tests.diffusion.test_written import golden_model, linears
from tests.diffusion.written import simulate, write

WIDE = dict(num_attention_heads=4, attention_head_dim=128, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
            ffn_dim=1024, num_layers=1)  # fmt: skip


def wide_call(name):
    own = torch.Generator().manual_seed(3)  # ranks are threads, which share the global one
    latents, text = torch.randn(1, 4, 1, 8, 8, generator=own), torch.randn(1, 5, 16, generator=own)
    return {"hidden_states": latents, "timestep": torch.tensor([500]), "encoder_hidden_states": text}


def written(root, model, kinds, scale_of=None):
    """A pipeline with one quantized transformer, and the literal forward for a call."""
    weights = write(root / "quantized", model, kinds, scale_of)
    base = root / "base"
    model.save_pretrained(base / "transformer")
    index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
    (base / "model_index.json").write_text(json.dumps(index))
    repack(base, root / "quantized", root / "pipeline", lambda stage, done, total: None)

    def literal(call):
        with torch.inference_mode():
            return simulate(model, weights, kinds, scale_of)(**call, return_dict=False)[0].numpy()

    return root / "pipeline", literal


@pytest.mark.parametrize("smooth", [False, True], ids=["plain", "mul_scale"])
def test_g46_mxfp4_of_two_levels_runs_with_and_without_smoothing(tmp_path, smooth):
    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(**WIDE).eval()
    kinds = {"blocks.0.attn1.to_out.0": "W4A4_MXFP4_DUALSCALE", "blocks.0.ffn.net.2": "W4A4_MXFP4_DUALSCALE"}
    scale_of = {"blocks.0.ffn.net.2": 0.5 + torch.rand(1024)} if smooth else None
    folder, literal = written(tmp_path, model, kinds, scale_of)
    got = outputs(folder, wide_call)["transformer"].numpy()
    assert apart(got, literal(wide_call("transformer"))) <= 2e-3
    (use,) = [use for use in checked_for(folder).rows if use.scheme != "float"]
    assert (use.row, use.scheme, use.modules) == ("modelslim.mxfp4.linear", "mxfp4_dualscale", 2)


def test_g47_float_layers_stay_float_whatever_they_are_called_elsewhere(tmp_path):
    model = golden_model("transformer")
    every = linears(model, "W8A8_DYNAMIC")
    renamed = ("attn1.to_q", "attn1.to_out.0", "ffn.net.0.proj", "ffn.net.2")
    kinds = {name: kind for name, kind in every.items() if not name.endswith(renamed)}
    folder, literal = written(tmp_path, model, kinds)
    got = outputs(folder, golden_call)["transformer"].numpy()
    assert apart(got, literal(golden_call("transformer"))) <= 1e-2
    counts = {use.scheme: use.modules for use in checked_for(folder).rows}
    assert counts["w8a8_dynamic"] == len(kinds) == len(every) - 8


@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("kind", ["W8A8_DYNAMIC", "W8A8_MXFP8"])
def test_g48_smoothing_factors_multiply_inputs_after_repack(tmp_path, kind, tp_size):
    model = golden_model("transformer")
    kinds = linears(model, kind)
    torch.manual_seed(1)
    scale_of = {name: 0.25 + 4 * torch.rand(model.get_submodule(name).in_features) for name in kinds if "ffn" in name}
    with torch.inference_mode():
        plain = model(**golden_call("transformer"), return_dict=False)[0].numpy()
    folder, literal = written(tmp_path, model, kinds, scale_of)
    got = outputs(folder, golden_call, f"parallel.tp_size={tp_size}")["transformer"].numpy()
    assert apart(got, literal(golden_call("transformer"))) <= 3e-2
    assert apart(got, plain) <= 0.15  # without the factors it would be no picture


def test_g49_the_repack_command_needs_no_copies_by_hand_and_renames_what_has_no_tensor(tmp_path, capsys):
    model = golden_model("transformer")
    base = tmp_path / "base"
    shutil.copytree(WAN, base)
    for folder in ("high_noise_model", "low_noise_model"):
        write(tmp_path / "quantized" / folder, model, linears(model, "W8A8_DYNAMIC"))
        path = tmp_path / "quantized" / folder / "quant_model_description_w8a8_dynamic.json"
        described = json.loads(path.read_text()) | {"blocks.1.self_attn.quant_type": "FP8_DYNAMIC"}
        path.write_text(json.dumps(described))
    given = [f"job.{name}={tmp_path / folder}" for name, folder in [
        ("original", "base"), ("quantized", "quantized"), ("output", "made"),
    ]]  # fmt: skip
    assert cli.main(["job=repack", "job.model_type=Wan2.2-T2V-A14B", *given]) == 0
    assert "20 W8A8_DYNAMIC" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "made").iterdir()} == {path.name for path in base.iterdir()}
    described = json.loads((tmp_path / "made" / "transformer_2" / "quant_model_description.json").read_text())
    assert described["blocks.1.attn1.quant_type"] == "FP8_DYNAMIC"
    assert cli.main(["job=repack", *given]) == 2  # the output is there
    assert "error[output-exists]" in capsys.readouterr().err


def test_g50_rotations_of_quantized_attention_are_kept_and_change_nothing_for_float_attention(tmp_path):
    model = golden_model("transformer")
    kinds = linears(model, "W8A8_MXFP8")
    root = tmp_path / "plain"
    folder, _ = written(root, model, kinds)
    plain = outputs(folder, golden_call)["transformer"]
    quantized = tmp_path / "rotated"
    shutil.copytree(root / "quantized", quantized)
    (weights,), (description,) = quantized.glob("*.safetensors"), quantized.glob("*description*.json")
    turn = torch.tensor([[1.0]])
    while len(turn) < 32:
        turn = torch.cat([torch.cat([turn, turn], 1), torch.cat([turn, -turn], 1)])
    turns = {f"blocks.1.self_attn.{name}": turn.bfloat16() / math.sqrt(32) for name in ("q_rot", "k_rot")}
    save_file(load_file(weights) | {name: values.clone() for name, values in turns.items()}, weights)
    told = json.loads(description.read_text()) | dict.fromkeys(turns, "FLOAT")
    description.write_text(json.dumps(told | {"blocks.1.self_attn.quant_type": "FP8_DYNAMIC"}))
    repack(root / "base", quantized, tmp_path / "made", lambda stage, done, total: None)
    assert "blocks.1.attn1.q_rot" in load_file(tmp_path / "made/transformer/diffusion_pytorch_model.safetensors")
    assert torch.equal(outputs(tmp_path / "made", golden_call)["transformer"], plain)
    ignored = dict(checked_for(tmp_path / "made").ledger.ignored)
    assert "attention" in ignored["transformer.blocks.1.attn1.q_rot"]


@pytest.mark.parametrize("tp_size", [1, 4])
def test_g51_odd_counts_of_mx_blocks_run(tmp_path, tp_size):
    """K of 96 and 192: three blocks of a rank's to_out, and of each quarter of 128 one."""
    torch.manual_seed(0)
    odd = dict(num_attention_heads=4, attention_head_dim=24 if tp_size == 1 else 32, ffn_dim=224)
    model = diffusers.WanTransformer3DModel(**(WIDE | odd)).eval()
    kinds = {
        name: kind for name, kind in linears(model, "W8A8_MXFP8").items() if tp_size == 1 or "ffn.net.2" not in name
    }
    folder, literal = written(tmp_path, model, kinds)
    got = outputs(folder, wide_call, f"parallel.tp_size={tp_size}")["transformer"].numpy()
    assert apart(got, literal(wide_call("transformer"))) <= 3e-2
