"""A Wan 2.2 pipeline over ranks draws what plain diffusers draws, in every layout."""

import numpy as np
import pytest
import torch

from framework.families.calls import settle
from framework.families.pipeline import describe_pipeline
from framework.jobs.common import open_checked
from framework.jobs.drawing import LOADER
from framework.planning.make import make_plan
from framework.recipe.compose import compose
from tests.diffusion.made import WAN, wan_pipeline


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return wan_pipeline(tmp_path_factory.mktemp("wan") / "pipeline")


@pytest.fixture(scope="module")
def settings():
    given = np.load(WAN / "reference.npz")
    embeddings = {name: torch.tensor(given[name]) for name in ("prompt_embeds", "negative_prompt_embeds")}
    names = {name: name for name in ("height", "width", "num_frames", "num_inference_steps", "max_sequence_length")}
    scales = {name: float(given[name]) for name in ("guidance_scale", "guidance_scale_2")}
    return embeddings | scales | {name: int(given[key]) for name, key in names.items()}


@pytest.fixture(scope="module")
def plain(pipeline):
    """Plain diffusers; its transformers by hand: its own loader of them needs accelerate."""
    import diffusers
    from safetensors.torch import load_file

    transformers = {}
    for name in ("transformer", "transformer_2"):
        config = diffusers.WanTransformer3DModel.load_config(pipeline / name)
        transformers[name] = diffusers.WanTransformer3DModel.from_config(config).eval()
        transformers[name].load_state_dict(load_file(pipeline / name / "diffusion_pytorch_model.safetensors"))
    plain = diffusers.WanPipeline.from_pretrained(pipeline, **transformers, dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    return plain


@pytest.fixture(scope="module")
def drawn(plain, settings):
    with torch.inference_mode():
        return plain(**settings, generator=torch.Generator().manual_seed(42), output_type="np").frames[0]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(
    "layout",
    [{}, {"tp": 2}, {"cfg": 2}, {"ulysses": 2}, {"tp": 2, "cfg": 2}, {"ulysses": 2, "cfg": 2}, {"ulysses": 4}],
    ids=lambda layout: "-".join(f"{axis}{size}" for axis, size in layout.items()) or "one",
)
def test_every_layout_draws_the_reference(warm_session, pipeline, settings, drawn, layout):
    sizes = [f"parallel.{axis}_size={size}" for axis, size in layout.items()]
    given = [f'model.path="{pipeline}"', "model.kind=diffusion", "job=plan", "runtime.dtype=float32", *sizes]
    plan = make_plan(open_checked(compose(["recipe=llm/local", *given])), "cpu")
    warm_session.load(plan, loader=LOADER)
    made = list(warm_session.stream("render", [(settings, 42)]))[-1]
    # tolerances of the golden files' README, half a step of 8 bits
    assert np.abs(made["latents"] - np.load(WAN / "reference.npz")["final_latents"]).max() <= 1e-3
    assert np.abs(made["frames"] / 255 - drawn).max() <= 2e-3 + 0.5 / 255
    for held, rank in zip(warm_session.call("bytes_held"), plan.ranks, strict=True):
        assert abs(held - rank.weights_bytes) <= 0.05 * rank.weights_bytes


@pytest.mark.slow
@pytest.mark.ray
def test_bytes_of_a_rank_are_the_planned_ones_and_fall_with_ranks_and_with_offload(warm_session, pipeline, settings):
    def held(*overrides):
        """The most bytes of a rank, as they are held after a picture was drawn."""
        given = [f'model.path="{pipeline}"', "model.kind=diffusion", "job=plan", *overrides]
        plan = make_plan(open_checked(compose(["recipe=llm/local", *given])), "cpu")
        warm_session.load(plan, loader=LOADER)
        found = warm_session.call("bytes_held")
        for measured, rank in zip(found, plan.ranks, strict=True):
            assert abs(measured - rank.weights_bytes) <= 0.05 * rank.weights_bytes
        return max(found)

    whole, halves, quarters = held(), held("parallel.tp_size=2"), held("parallel.tp_size=4")
    assert whole > 1.4 * halves > 1.4 * 1.2 * quarters  # embedders and norms are not cut: much of a model this small
    assert held("runtime.offload=experts") == whole / 2


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("overrides", [("runtime.offload=experts",), ("runtime.vae_slicing=true",)])
def test_less_memory_draws_the_same(warm_session, pipeline, settings, drawn, overrides):
    given = [f'model.path="{pipeline}"', "model.kind=diffusion", "job=plan", "runtime.dtype=float32", *overrides]
    plan = make_plan(open_checked(compose(["recipe=llm/local", *given])), "cpu")
    warm_session.load(plan, loader=LOADER)
    made = list(warm_session.stream("render", [(settings, 42)]))[-1]
    assert np.abs(made["frames"] / 255 - drawn).max() <= 2e-3 + 0.5 / 255


def test_a_vae_that_decodes_in_tiles_uses_them(pipeline, settings):
    from framework.diffusion.pipeline import load_pipeline
    from framework.layers.group import Alone

    given = [f'model.path="{pipeline}"', "model.kind=diffusion", "job=plan", "runtime.vae_tiling=true"]
    plan = make_plan(open_checked(compose(["recipe=llm/local", *given])), "cpu")
    vae = load_pipeline(plan, Alone(), lambda done, total: None).pipeline.vae
    assert vae.use_tiling and not vae.use_slicing


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize(("word", "shift"), [("flow_match_euler", None), ("unipc", 8.0)])
def test_another_scheduler_draws_what_diffusers_does_with_it(warm_session, pipeline, settings, plain, word, shift):
    import diffusers

    name, changes = settle(describe_pipeline(pipeline), {"scheduler": word, "flow_shift": shift}).scheduler
    given = [f'model.path="{pipeline}"', "model.kind=diffusion", "job=plan", "runtime.dtype=float32"]
    plan = make_plan(open_checked(compose(["recipe=llm/local", *given])), "cpu")
    warm_session.load(plan, loader=LOADER)
    made = list(warm_session.stream("render", [(settings | {"scheduler": (name, changes)}, 42)]))[-1]
    scheduler = {
        "flow_match_euler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),  # the shipped one's shift
        "unipc": diffusers.UniPCMultistepScheduler.from_config(plain.scheduler.config, flow_shift=8.0),
    }[word]
    shipped, plain.scheduler = plain.scheduler, scheduler
    with torch.inference_mode():
        wanted = plain(**settings, generator=torch.Generator().manual_seed(42), output_type="latent").frames
    plain.scheduler = shipped
    assert np.abs(made["latents"] - wanted.numpy()).max() <= 1e-3
    usual = np.load(WAN / "reference.npz")["final_latents"]
    assert np.abs(made["latents"] - usual).max() > 0.05
    again = list(warm_session.stream("render", [(settings, 42)]))[-1]["latents"]
    assert np.abs(again - usual).max() <= 1e-3  # nothing is left behind


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("tp_size", [1, 2])
def test_steps_are_reused_as_diffusers_reuses_them_and_forgotten_after(
    warm_session, pipeline, settings, plain, tp_size
):
    from diffusers.hooks import FirstBlockCacheConfig

    sizes = ["runtime.dtype=float32", f"parallel.tp_size={tp_size}"]
    given = [f'model.path="{pipeline}"', "model.kind=diffusion", "job=plan", *sizes]
    plan = make_plan(open_checked(compose(["recipe=llm/local", *given])), "cpu")
    warm_session.load(plan, loader=LOADER)
    cached = list(warm_session.stream("render", [(settings | {"cache_threshold": 0.5}, 42)]))[-1]
    assert int(cached["reused"]) > 0
    transformers = (plain.transformer, plain.transformer_2)
    for transformer in transformers:
        transformer.enable_cache(FirstBlockCacheConfig(0.5))
    try:
        with torch.inference_mode():
            theirs = plain(**settings, generator=torch.Generator().manual_seed(42), output_type="np").frames[0]
    finally:
        for transformer in transformers:
            transformer.disable_cache()
    assert np.abs(cached["frames"] / 255 - theirs).max() <= 2e-3 + 0.5 / 255
    whole = list(warm_session.stream("render", [(settings, 42)]))[-1]
    assert int(whole["reused"]) == 0
    assert np.abs(whole["latents"] - np.load(WAN / "reference.npz")["final_latents"]).max() <= 1e-3
    assert np.abs(whole["latents"] - cached["latents"]).max() > 1e-3
