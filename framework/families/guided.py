"""Pipelines of diffusers whose steps combine two predictions, with and without the prompt, by guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Guided:
    """How a pipeline makes the two predictions: in two calls of a transformer, or in one of both, side by side.

    It does so where the setting `word` is above 1, and, if `needs_negative`, a negative prompt is given. `default` is
    the pipeline's own guidance.
    """

    passes: Literal["calls", "batch"]
    default: float
    word: str = "guidance"
    needs_negative: bool = False

    def off(self, settings: Mapping[str, Any]) -> str:
        """Return why a job's settings leave only one prediction; empty: they do not."""
        given = settings.get(self.word)
        scale = self.default if given is None else float(given)
        if scale <= 1:
            return f"job.{self.word} is {scale:g}, and a second prediction is made above 1 only"
        if self.needs_negative and not settings.get("negative_prompt"):
            return "a second prediction is made for a negative prompt only, and job.negative_prompt is empty"
        return ""


# Defaults are those of diffusers 0.42's calls; a test holds them against the classes.
GUIDED = {
    "WanPipeline": Guided("calls", 5.0),
    "WanImageToVideoPipeline": Guided("calls", 5.0),
    "DiTPipeline": Guided("batch", 4.0),
    "StableDiffusion3Pipeline": Guided("batch", 7.0),
    "FluxPipeline": Guided("calls", 1.0, "true_guidance", needs_negative=True),
    "QwenImagePipeline": Guided("calls", 4.0, needs_negative=True),
}
