"""Types without a golden checkpoint here: written as the quantizer does, repacked, run, against literal forwards."""

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from tests.diffusion.made import WAN
from tests.diffusion.runs import outputs
from tests.diffusion.test_transformer import EXPERTS, FLOAT, apart, golden_call, repacked
from tests.diffusion.written import simulate, write

# relative RMS that one flipped code may spread to, as the golden files' README has it
KINDS = {"W8A8_MXFP8": 3e-2, "W4A4_DYNAMIC": 1.3e-1, "W8A8_DYNAMIC": 1e-2}


def golden_model(name):
    model = diffusers.WanTransformer3DModel.from_config(diffusers.WanTransformer3DModel.load_config(WAN / name)).eval()
    model.load_state_dict(load_file(WAN / name / "diffusion_pytorch_model.safetensors"))
    return model


def linears(model, kind):
    """All linears of the blocks, of one type; the last of each block W8A8_DYNAMIC where 4 bits would be too few."""
    names = [
        name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "blocks." in name
    ]
    last = "W8A8_DYNAMIC" if kind == "W4A4_DYNAMIC" else kind
    return {name: last if name.endswith("ffn.net.2") else kind for name in names}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """By type: the repacked pipeline, outputs of the literal forwards, and of the codes' exact values."""
    done = {}

    def make(kind):
        if kind not in done:
            root = tmp_path_factory.mktemp(kind.lower())
            literal, exact = {}, {}
            for name, folder in EXPERTS.items():
                model = golden_model(name)
                kinds = linears(model, kind)
                weights = write(root / "quantized" / folder, model, kinds)
                with torch.inference_mode():
                    literal[name] = simulate(model, weights, kinds)(**golden_call(name), return_dict=False)[0]
                    float_types = dict.fromkeys(kinds, "FLOAT")
                    exact[name] = simulate(model, weights, float_types)(**golden_call(name), return_dict=False)[0]
            done[kind] = repacked(root, root / "quantized"), literal, exact
        return done[kind]

    return make


@pytest.mark.slow
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_written_transformers_equal_the_literal_forward(made, kind, tp_size):
    folder, literal, exact = made(kind)
    size = f"parallel.tp_size={tp_size}"
    got, dequantized = outputs(folder, golden_call, size), outputs(folder, golden_call, size, FLOAT)
    for name in EXPERTS:
        assert (dequantized[name] - exact[name]).abs().max() <= 1e-4
        assert apart(got[name].numpy(), literal[name].numpy()) <= KINDS[kind]
        assert apart(got[name].numpy(), exact[name].numpy()) >= 1e-3  # inputs were quantized
