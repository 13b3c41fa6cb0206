"""Every shipped recipe of a pipeline draws, as it is written, on a tiny pipeline of the same class.

Overridden are the weights, the size and the number of steps: schemes, layout and settings are the recipe's. In float
its layout gives the latents of plain diffusers.
"""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from PIL import Image

from framework import cli
from framework.recipe.locate import recipes_dir
from tests.diffusion import pipelines

VIDEO = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 3, "guidance_scale": 4.0}
PICTURE = {"height": 32, "width": 32, "num_inference_steps": 3, "guidance_scale": 4.0}
WORDS = {"num_frames": "frames", "num_inference_steps": "steps", "height": "height", "width": "width"}
TWO = {"boundary_ratio": 0.875}


def two_experts(folder):
    return pipelines.wan(folder, experts=2, options=TWO)


def from_a_picture(folder):
    return pipelines.wan(folder, "WanImageToVideoPipeline", 2, 36, TWO)


def of_tokens(folder):
    return pipelines.wan(folder, options={"expand_timesteps": True})


MADE = {
    "wan2.1-t2v-1.3b": (pipelines.wan, VIDEO),
    "wan2.2-i2v-a14b-mxfp8": (from_a_picture, VIDEO),
    "wan2.2-ti2v-5b-mxfp8": (of_tokens, VIDEO),
    "wan2.2-t2v-a14b-mxfp8": (two_experts, VIDEO),
    "flux.1-dev-mxfp8": (pipelines.flux, PICTURE),
    "dit-xl-2-256": (pipelines.dit, {"num_inference_steps": 3, "guidance_scale": 4.0}),
    "sd3.5-medium": (pipelines.sd3, PICTURE),
}
# weights that msModelSlim wrote: the same pipeline, run by row in test_rows.py
QUANTIZED = {f"wan2.2-t2v-a14b-{name}" for name in ("mxfp4", "mxfp8-offline", "w4a4", "w8a8")}
# runs in test_render.py; is a pipeline that the user names; is checked and planned only
ELSEWHERE = {"digits", "local", "qwen-image"}


def test_every_recipe_of_a_pipeline_is_run():
    assert {path.stem for path in (recipes_dir() / "diffusion").glob("*.yaml")} == set(MADE) | QUANTIZED | ELSEWHERE


@pytest.fixture
def launch(warm_session, monkeypatch, capsys, tmp_path):
    @contextmanager
    def opened(*args, **options):
        yield warm_session

    monkeypatch.setattr("framework.jobs.ranks.open_session", opened)

    def run(name, *given):
        run = tmp_path / name
        status = cli.main([*given, f"run.dir={run}"])
        out, err = capsys.readouterr()
        assert status == 0, out + err
        return run

    return run


def reference(plain, settings, path, image):
    """Write what plain diffusers draws, with its settings."""
    if type(plain).__name__ == "DiTPipeline":
        given, output, more = {"labels": [3, 5]}, "np", {"class_labels": [3, 5]}
    else:
        given, output, more = {"prompt": "a red boat"}, "latent", {"prompt": "a red boat"}
    if image is not None:
        more["image"] = image
    with torch.inference_mode():
        out = plain(**settings, **more, generator=torch.Generator().manual_seed(7), output_type=output)
    made = np.asarray(out.frames if hasattr(out, "frames") else out.images)
    np.savez(path, **settings, **given, seed=7, **{"images" if output == "np" else "final_latents": made})


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("name", MADE)
def test_the_recipe_draws_on_a_tiny_pipeline_and_in_float_what_diffusers_does(launch, tmp_path, name):
    make, settings = MADE[name]
    folder, image = tmp_path / "pipeline", None
    folder.mkdir()
    plain = make(folder)
    given = [f"recipe=diffusion/{name}", f'model.path="{folder}"', "runtime.dtype=float32"]
    if "i2v-a14b" in name:
        image = Image.fromarray(np.arange(32 * 48 * 3, dtype=np.uint8).reshape(32, 48, 3))
        image.save(tmp_path / "first.png")
        given.append(f"job.image={tmp_path / 'first.png'}")
    sizes = [f"job.{WORDS[key]}={value}" for key, value in settings.items() if key in WORDS]
    run = launch("run", *given, *sizes)
    files = [file for line in (run / "results.jsonl").read_text().splitlines() for file in json.loads(line)["files"]]
    assert files and all((run / file).stat().st_size > 100 for file in files)
    plan = json.loads((run / "plan.json").read_text())
    online = [module for module in plan["modules"] if module["mode"] == "online"]
    assert bool(online) == ("mxfp8" in name) and len(plan["ranks"]) > 1
    path = tmp_path / "reference.npz"
    reference(plain, settings, path, image)
    exact = ("quantization.online=false", 'quantization.layers=[{pattern: "*", scheme: auto}]')
    launch("verify", *given, *exact, "job=verify", f"job.reference={path}", "job.tolerance=1e-3")
