"""job=verify of pipelines: what plain diffusers drew, in a file, is what ours draws; what differs is a failure."""

import json

import numpy as np
import pytest

from framework import cli
from tests.diffusion.made import WAN, wan_pipeline

DIGITS = WAN.parent / "tiny-digits" / "reference.npz"
EXACT = ("runtime.dtype=float32", "job=verify", "job.format=json")


def verified(capsys, tmp_path, *overrides):
    """The exit status, and the document or what was said."""
    given = overrides if any("run.dir" in one for one in overrides) else (*overrides, f"run.dir={tmp_path / 'run'}")
    status = cli.main([*EXACT, *given])
    out, err = capsys.readouterr()
    return status, json.loads(out) if out else err


@pytest.fixture(scope="module")
def wan(tmp_path_factory):
    return wan_pipeline(tmp_path_factory.mktemp("wan") / "pipeline")


@pytest.fixture(scope="module")
def embedded(tmp_path_factory):
    """The golden reference without its prompts and frames: this pipeline's text encoder and decoder are others."""
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    kept = {k: v for k, v in np.load(WAN / "reference.npz").items() if k not in ("prompt", "negative_prompt", "frames")}
    np.savez(path, **kept)
    return path


@pytest.mark.slow
def test_digits_hold_against_the_reference_and_its_settings_can_be_overridden(capsys, tmp_path):
    recipe = ("recipe=diffusion/digits", "parallel.tp_size=1", f"job.reference={DIGITS}")
    status, document = verified(capsys, tmp_path, *recipe)
    assert status == 0 and document["ok"] and document["metric"] == "max_abs"
    assert document["frames"]["max_abs"] <= 2e-3
    assert document["frames"]["psnr_db"] > 60
    written = json.loads((tmp_path / "run" / "verify.json").read_text())
    assert written == document and (tmp_path / "run" / "metrics.json").is_file()
    status, document = verified(capsys, tmp_path, *recipe, "job.guidance=3", f"run.dir={tmp_path / 'other'}")
    assert status == 1 and not document["ok"] and document["frames"]["max_abs"] > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["none", "experts"])
def test_final_latents_of_two_experts_hold(capsys, tmp_path, wan, embedded, offload):
    where = ("recipe=diffusion/local", f"model.path={wan}", f"job.reference={embedded}", "job.tolerance=1e-3")
    status, document = verified(capsys, tmp_path, *where, f"runtime.offload={offload}")
    assert status == 0 and document["latents"]["max_abs"] <= 1e-3 and "frames" not in document


@pytest.mark.slow
def test_two_recipes_are_compared_by_the_pictures_that_they_draw(capsys, tmp_path):
    other = tmp_path / "quantized.yaml"
    other.write_text(
        "model: {kind: diffusion, path: " + str(WAN.parents[3] / "recipes/assets/tiny-digits") + "}\n"
        "hardware: a2\ncapability: {allow: [tbd]}\nruntime: {dtype: float32}\n"
        "quantization: {online: true, layers: [{pattern: '*.attn1.*', scheme: w8a8_dynamic}]}\n"
    )
    given = ("recipe=diffusion/digits", "parallel.tp_size=1", f"job.against={other}", "job.labels=[4,2]")
    more = ("job.steps=5", "job.guidance=2", "job.frames_tolerance=0.2")
    status, document = verified(capsys, tmp_path, *given, *more, "job.metric=rel_l2", "job.tolerance=0.1")
    assert status == 0 and 1e-4 < document["latents"]["rel_l2"] < 0.1 and 25 < document["frames"]["psnr_db"] < 70


def test_a_reference_of_other_shapes_and_one_without_pictures_are_refused(capsys, tmp_path):
    path = tmp_path / "reference.npz"
    recipe = ("recipe=diffusion/digits", "parallel.tp_size=1", "job.steps=1", f"job.reference={path}")
    np.savez(path, labels=np.array([3]), final_latents=np.zeros((1, 4, 4, 4), np.float32))
    status, said = verified(capsys, tmp_path, *recipe)
    assert status == 2 and "error[reference-mismatch]" in said and "[1, 4, 4, 4]" in said
    np.savez(path, labels=np.array([3]))
    status, said = verified(capsys, tmp_path, *recipe, f"run.dir={tmp_path / 'again'}")
    assert status == 2 and "error[reference-key]" in said


def test_nothing_to_verify_against_and_options_of_the_other_kind_are_refused(capsys, tmp_path):
    status, said = verified(capsys, tmp_path, "recipe=diffusion/digits")
    assert status == 2 and "error[reference-missing]" in said
    status, said = verified(capsys, tmp_path, "recipe=diffusion/digits", "job.min_top1=0.5")
    assert status == 2 and "error[job-kind]" in said and "job.min_top1" in said
    status, said = verified(capsys, tmp_path, "recipe=quickstart", "job.guidance=2")
    assert status == 2 and "error[job-kind]" in said and "job.guidance" in said
