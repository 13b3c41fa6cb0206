"""Pictures for `/v1/images/generations`: one pipeline draws what waits, one after the other, a copy of it each its own.

A pipeline has no running batch to join, so what a replica's session streams is made here, in the driver: between two
pictures it looks at what came and what was given up.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from framework.engine.inbox import Inbox
from framework.engine.request import Load
from framework.families.calls import TEXT, embedded
from framework.serving.protocol import ApiError, AskedPictures

LOOK_S = 5.0  # between looks at ranks that have nothing to do


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture to draw: arguments of the pipeline's call, and the seed of its noise."""

    index: int
    arguments: Mapping[str, Any]
    seed: int


@dataclass(frozen=True, slots=True)
class Drawn:
    """The end of a request: the picture as a PNG file."""

    index: int
    png: bytes


@dataclass(frozen=True, slots=True)
class PictureModel:
    """What the endpoint serves.

    Attributes:
        id: the model's name in the API.
        settle: settings in a recipe's words to arguments of the pipeline's call; raises ApiError.
        labels: classes by number, of a model that draws classes; empty: it draws prompts.
        max_pixels: height times width, at most.
    """

    id: str
    settle: Callable[[Mapping[str, Any]], Mapping[str, Any]]
    labels: Mapping[int, str]
    max_pixels: int


def pictures_of(asked: AskedPictures, model: PictureModel) -> list[Picture]:
    """Return a request per picture, numbered from 0; each has the next seed.

    Raises:
        ApiError: 404 another model; 400 what the pipeline does not draw.
    """
    if asked.model not in (None, model.id):
        raise ApiError(404, f"the model `{asked.model}` is not here, `{model.id}` is", "model_not_found", param="model")
    if asked.settings.get("height", 0) * asked.settings.get("width", 0) > model.max_pixels:
        why = f"a picture has at most {model.max_pixels} pixels here (job.max_pixels)"
        raise ApiError(400, why, "invalid_value", param="size")
    if model.labels:
        label = _label(asked.prompt, model.labels)
        arguments = {**model.settle({**asked.settings, "labels": [label]}), "class_labels": [label]}
    else:
        arguments = {**model.settle({**asked.settings, "prompts": [asked.prompt]}), "prompt": asked.prompt}
    return [Picture(i, arguments, asked.seed + i) for i in range(asked.count)]


def _label(prompt: str, labels: Mapping[int, str]) -> int:
    """Return the class that a prompt names by its number, or by one of its names."""
    wanted = prompt.strip().casefold()
    for number, names in labels.items():
        if wanted in (str(number), names.casefold(), *(name.strip().casefold() for name in names.split(","))):
            return number
    shown = ", ".join(list(labels.values())[:10])
    more = f", ... ({len(labels)} in all)" if len(labels) > 10 else ""
    raise ApiError(
        400, f"this model draws classes; `prompt` has to be one of {shown}{more}", "invalid_value", param="prompt"
    )


class Drawers(Protocol):
    """What is needed of the cluster's session, loaded with diffusion.serving."""

    def stream(self, method: str, *args: Any) -> Iterator[Any]:  # noqa: ANN401
        """Run a generator on all ranks; rank 0's items."""
        ...

    def call(self, method: str, *args: Any) -> list[Any]:  # noqa: ANN401
        """Run a method on all ranks; their results."""
        ...

    def alive(self, timeout_s: float) -> bool:
        """Whether every rank answers."""
        ...


class PictureSession:
    """A replica's session (replicas.Session) over ranks that draw, `copies` pictures at a time."""

    def __init__(self, session: Drawers, copies: int) -> None:
        self._session, self._copies = session, copies
        self._inbox = Inbox()

    def stream(self, method: str, *args: object) -> Iterator[list[Load | Drawn]]:
        """Draw what is posted, until told to end."""
        try:
            yield from self._drawn()
        finally:
            self._inbox = Inbox()

    def _drawn(self) -> Iterator[list[Load | Drawn]]:
        waiting: dict[int, Picture] = {}
        load = Load(0, 0, 0)
        while True:
            orders, end = self._inbox.take(0.0 if waiting else LOOK_S)
            if end:
                return
            for order in orders:
                waiting |= {picture.index: picture for picture in order.requests}  # type: ignore[misc]
                for index in order.cancelled:
                    waiting.pop(index, None)
            batch = [waiting.pop(index) for index in list(waiting)[: self._copies]]
            if (now := Load(len(batch), len(waiting), 0)) != load:
                yield [load := now]
            if batch:
                drawn = self._draw(batch)
                yield [*drawn, load := Load(0, len(waiting), 0)]
            elif not orders:
                self._session.call("bytes_held")  # a rank that died while none was at work

    def tell(self, method: str, *args: Any) -> None:  # noqa: ANN401
        """Take orders, or the end."""
        if method == "end":
            self._inbox.close()
        else:
            self._inbox.put(args[0])

    def alive(self, timeout_s: float) -> bool:
        """See replicas.Session."""
        return self._session.alive(timeout_s)

    def _draw(self, batch: Sequence[Picture]) -> list[Load | Drawn]:
        outputs = [(self._encoded(picture.arguments), picture.seed) for picture in batch]
        drawn = [event["frames"][0] for event in self._session.stream("render", outputs) if "frames" in event]
        return [Drawn(picture.index, _png(frame)) for picture, frame in zip(batch, drawn, strict=True)]

    def _encoded(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        text = {name: arguments[name] for name in TEXT if name in arguments}
        if "prompt" not in text:
            return dict(arguments)
        return embedded(arguments, self._session.call("encode", [text])[0][0])


def _png(frame: Any) -> bytes:  # noqa: ANN401
    """Uint8 [H, W, 3] as a PNG file."""
    import numpy as np
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(np.asarray(frame)).save(file, "PNG")
    return file.getvalue()
