"""A diffusers pipeline on one rank, its transformers ours. The loop, the schedulers and the rest are diffusers'."""

from __future__ import annotations

import inspect
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from framework.checkpoint.reader import Reader
from framework.diffusion.guidance import share_guidance
from framework.diffusion.sequence import deal_tokens
from framework.diffusion.transformer import build_transformer
from framework.families.guided import GUIDED
from framework.families.pipeline import describe_pipeline
from framework.families.tokens import TOKENS
from framework.formats.registry import decoder
from framework.layers.group import Group
from framework.ops.register import ensure_registered
from framework.planning.parts import open_indexes
from framework.planning.plan import Plan

Progress = Callable[[int, int], None]


def load_pipeline(plan: Plan, group: Group, progress: Progress) -> LoadedPipeline:
    """Build this rank's transformers and the pipeline around them.

    Raises:
        UserError: the checkpoint changed or broke since it was checked.
    """
    import diffusers

    ensure_registered(plan.runtime.device)
    device = torch.device("cpu" if plan.runtime.device == "cpu" else "npu:0")
    root = Path(plan.checkpoint)
    indexes = {k: replace(index, options=plan.options) for k, index in open_indexes(root, "diffusion").items()}
    formats = {planned.name.split(".", 1)[0] + ".": planned.format for planned in plan.modules}
    dtype = getattr(torch, plan.runtime.dtype)
    described, layout = describe_pipeline(root), plan.layout
    tp, ulysses, cfg = (group.split(layout.groups(axis)) for axis in ("tp", "ulysses", "cfg"))
    with Reader() as reader, torch.inference_mode():
        transformers = {
            prefix.rstrip("."): build_transformer(
                plan, prefix, index, reader, decoder(formats[prefix]), tp, device, progress
            )
            for prefix, index in indexes.items()
        }
    for prefix, spec in plan.transformers.items():
        model = transformers[prefix.rstrip(".")]
        if ulysses.size > 1:
            deal_tokens(model, TOKENS[spec.class_name], ulysses)
        if cfg.size > 1:
            share_guidance(model, GUIDED[described.class_name], cfg)
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    pipeline_class = getattr(diffusers, described.class_name)
    pipeline = pipeline_class.from_pretrained(
        root, **transformers, dtype=dtype, local_files_only=True, use_safetensors=True
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return LoadedPipeline(pipeline, group, sum(_held(model) for model in transformers.values()))


def _held(model: torch.nn.Module) -> int:
    """Bytes of a transformer: ours and diffusers' tensors."""
    ours = sum(m.inner.nbytes for m in model.modules() if hasattr(m, "inner"))
    return ours + sum(p.nbytes for p in model.parameters())


class LoadedPipeline:
    """One rank's pipeline. Every rank runs the whole loop on the same noise; rank 0's pictures are the result."""

    def __init__(self, pipeline: Any, group: Group, held: int) -> None:  # noqa: ANN401
        self.pipeline, self.group, self._held = pipeline, group, held
        self._takes = inspect.signature(pipeline.__call__).parameters

    def bytes_held(self) -> int:
        """Bytes of the transformers' weights."""
        return self._held

    def takes(self) -> list[str]:
        """Return the settings that this pipeline's call has."""
        return list(self._takes)

    def render(self, settings: Mapping[str, Any], seed: int) -> Iterator[dict[str, Any]]:
        """Yield {"step": i} after each step, at last {"frames": uint8 [F, H, W, 3], "latents": fp32}.

        `settings` are arguments of the pipeline's call. The noise is drawn on the CPU, from the seed.
        """
        events: queue.SimpleQueue[dict[str, Any] | BaseException] = queue.SimpleQueue()

        def work() -> None:
            try:
                with torch.inference_mode():
                    events.put(self._run(settings, seed, events.put))
            except BaseException as error:  # noqa: BLE001 -- raised again by the generator
                events.put(error)

        threading.Thread(target=work, daemon=True).start()
        while True:
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            yield event
            if "frames" in event:
                return

    def _run(self, settings: Mapping[str, Any], seed: int, report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
        given = dict(settings)
        latents: list[Tensor] = []

        def on_step(pipeline: Any, step: int, time: Any, values: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
            latents[:] = [values["latents"]]
            report({"step": step + 1})
            return values

        if "callback_on_step_end" in self._takes:
            given["callback_on_step_end"] = on_step
        generator = torch.Generator("cpu").manual_seed(seed)
        out = self.pipeline(**given, generator=generator, output_type="np")
        made = np.asarray(out.frames if hasattr(out, "frames") else out.images)
        frames = made[0] if made.ndim == 5 else made
        final = latents[0].float().cpu().numpy() if latents else None
        return {"frames": np.round(frames * 255).clip(0, 255).astype(np.uint8), "latents": final}
