"""Wan's transformers built from plans: float and quantized, whole and cut, against the golden outputs."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from framework.diffusion.repack import repack
from tests.diffusion.made import WAN
from tests.diffusion.runs import outputs

ORIGINAL = Path(__file__).parents[1] / "golden" / "diffusion" / "tiny-wan22-original"
REFERENCE = {"transformer": "transformer_out_t900", "transformer_2": "transformer_2_out_t300"}
EXPERTS = {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}
# tolerances of the golden files' README for the literal simulation, relative RMS
SIMULATED = {"w8a8-dynamic": 1e-2, "w8a8-static": 2e-2, "w4a4-mxfp4": 8e-2}
FLOAT = 'quantization.layers=[{pattern: "*", scheme: float}]'


def golden_call(name):
    given = np.load(WAN / "reference.npz")
    latents, context = torch.tensor(given["block_input"]), torch.tensor(given["block_context"])
    times = torch.tensor([{"transformer": 900, "transformer_2": 300}[name]] * len(latents))
    return {"hidden_states": latents, "timestep": times, "encoder_hidden_states": context}


def repacked(tmp_path, quantized):
    """The golden pipeline with quantized transformers; with one of them where so many were quantized."""
    base = tmp_path / "base"
    shutil.copytree(WAN, base)
    if not (quantized / "low_noise_model").is_dir():
        shutil.rmtree(base / "transformer_2")
        index = json.loads((base / "model_index.json").read_text()) | {
            "transformer_2": [None, None],
            "boundary_ratio": None,
        }
        (base / "model_index.json").write_text(json.dumps(index))
    repack(base, quantized, tmp_path / "pipeline", lambda stage, done, total: None)
    return tmp_path / "pipeline"


def apart(got, wanted):
    return float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))


@pytest.mark.slow
@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
def test_float_transformers_equal_diffusers_at_every_size(tp_size):
    reference = np.load(WAN / "reference.npz")
    for name, output in outputs(WAN, golden_call, f"parallel.tp_size={tp_size}").items():
        assert np.abs(output.numpy() - reference[REFERENCE[name]]).max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("variant", SIMULATED)
def test_repacked_transformers_equal_the_real_tools_references(tmp_path, variant, tp_size):
    folder, size = repacked(tmp_path, ORIGINAL / variant), f"parallel.tp_size={tp_size}"
    reference = np.load(ORIGINAL / variant / "reference_output.npz")
    exact, got = outputs(folder, golden_call, size, FLOAT), outputs(folder, golden_call, size)
    for name, output in got.items():
        wanted = reference[f"{EXPERTS[name]}.output_sim"]
        assert np.abs(exact[name].numpy() - reference[f"{EXPERTS[name]}.output_dequant_fp32"]).max() <= 1e-4
        assert apart(output.numpy(), wanted) <= SIMULATED[variant]
