"""The two predictions of guidance on two ranks: what both get is what one rank would have made."""

import inspect

import diffusers
import pytest
import torch

from framework.diffusion.guidance import share_guidance
from framework.families.guided import GUIDED
from tests.diffusion.made import inputs_of, reference
from tests.threads import on_ranks

WAN, DIT = "WanTransformer3DModel", "DiTTransformer2DModel"


def on_two(class_name, pipeline, work):
    """Run work(model, rank) on two ranks that share the predictions of equal models."""
    models = [reference(class_name) for _ in range(2)]  # here: threads share one random generator

    def rank(group):
        share_guidance(models[group.rank], GUIDED[pipeline], group)
        with torch.inference_mode():
            return work(models[group.rank], group.rank)

    return on_ranks(2, rank)


def test_two_calls_of_a_step_are_made_by_two_ranks():
    cond, uncond = inputs_of(WAN), inputs_of(WAN)
    uncond["encoder_hidden_states"] = torch.randn(2, 7, 16)

    def step(model, x):
        """As pipelines do it: what the first call returned is looked into after the second."""
        first = model(**cond | {"hidden_states": x}, return_dict=False)[0]
        second = model(**uncond | {"hidden_states": x}, return_dict=False)[0]
        return second + 3.0 * (first - second)

    def two_steps(model):
        return step(model, step(model, cond["hidden_states"]))

    calls = []

    def work(model, rank):
        model.proj_out.register_forward_hook(lambda *_: calls.append(rank))
        return two_steps(model)

    with torch.inference_mode():
        wanted = two_steps(reference(WAN))
    for got in on_two(WAN, "WanPipeline", work):
        assert torch.equal(got, wanted)
    assert sorted(calls) == [0, 0, 1, 1]


@pytest.mark.parametrize("return_dict", [True, False])
def test_a_call_for_both_predictions_is_halved(return_dict):
    call = inputs_of(DIT, batch=4)
    halves = []

    def work(model, rank):
        model.proj_out_2.register_forward_hook(lambda module, inputs, output: halves.append(len(output)))
        return model(**call, return_dict=return_dict)[0]

    with torch.inference_mode():
        wanted = reference(DIT)(**call)[0]
    for got in on_two(DIT, "DiTPipeline", work):
        assert (got - wanted).abs().max() <= 1e-5 * wanted.abs().max()
    assert halves == [2, 2]


def test_calls_that_are_no_pair_are_refused():
    call = inputs_of(WAN)

    def other_latents(model, rank):
        model(**call, return_dict=False)
        model(**call | {"hidden_states": call["hidden_states"].clone()}, return_dict=False)

    with pytest.raises(RuntimeError, match="same latents"):
        on_two(WAN, "WanPipeline", other_latents)
    with pytest.raises(RuntimeError, match="a batch of 3"):
        on_two(DIT, "DiTPipeline", lambda model, rank: model(**inputs_of(DIT, batch=3)))


@pytest.mark.parametrize("name", GUIDED)
def test_defaults_are_those_of_diffusers(name):
    arguments = inspect.signature(getattr(diffusers, name).__call__).parameters
    scale = "true_cfg_scale" if "true_cfg_scale" in arguments else "guidance_scale"
    assert arguments[scale].default == GUIDED[name].default


def test_settings_say_whether_there_are_two_predictions():
    assert not GUIDED["WanPipeline"].off({"guidance": None})
    assert "job.guidance is 1" in GUIDED["WanPipeline"].off({"guidance": 1.0})
    assert "job.true_guidance is 1" in GUIDED["FluxPipeline"].off({"guidance": 3.5})
    assert "negative_prompt" in GUIDED["FluxPipeline"].off({"true_guidance": 2.0})
    assert not GUIDED["QwenImagePipeline"].off({"negative_prompt": "a lamp"})
