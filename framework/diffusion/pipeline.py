"""A diffusers pipeline on one rank, its transformers ours. The loop, the schedulers and the rest are diffusers'."""

from __future__ import annotations

import inspect
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from framework.checkpoint.index import Index
from framework.checkpoint.reader import Reader
from framework.diffusion.cache import first_block_cache
from framework.diffusion.encoding import TEXT
from framework.diffusion.experts import one_at_a_time
from framework.diffusion.guidance import share_guidance
from framework.diffusion.parts import build_pipeline, device_of
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
Settings = Mapping[str, Any]  # arguments of the pipeline's call; `scheduler`: a class and what differs from its config


def load_pipeline(plan: Plan, group: Group, progress: Progress) -> LoadedPipeline:
    """Build this rank's transformers and the pipeline around them; prompts come to it as embeddings.

    Raises:
        UserError: the checkpoint changed or broke since it was checked.
    """
    ensure_registered(plan.runtime.device)
    root = Path(plan.checkpoint)
    described = describe_pipeline(root)
    indexes = {k: replace(index, options=plan.options) for k, index in open_indexes(root, "diffusion").items()}
    groups = {axis: group.split(plan.layout.groups(axis)) for axis in ("tp", "ulysses", "cfg", "data")}
    build = {
        prefix.rstrip("."): partial(_transformer, plan, prefix, index, groups, described.class_name, progress)
        for prefix, index in indexes.items()
    }
    text = {part.name: None for part in described.components if part.name.startswith(TEXT)}
    if plan.runtime.offload == "experts" and len(build) > 1:
        experts = one_at_a_time(build)
        pipeline = build_pipeline(plan, {**dict.fromkeys(build), **text})
        for name, expert in experts.items():
            setattr(pipeline, name, expert)
        held = max(_held(expert.fetch()) for expert in reversed(experts.values()))
    else:
        transformers = {name: make() for name, make in build.items()}
        pipeline = build_pipeline(plan, {**transformers, **text})
        held = sum(map(_held, transformers.values()))
    if plan.runtime.vae_tiling:
        pipeline.vae.enable_tiling()
    if plan.runtime.vae_slicing:
        pipeline.vae.enable_slicing()
    return LoadedPipeline(pipeline, groups["data"], held)


def _transformer(
    plan: Plan, prefix: str, index: Index, groups: Mapping[str, Group], pipeline: str, progress: Progress
) -> nn.Module:
    """Return this rank's part of a transformer, with what the layout's axes need."""
    (form,) = {planned.format for planned in plan.modules if planned.name.startswith(prefix)}
    with Reader() as reader, torch.inference_mode():
        device = device_of(plan)
        model = build_transformer(plan, prefix, index, reader, decoder(form), groups["tp"], device, progress)
    if groups["ulysses"].size > 1:
        deal_tokens(model, TOKENS[plan.transformers[prefix].class_name], groups["ulysses"])
    if groups["cfg"].size > 1:
        share_guidance(model, GUIDED[pipeline], groups["cfg"])
    return model


def _held(model: nn.Module) -> int:
    """Bytes of a transformer: ours and diffusers' tensors."""
    ours = sum(m.inner.nbytes for m in model.modules() if hasattr(m, "inner"))
    return ours + sum(p.nbytes for p in model.parameters())


class LoadedPipeline:
    """One rank's pipeline. Every rank runs the whole loop; ranks of one copy on the same noise.

    `data` are the ranks in this one's place in each copy.
    """

    def __init__(self, pipeline: Any, data: Group, held: int) -> None:  # noqa: ANN401
        self.pipeline, self.data, self._held = pipeline, data, held
        self._shipped = pipeline.scheduler
        self._takes = inspect.signature(pipeline.__call__).parameters

    def bytes_held(self) -> int:
        """Bytes of the transformers' weights, the most at a time."""
        return self._held

    def render(self, wanted: Sequence[tuple[Settings, int]], exact: bool = False) -> Iterator[dict[str, Any]]:
        """Draw outputs, each of settings and a seed, one on each copy of the model.

        Yields {"step": i, "steps": n} after each step, then for every output, in order,
        {"frames": uint8 [F, H, W, 3] (exact: fp32, 0 to 1), "latents": fp32}. Noise is drawn on the CPU, from the seed.
        """
        events: queue.SimpleQueue[dict[str, Any] | BaseException | None] = queue.SimpleQueue()

        def work() -> None:
            try:
                with torch.inference_mode():
                    # a copy that is left over draws the last one again
                    settings, seed = wanted[min(self.data.rank, len(wanted) - 1)]
                    own = self._run(settings, seed, exact, events.put)
                    whole = {
                        name: self.data.all_gather(values[None], [1] * self.data.size, dim=0).numpy()
                        for name, values in own.items()
                    }
                for at in range(len(wanted)):
                    events.put({name: values[at] for name, values in whole.items()})
                events.put(None)
            except BaseException as error:  # noqa: BLE001 -- raised again by the generator
                events.put(error)

        threading.Thread(target=work, daemon=True).start()
        while True:
            event = events.get()
            if isinstance(event, BaseException):
                raise event
            if event is None:
                return
            yield event

    def _run(
        self, settings: Settings, seed: int, exact: bool, report: Callable[[dict[str, Any]], None]
    ) -> dict[str, Tensor]:
        given = dict(settings)
        with first_block_cache(self.pipeline, given.pop("cache_threshold", None)) as reused:
            return self._call(given, seed, exact, report) | {"reused": torch.tensor(reused())}

    def _call(
        self, given: dict[str, Any], seed: int, exact: bool, report: Callable[[dict[str, Any]], None]
    ) -> dict[str, Tensor]:
        scheduler = self.pipeline.scheduler = _scheduler(self._shipped, given.pop("scheduler", None))
        latents: list[Tensor] = []
        done = count(1)

        def heard(values: Tensor) -> None:
            latents[:] = [values]
            report({"step": next(done), "steps": len(scheduler.timesteps)})

        if "callback_on_step_end" in self._takes:
            given["callback_on_step_end"] = lambda pipeline, i, t, values: heard(values["latents"]) or values
        else:  # DiT's; where there are two predictions, its latents stand twice
            _watch(scheduler, lambda values: heard(values[: len(given["class_labels"])]))
        out = self.pipeline(**given, generator=torch.Generator("cpu").manual_seed(seed), output_type="np")
        made = torch.from_numpy(np.asarray(out.frames if hasattr(out, "frames") else out.images))
        frames = made[0] if made.ndim == 5 else made
        frames = frames.float() if exact else (frames * 255).round().clamp(0, 255).to(torch.uint8)
        return {"frames": frames, "latents": latents[0].float().cpu()}


def _scheduler(shipped: Any, other: tuple[str, Mapping[str, Any]] | None) -> Any:  # noqa: ANN401
    """Return a new scheduler, of the shipped one's config: multistep ones remember their steps."""
    import diffusers

    kind, changes = (getattr(diffusers, other[0]), other[1]) if other else (type(shipped), {})
    return kind.from_config(shipped.config, **changes)


def _watch(scheduler: Any, heard: Callable[[Tensor], None]) -> None:  # noqa: ANN401
    step = scheduler.step

    def watched(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        out = step(*args, **kwargs)
        heard(out.prev_sample)
        return out

    scheduler.step = watched
