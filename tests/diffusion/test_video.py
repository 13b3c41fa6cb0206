"""A Wan 2.2 pipeline over ranks draws what plain diffusers draws, in every layout."""

import numpy as np
import pytest
import torch

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
def drawn(pipeline, settings):
    """Frames by plain diffusers; its transformers by hand: its own loader of them needs accelerate."""
    import diffusers
    from safetensors.torch import load_file

    transformers = {}
    for name in ("transformer", "transformer_2"):
        config = diffusers.WanTransformer3DModel.load_config(pipeline / name)
        transformers[name] = diffusers.WanTransformer3DModel.from_config(config).eval()
        transformers[name].load_state_dict(load_file(pipeline / name / "diffusion_pytorch_model.safetensors"))
    plain = diffusers.WanPipeline.from_pretrained(pipeline, **transformers, dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
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
