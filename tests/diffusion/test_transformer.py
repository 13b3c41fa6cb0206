"""Wan's transformers built from plans: float and quantized, whole and cut, against the golden outputs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from framework.checkpoint.reader import Reader
from framework.diffusion.repack import repack
from framework.diffusion.transformer import build_transformer
from framework.formats.registry import decoder
from framework.jobs.common import read_capability
from framework.planning.check import check
from framework.planning.make import make_plan
from framework.planning.parts import open_indexes
from framework.recipe.compose import compose
from tests.threads import on_ranks

GOLDEN = Path(__file__).parents[1] / "golden" / "diffusion"
WAN = GOLDEN / "tiny-wan2.2"
TIMES = {"transformer.": 900, "transformer_2.": 300}
REFERENCE = {"transformer.": "transformer_out_t900", "transformer_2.": "transformer_2_out_t300"}


def outputs(path, tp_size, *overrides):
    """Outputs of every transformer of a pipeline for the golden input, in fp32."""
    given = [f'model.path="{path}"', "model.kind=diffusion", "job=plan", "runtime.dtype=float32", *overrides]
    recipe = compose(["recipe=llm/local", f"parallel.tp_size={tp_size}", "capability.allow=[tbd]", *given])
    indexes = open_indexes(Path(path), "diffusion")
    checked = check(recipe, indexes, read_capability(recipe))
    plan = make_plan(checked, "cpu")
    inputs = np.load(WAN / "reference.npz")
    latents, context = torch.tensor(inputs["block_input"]), torch.tensor(inputs["block_context"])
    found = {}
    for part in checked.model.parts:

        def work(group, part=part):
            with torch.inference_mode(), Reader() as reader:
                model = build_transformer(
                    plan, part.prefix, part.index, reader, decoder(part.format), group, torch.device("cpu"),
                    lambda done, total: None,
                )  # fmt: skip
                times = torch.tensor([TIMES[part.prefix]] * len(latents))
                return model(latents, times, context, return_dict=False)[0].numpy()

        found[part.prefix] = on_ranks(tp_size, work)[0]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
def test_float_transformers_equal_diffusers_at_every_size(tp_size):
    reference = np.load(WAN / "reference.npz")
    for prefix, output in outputs(WAN, tp_size).items():
        assert np.abs(output - reference[REFERENCE[prefix]]).max() <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_quantized_transformers_equal_the_literal_simulation(tmp_path, tp_size):
    folder = tmp_path / "pipeline"
    repack(WAN, GOLDEN / "tiny-wan22-original" / "w8a8-dynamic", folder, lambda stage, done, total: None)
    reference = np.load(GOLDEN / "tiny-wan22-original" / "w8a8-dynamic" / "reference_output.npz")
    exact = outputs(folder, tp_size, 'quantization.layers=[{pattern: "*", scheme: float}]')["transformer."]
    assert np.abs(exact - reference["high_noise_model.output_dequant_fp32"]).max() <= 1e-4
    simulated = reference["high_noise_model.output_sim"]
    got = outputs(folder, tp_size)["transformer."]
    assert np.linalg.norm(got - simulated) / np.linalg.norm(simulated) <= 1e-2
