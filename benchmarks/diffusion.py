"""Seconds a denoising step of a Wan pipeline with random weights: ours, float on one rank, against plain diffusers.

Both pipelines are in this process and take turns, a few steps each, so that a shared machine disturbs both alike; the
ratio of the medians of a step means something, seconds do not. Latents are compared: the work is the same.

    python benchmarks/diffusion.py --dtype float32 --threads 1
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

SIZES = {"num_attention_heads": 8, "attention_head_dim": 64, "ffn_dim": 1536, "num_layers": 6, "text_dim": 256}
TEXT_TOKENS = 64


def write(folder: Path, dtype: Any) -> None:  # noqa: ANN401
    """Write a pipeline of one expert, without text encoder."""
    from framework.ops.register import ensure_registered

    ensure_registered("cpu")  # before diffusers looks for torch_npu
    import diffusers
    import torch

    torch.manual_seed(0)
    model = diffusers.WanTransformer3DModel(**SIZES, in_channels=16, out_channels=16, freq_dim=64).to(dtype)
    model.save_pretrained(folder / "transformer")
    vae = diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    vae.save_pretrained(folder / "vae")
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.save_pretrained(folder / "scheduler")
    classes = {"transformer": model, "vae": vae, "scheduler": scheduler}
    index = {name: ["diffusers", type(part).__name__] for name, part in classes.items()}
    text = {"text_encoder": ["transformers", "UMT5EncoderModel"], "tokenizer": ["transformers", "T5TokenizerFast"]}
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **index, **text}))


def ours(folder: Path, dtype: str) -> Any:  # noqa: ANN401
    """The pipeline as a rank loads it."""
    from framework.diffusion.pipeline import load_pipeline
    from framework.jobs.common import open_checked
    from framework.layers.group import Alone
    from framework.planning.make import make_plan
    from framework.recipe.compose import compose

    recipe = compose(["recipe=diffusion/local", f"model.path={folder}", f"runtime.dtype={dtype}", "job=plan"])
    return load_pipeline(make_plan(open_checked(recipe), "cpu"), Alone(), lambda done, total: None).pipeline


def plain(folder: Path, dtype: Any) -> Any:  # noqa: ANN401
    """The pipeline as diffusers loads it; its transformer by hand, which needs no accelerate."""
    import diffusers
    from safetensors.torch import load_file

    config = diffusers.WanTransformer3DModel.load_config(folder / "transformer")
    model = diffusers.WanTransformer3DModel.from_config(config).eval().to(dtype)
    model.load_state_dict(load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors"))
    for name, module in model.named_modules():  # as from_pretrained keeps them
        if not set(model._keep_in_fp32_modules).isdisjoint(name.split(".")):
            module.float()
    for name, parameter in model.named_parameters():
        if not set(model._keep_in_fp32_modules).isdisjoint(name.split(".")):
            parameter.data = parameter.data.float()
    made = diffusers.WanPipeline.from_pretrained(
        folder, transformer=model, text_encoder=None, tokenizer=None, dtype=dtype, local_files_only=True
    )
    made.set_progress_bar_config(disable=True)
    return made


def seconds_a_step(pipeline: Any, steps: int, frames: int) -> tuple[list[float], Any]:  # noqa: ANN401
    """Run `steps` steps of two predictions; return their seconds without the first, and the latents."""
    import torch

    torch.manual_seed(1)
    text = torch.randn(2, 1, TEXT_TOKENS, SIZES["text_dim"], dtype=pipeline.transformer.dtype)
    ends: list[float] = []

    def ended(pipeline: Any, step: int, time_step: Any, values: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
        ends.append(time.perf_counter())
        return values

    with torch.inference_mode():
        latents = pipeline(
            prompt_embeds=text[0], negative_prompt_embeds=text[1], height=256, width=320, num_frames=frames,
            num_inference_steps=steps, guidance_scale=4.0, generator=torch.Generator().manual_seed(0),
            output_type="latent", callback_on_step_end=ended,
        ).frames  # fmt: skip
    return [b - a for a, b in itertools.pairwise(ends)], latents


def main() -> None:
    """Print one JSON line."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--frames", type=int, default=13)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    dtype = getattr(torch, given.dtype)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write(folder, dtype)
        pipelines = {"ours": ours(folder, given.dtype), "plain": plain(folder, dtype)}
        taken: dict[str, list[float]] = {name: [] for name in pipelines}
        latents = {}
        for turn in range(given.rounds):
            for which in list(pipelines) if turn % 2 else list(reversed(pipelines)):
                seconds, latents[which] = seconds_a_step(pipelines[which], given.steps, given.frames)
                taken[which] += seconds
    medians = {which: statistics.median(seconds) for which, seconds in taken.items()}
    apart = (latents["ours"] - latents["plain"]).abs().max().item()
    print(
        json.dumps(
            {
                "dtype": given.dtype,
                "threads": given.threads,
                "steps": len(taken["ours"]),
                "seconds_a_step": {which: round(value, 4) for which, value in medians.items()},
                "fastest": {which: round(min(seconds), 4) for which, seconds in taken.items()},
                "ratio": round(medians["ours"] / medians["plain"], 4),
                "ratio_of_fastest": round(min(taken["ours"]) / min(taken["plain"]), 4),
                "latents_max_abs": apart,
            }
        )
    )


if __name__ == "__main__":
    main()
