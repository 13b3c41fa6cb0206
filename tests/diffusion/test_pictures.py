"""What a picture or a video keeps of how it was drawn."""

import json
import subprocess

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from framework.report import pictures

STORY = {"prompt": 'a "fox" = ümlaut; 狐\n#2 \\', "seed": 7, "settings": {"height": 32}}


@pytest.fixture
def frames():
    """A square that moves."""
    made = np.zeros((9, 32, 48, 3), np.uint8)
    for i, frame in enumerate(made):
        frame[8:16, 4 * i : 4 * i + 8] = (200, 40, 40)
    return made


def ffmpeg(path, *to):
    given = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-i", str(path), *to]
    return subprocess.run(given, capture_output=True, check=True).stdout


def test_a_png_has_its_story_in_a_text_chunk(tmp_path, frames):
    (path,) = pictures.save_pictures(frames[:1], tmp_path / "one", STORY)
    with Image.open(path) as read:
        assert json.loads(read.text[pictures.KEY]) == STORY
        assert np.array_equal(np.asarray(read), frames[0])


def test_an_mp4_has_its_frames_and_its_story_as_comment(tmp_path, frames):
    (path,), note = pictures.save_video(frames, tmp_path / "clip", 8, STORY)
    assert path.name == "clip.mp4" and not note
    raw = ffmpeg(path, "-f", "rawvideo", "-pix_fmt", "rgb24", "-")
    read = np.frombuffer(raw, np.uint8).reshape(9, 32, 48, 3)
    assert np.abs(read.astype(int) - frames).mean() < 6
    said = ffmpeg(path, "-f", "ffmetadata", "-").decode()
    comment = said.partition("comment=")[2].partition("\nencoder=")[0]
    unescaped = comment.replace("\\\n", "\n")
    for character in "=;#\\":
        unescaped = unescaped.replace(f"\\{character}", character)
    assert json.loads(unescaped.strip()) == STORY


def test_without_an_encoder_frames_are_pngs_and_it_is_said(tmp_path, frames, monkeypatch):
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    paths, note = pictures.save_video(frames, tmp_path / "clip", 8, STORY)
    assert len(paths) == 9 and paths[3].name == "clip-003.png" and "imageio-ffmpeg" in note
