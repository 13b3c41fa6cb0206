"""Pictures and videos as files, each with its story inside: how it was drawn, as JSON."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from framework.recipe.secrets import mask_secrets

ROW = 10  # pictures of a grid, side by side
KEY = "npu-launch"  # of the text chunk of a PNG; an MP4 has it as its comment
NO_ENCODER = "imageio-ffmpeg is not installed: frames are written as PNG files (pip install 'npu-launch[video]')"


def save_pictures(frames: Any, stem: Path, story: Mapping[str, Any]) -> list[Path]:  # noqa: ANN401
    """Write uint8 [F, H, W, 3] as PNG files (`stem.png`, or `stem-000.png`, ...), the story in a text chunk."""
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    chunks = PngInfo()
    chunks.add_itxt(KEY, _text(story))
    paths = [stem.with_suffix(".png")] if len(frames) == 1 else [
        stem.with_name(f"{stem.name}-{i:03d}.png") for i in range(len(frames))
    ]  # fmt: skip
    for frame, path in zip(frames, paths, strict=True):
        Image.fromarray(frame).save(path, pnginfo=chunks)
    return paths


def save_video(frames: Any, stem: Path, fps: int, story: Mapping[str, Any]) -> tuple[list[Path], str]:  # noqa: ANN401
    """Write a video [F, H, W, 3] as MP4, the story as its comment; without an encoder its frames, and say so."""
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        return save_pictures(frames, stem, story), NO_ENCODER
    from imageio_ffmpeg import write_frames

    path = stem.with_suffix(".mp4")
    _, height, width, _ = frames.shape
    comment = ["-metadata", f"comment={_text(story)}"]
    writer = write_frames(str(path), (width, height), fps=fps, quality=8, macro_block_size=2, output_params=comment)
    writer.send(None)
    for frame in frames:
        writer.send(frame.tobytes())
    writer.close()
    return [path], ""


def save_grid(pictures: list[Any], path: Path) -> None:
    """Write pictures [H, W, 3] of one size side by side."""
    from PIL import Image

    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // ROW)
    grid = Image.new("RGB", (width * min(ROW, len(pictures)), height * rows))
    for i, picture in enumerate(pictures):
        grid.paste(Image.fromarray(picture), (width * (i % ROW), height * (i // ROW)))
    grid.save(path)


def _text(story: Mapping[str, Any]) -> str:
    return mask_secrets(json.dumps(story, ensure_ascii=False))
