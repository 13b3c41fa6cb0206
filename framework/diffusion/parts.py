"""The parts of a diffusers pipeline that stay diffusers': everything but its transformers."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from framework.families.pipeline import describe_pipeline
from framework.planning.plan import Plan


def device_of(plan: Plan) -> torch.device:
    """The one device of a rank."""
    return torch.device("cpu" if plan.runtime.device == "cpu" else "npu:0")


def build_pipeline(plan: Plan, given: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Return the plan's pipeline; components that are given (None: left out) are not loaded."""
    import diffusers
    import transformers

    root = Path(plan.checkpoint)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    pipeline = getattr(diffusers, describe_pipeline(root).class_name).from_pretrained(
        root, **given, dtype=getattr(torch, plan.runtime.dtype), local_files_only=True, use_safetensors=True
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device_of(plan))
