"""Settings against what a pipeline's call takes, before anything loads: refused, or changed and said."""

import inspect
import json
import shutil
from pathlib import Path

import diffusers
import pytest

from framework.errors import InputError
from framework.families.calls import CALLS, SCHEDULERS, settle
from framework.families.pipeline import describe_pipeline
from framework.jobs.drawing import arguments_of
from tests.diffusion.made import WAN

DIGITS = Path(__file__).parents[2] / "recipes" / "assets" / "tiny-digits"


def pipeline(tmp_path, class_name, options=None, **configs):
    """The folder of a pipeline: nothing but the configs of its components."""
    parts = {name: ["diffusers", "AnyClass"] for name in configs}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": class_name, **(options or {}), **parts}))
    for name, config in configs.items():
        (tmp_path / name).mkdir()
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (tmp_path / name / file).write_text(json.dumps(config))
    return describe_pipeline(tmp_path)


def wan(tmp_path, class_name="WanPipeline", options=None, vae=None):
    scheduler = json.loads((WAN / "scheduler" / "scheduler_config.json").read_text())
    return pipeline(
        tmp_path, class_name, options, transformer={"patch_size": [1, 2, 2]}, vae=vae or {}, scheduler=scheduler
    )


@pytest.mark.parametrize("name", CALLS)
def test_arguments_and_schedulers_are_those_of_diffusers(name):
    takes = inspect.signature(getattr(diffusers, name).__call__).parameters
    assert set(CALLS[name].words.values()) - {"cache_threshold"} <= set(takes)
    if "cache_threshold" in CALLS[name].words:  # the transformer's own
        kind = diffusers.FluxTransformer2DModel if name == "FluxPipeline" else diffusers.WanTransformer3DModel
        assert callable(kind.enable_cache)
    assert set(CALLS[name].schedulers) <= set(SCHEDULERS)
    assert all(hasattr(diffusers, scheduler) for scheduler in SCHEDULERS.values())


@pytest.mark.parametrize(("asked", "made"), [(80, 81), (82, 81), (84, 85), (3, 1), (81, 81)])
def test_frames_that_are_not_4k_plus_1_are_rounded_as_diffusers_does_and_said(tmp_path, asked, made):
    settled = settle(wan(tmp_path), {"frames": asked, "prompts": ["x"]})
    assert settled.problems == () and settled.arguments == {"num_frames": made, "prompt": ["x"]}
    assert (asked == made) == (not settled.notes)
    assert all(f"job.frames={asked}" in note and f"{made} are made" in note for note in settled.notes)


def test_odd_sizes_of_wan_are_refused_with_both_neighbours(tmp_path):
    settled = settle(wan(tmp_path), {"height": 481, "width": 10})
    assert [problem.code for problem in settled.problems] == ["size-multiple", "size-multiple"]
    assert "481" in settled.problems[0].what and "16" in settled.problems[0].why
    assert settled.problems[0].fix == "job.height=480   or   job.height=496"
    assert settled.problems[1].fix == "job.width=16"


def test_sizes_between_the_vaes_multiples_are_rounded_down_and_said(tmp_path):
    made = wan(tmp_path, vae={"scale_factor_spatial": 16, "scale_factor_temporal": 4})  # as TI2V-5B's
    settled = settle(made, {"height": 720, "width": 1280})
    assert settled.arguments == {"height": 704, "width": 1280} and settled.problems == ()
    assert "multiples of 32, 704 is made" in settled.notes[0]


def test_flux_and_qwen_round_and_sd3_refuses(tmp_path):
    flux = pipeline(tmp_path, "FluxPipeline", transformer={}, vae={"block_out_channels": [1, 2, 3, 4]})
    assert settle(flux, {"width": 1001}).arguments == {"width": 992}
    (tmp_path / "q").mkdir()
    qwen = pipeline(tmp_path / "q", "QwenImagePipeline", vae={"temperal_downsample": [False, True, True]})
    assert settle(qwen, {"width": 1001, "guidance": 4.0}).arguments == {"width": 992, "true_cfg_scale": 4.0}
    (tmp_path / "s").mkdir()
    sd3 = pipeline(tmp_path / "s", "StableDiffusion3Pipeline", transformer={"patch_size": 2}, vae={})
    assert [problem.code for problem in settle(sd3, {"width": 1000}).problems] == ["size-multiple"]
    assert [problem.code for problem in settle(flux, {"width": 15}).problems] == ["size-multiple"]


def test_all_that_is_wrong_comes_at_once(tmp_path):
    made = wan(tmp_path)
    shutil.rmtree(tmp_path / "vae")
    given = {"labels": [3], "guidance_2": 3.0, "height": 17, "scheduler": "ddim", "image": "x.png"}
    with pytest.raises(InputError) as refused:
        arguments_of(made, given)
    codes = [problem.code for problem in refused.value.problems]
    assert sorted(codes) == [
        "component-missing", "scheduler-mismatch", "setting-unknown", "setting-unknown", "setting-unknown",
        "size-multiple",
    ]  # fmt: skip
    assert all(problem.fix for problem in refused.value.problems)


def test_a_second_guidance_needs_a_second_expert(tmp_path):
    assert settle(wan(tmp_path, options={"boundary_ratio": 0.9}), {"guidance_2": 3.0}).problems == ()


def test_a_missing_scheduler_is_named(tmp_path):
    made = wan(tmp_path)
    shutil.rmtree(tmp_path / "scheduler")
    (problem,) = settle(made, {}).problems
    assert problem.code == "component-missing" and "scheduler" in problem.what and "fetch" in problem.fix


def test_a_pipeline_of_another_class_is_refused_by_name(tmp_path):
    (problem,) = settle(pipeline(tmp_path, "FluxControlPipeline", transformer={}), {}).problems
    assert problem.code == "pipeline-unsupported" and "FluxControlPipeline" in problem.what
    assert "WanPipeline" in problem.why


def test_a_video_from_a_picture_needs_one_that_can_be_read(tmp_path):
    made = wan(tmp_path, "WanImageToVideoPipeline")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    for given in ({}, {"image": str(broken)}, {"image": str(tmp_path / "absent.png")}):
        with pytest.raises(InputError) as refused:
            arguments_of(made, given)
        assert [problem.code for problem in refused.value.problems] == ["image-file"]


def test_schedulers_are_made_for_what_the_model_predicts(tmp_path):
    made = wan(tmp_path)
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 12.0}
    assert settle(made, {"scheduler": "unipc", "flow_shift": 12.0}).scheduler == (SCHEDULERS["unipc"], flow)
    assert settle(made, {"flow_shift": 12.0}).scheduler == (SCHEDULERS["unipc"], flow)
    assert settle(made, {"scheduler": "flow_match_euler"}).scheduler == (SCHEDULERS["flow_match_euler"], {"shift": 3.0})
    digits = describe_pipeline(DIGITS)
    assert settle(digits, {"scheduler": "unipc"}).scheduler == (SCHEDULERS["unipc"], {})
    assert [p.code for p in settle(digits, {"flow_shift": 3.0}).problems] == ["scheduler-mismatch"]
    assert settle(digits, {"scheduler": "auto"}).scheduler is None
