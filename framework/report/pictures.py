"""Pictures and videos as files."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

ROW = 10  # pictures of a grid, side by side


def save_pictures(frames: Any, stem: Path) -> list[Path]:  # noqa: ANN401
    """Write uint8 [F, H, W, 3] as PNG files (`stem.png`, or `stem-000.png`, ...)."""
    from PIL import Image

    paths = [stem.with_suffix(".png")] if len(frames) == 1 else [
        stem.with_name(f"{stem.name}-{i:03d}.png") for i in range(len(frames))
    ]  # fmt: skip
    for frame, path in zip(frames, paths, strict=True):
        Image.fromarray(frame).save(path)
    return paths


def save_video(frames: Any, stem: Path, fps: int) -> list[Path]:  # noqa: ANN401
    """Write a video as MP4 where imageio-ffmpeg is installed, else its frames as PNG files."""
    if importlib.util.find_spec("imageio_ffmpeg") is None or importlib.util.find_spec("imageio") is None:
        return save_pictures(frames, stem)
    import imageio

    path = stem.with_suffix(".mp4")
    with imageio.get_writer(path, fps=fps, macro_block_size=1) as writer:
        for frame in frames:
            writer.append_data(frame)
    return [path]


def save_grid(pictures: list[Any], path: Path) -> None:
    """Write pictures [H, W, 3] of one size side by side."""
    from PIL import Image

    height, width = pictures[0].shape[:2]
    rows = -(-len(pictures) // ROW)
    grid = Image.new("RGB", (width * min(ROW, len(pictures)), height * rows))
    for i, picture in enumerate(pictures):
        grid.paste(Image.fromarray(picture), (width * (i % ROW), height * (i // ROW)))
    grid.save(path)
