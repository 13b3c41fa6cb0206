"""The shipped digits pipeline draws the reference's pictures, whole and cut, float and quantized."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from framework.errors import InputError
from framework.jobs.common import open_checked
from framework.jobs.drawing import LOADER
from framework.jobs.render import outputs
from framework.planning.make import make_plan
from framework.recipe.compose import compose, recipes_dir

REFERENCE = Path(__file__).parents[1] / "golden" / "diffusion" / "tiny-digits" / "reference.npz"
QUANTIZED = (
    "quantization.online=true",
    'quantization.layers=[{pattern: "*.attn1.*", scheme: w8a8_dynamic}, {pattern: "*.ff.*", scheme: w8a8_dynamic}]',
    "capability.allow=[tbd]",
)


def pictures(session, *overrides):
    given = np.load(REFERENCE)
    recipe = compose(["recipe=diffusion/digits", "runtime.dtype=float32", *overrides])
    plan = make_plan(open_checked(recipe), "cpu")
    settings = {
        "class_labels": given["labels"].tolist(),
        "guidance_scale": float(given["guidance_scale"]),
        "num_inference_steps": int(given["num_inference_steps"]),
    }

    session.load(plan, loader=LOADER)
    return list(session.stream("render", [(settings, int(given["seed"]))]))[-1]["frames"].astype(float) / 255


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    "layout",
    [{"tp": 1}, {"tp": 2}, {"tp": 3}, {"tp": 1, "cfg": 2}, {"tp": 1, "ulysses": 2}, {"tp": 2, "cfg": 2},
     {"tp": 1, "ulysses": 2, "cfg": 2}],
    ids=lambda layout: "-".join(f"{axis}{size}" for axis, size in layout.items()),
)  # fmt: skip
def test_float_pictures_are_the_reference_s(warm_session, layout):
    # two thousandths for the decoder (README of the golden files), half a step of 8 bits
    assert (
        np.abs(
            pictures(warm_session, *(f"parallel.{axis}_size={n}" for axis, n in layout.items()))
            - np.load(REFERENCE)["images"]
        ).max()
        <= 2e-3 + 0.5 / 255
    )


@pytest.mark.slow
@pytest.mark.ray
def test_quantized_pictures_are_close(warm_session):
    error = np.square(pictures(warm_session, *QUANTIZED) - np.load(REFERENCE)["images"]).mean()
    assert -10 * np.log10(error) >= 45.7  # 48.7 dB by the README, less 3


def test_the_shipped_recipe_checks():
    checked = open_checked(compose(["recipe=diffusion/digits", "job=check"]))
    assert checked.ok
    assert json.loads((recipes_dir() / "assets" / "tiny-digits" / "model_index.json").read_text())["transformer"]


@pytest.mark.parametrize("given", [[], ["job.labels=[1]", "job.prompts=[x]"]])
def test_prompts_or_labels_are_needed_but_not_both(given):
    recipe = compose(["recipe=diffusion/digits", "job.labels=[]", *given])
    with pytest.raises(InputError) as refused:
        outputs(recipe)
    assert refused.value.problems[0].code == "prompts-missing"


def test_each_output_has_its_own_seed():
    wanted = outputs(compose(["recipe=diffusion/digits", "job.labels=[3,1]", "job.num_outputs=2", "runtime.seed=7"]))
    assert [(one.label, one.seed) for one in wanted] == [(3, 7), (3, 8), (1, 9), (1, 10)]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of diffusers itself
@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "DDIMScheduler"])
def test_digits_by_another_scheduler_are_those_of_diffusers(warm_session, name):
    import diffusers
    import torch

    recipe = compose(["recipe=diffusion/digits", "runtime.dtype=float32"])
    warm_session.load(make_plan(open_checked(recipe), "cpu"), loader=LOADER)
    settings = {"class_labels": [3, 8], "guidance_scale": 2.0, "num_inference_steps": 8}
    made = list(warm_session.stream("render", [(settings | {"scheduler": (name, {})}, 5)]))[-1]["frames"]
    root = recipes_dir() / "assets" / "tiny-digits"
    config = diffusers.DiTTransformer2DModel.load_config(root / "transformer")
    model = diffusers.DiTTransformer2DModel.from_config(config).eval()
    model.load_state_dict(load_file(root / "transformer" / "diffusion_pytorch_model.safetensors"))
    plain = diffusers.DiTPipeline.from_pretrained(root, transformer=model, dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    plain.scheduler = getattr(diffusers, name).from_config(plain.scheduler.config)
    wanted = plain(**settings, generator=torch.Generator().manual_seed(5), output_type="np").images
    assert np.abs(made / 255 - wanted).max() <= 2e-3 + 0.5 / 255
