"""A pipeline that stays and its text encoders with it, for prompts that come one by one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from framework.diffusion.encoding import ENCODES, LoadedEncoders, load_encoders
from framework.diffusion.pipeline import LoadedPipeline, Progress, Settings, load_pipeline
from framework.families.pipeline import describe_pipeline
from framework.layers.group import Group
from framework.planning.plan import Plan


def load_drawer(plan: Plan, group: Group, progress: Progress) -> LoadedDrawer:
    """Load this rank's transformers, and on rank 0 the text encoders of a pipeline that takes prompts.

    Raises:
        UserError: as load_pipeline.
    """
    encodes = describe_pipeline(Path(plan.checkpoint)).class_name in ENCODES
    encoders = load_encoders(plan, group, progress) if encodes else None
    return LoadedDrawer(load_pipeline(plan, group, progress), encoders)


class LoadedDrawer:
    """See LoadedPipeline and LoadedEncoders."""

    def __init__(self, pipeline: LoadedPipeline, encoders: LoadedEncoders | None) -> None:
        self._pipeline, self._encoders = pipeline, encoders

    def bytes_held(self) -> int:
        """Bytes of the transformers' weights."""
        return self._pipeline.bytes_held()

    def encode(self, wanted: Sequence[Mapping[str, Any]]) -> list[dict[str, Tensor]]:
        """Return the embeddings of prompts, on rank 0."""
        return self._encoders.encode(wanted) if self._encoders else []

    def render(self, wanted: Sequence[tuple[Settings, int]]) -> Iterator[dict[str, Any]]:
        """Draw outputs, each of settings and a seed."""
        yield from self._pipeline.render(wanted)
