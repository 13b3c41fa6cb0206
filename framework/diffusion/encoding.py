"""Prompts to embeddings: the text encoders run once, on one rank, before the transformers are loaded, and go."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framework.diffusion.parts import build_pipeline
from framework.families.pipeline import describe_pipeline
from framework.layers.group import Group
from framework.ops.register import ensure_registered
from framework.planning.plan import Plan

TEXT = ("text_encoder", "tokenizer")  # how the names of components begin that only prompts need


@dataclass(frozen=True, slots=True)
class Encodes:
    """What a pipeline's `encode_prompt` returns, by the arguments of its call ("": none).

    `together`: it makes the embeddings of the negative prompt in the same call.
    """

    returns: tuple[str, ...]
    together: bool = False
    given: Mapping[str, Any] | None = None


ENCODES = {
    "WanPipeline": Encodes(("prompt_embeds", "negative_prompt_embeds"), together=True),
    "WanImageToVideoPipeline": Encodes(("prompt_embeds", "negative_prompt_embeds"), together=True),
    "StableDiffusion3Pipeline": Encodes(
        ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds"),
        together=True,
        given={"prompt_2": None, "prompt_3": None},
    ),
    "FluxPipeline": Encodes(("prompt_embeds", "pooled_prompt_embeds", "")),
    "QwenImagePipeline": Encodes(("prompt_embeds", "prompt_embeds_mask")),
}


def load_encoders(plan: Plan, group: Group, progress: Any) -> LoadedEncoders:  # noqa: ANN401
    """Load the text encoders on rank 0; the others hold nothing."""
    ensure_registered(plan.runtime.device)
    described = describe_pipeline(Path(plan.checkpoint))
    if group.rank:
        return LoadedEncoders(None, described.class_name)
    left_out = {part.name: None for part in described.components if not part.name.startswith(TEXT)}
    return LoadedEncoders(build_pipeline(plan, left_out), described.class_name)


class LoadedEncoders:
    """A pipeline of nothing but its text encoders."""

    def __init__(self, pipeline: Any, class_name: str) -> None:  # noqa: ANN401
        self.pipeline, self.encodes = pipeline, ENCODES[class_name]
        # the call's own length: encode_prompt's default is another, and what pads a prompt is attended to
        call = inspect.signature(type(pipeline).__call__).parameters if pipeline is not None else {}
        self._length = {name: call[name].default for name in ("max_sequence_length",) if name in call}

    def encode(self, wanted: Sequence[Mapping[str, Any]]) -> list[dict[str, Tensor]]:
        """Return the embeddings of each prompt as arguments of the pipeline's call: on rank 0, on the CPU.

        Each of `wanted` has `prompt` and may have `negative_prompt` and `max_sequence_length`.
        """
        return [self._encode(**one) for one in wanted] if self.pipeline is not None else []

    def _encode(self, prompt: str, negative_prompt: str | None = None, **more: Any) -> dict[str, Tensor]:  # noqa: ANN401
        together = {"negative_prompt": negative_prompt} if self.encodes.together else {}
        found = self._call(prompt, "", {**together, **more})
        if not self.encodes.together and negative_prompt is not None:
            found |= self._call(negative_prompt, "negative_", more)
        return found

    def _call(self, prompt: str, before: str, more: Mapping[str, Any]) -> dict[str, Tensor]:
        with torch.inference_mode():
            given = {**self._length, **(self.encodes.given or {}), **more}
            made = self.pipeline.encode_prompt(prompt=prompt, **given)
        pairs = zip(self.encodes.returns, made, strict=True)
        return {before + name: values.clone().cpu() for name, values in pairs if name and values is not None}
