"""Every row of the support table that judges diffusion models draws a video on two ranks of Ray, from prompt to file.

The rows are those of the table's file: a new one without a pipeline here fails. Checkpoints are the real quantizer's,
repacked; those of types that its golden files lack are written as it does (written.py).
"""

import json
from contextlib import contextmanager
from pathlib import Path

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from framework import cli
from framework.capability.judge import Policy, Question, judge
from framework.capability.table import read_table
from framework.diffusion.repack import repack
from framework.report.pictures import KEY
from tests.diffusion.made import wan_pipeline
from tests.diffusion.test_written import golden_model, linears
from tests.diffusion.written import write

ORIGINAL = Path(__file__).parents[1] / "golden" / "diffusion" / "tiny-wan22-original"
TABLE = read_table(Path(__file__).parents[2] / "conf" / "capability", "default")


def judges(row):
    """Whether a row is the one that is asked about some linear of a diffusion model, and does not refuse it."""
    kinds = [(scheme, row.mode) for scheme in (row.diffusion_schemes or (row.scheme,))]
    found = [judge(TABLE, Question(row.format, scheme, row.layer_type, "diffusion", mode), Policy("a5", ("tbd",)))
             for scheme, mode in kinds]  # fmt: skip
    return any(verdict.row == row.row and verdict.problem is None for verdict in found)


ROWS = [row.row for row in TABLE.rows.values() if row.diffusion in ("supported", "tbd") and judges(row)]


def online(scheme):
    return None, ("quantization.online=true", f'quantization.layers=[{{pattern: "*.blocks.*", scheme: {scheme}}}]')


# typed by hand: where the quantized transformers come from (a golden folder, a type to write, none), what is overridden
RUNS = {
    "diffusion.mxfp8.online": online("mxfp8"),
    "diffusion.mxfp8.offline": ("W8A8_MXFP8", ()),
    "diffusion.w8a8_static.offline": (ORIGINAL / "w8a8-static", ()),
    "diffusion.w8a8_dynamic.offline": (ORIGINAL / "w8a8-dynamic", ()),
    "diffusion.w4a4_dynamic.offline": ("W4A4_DYNAMIC", ()),
    "modelslim.mxfp4.linear": (ORIGINAL / "w4a4-mxfp4", ()),
    "none.float.linear": (None, ()),
    "online.w8a8_dynamic.linear": online("w8a8_dynamic"),
    "online.w4a16.linear": online("w4a16"),
    "online.w8a16.linear": online("w8a16"),
    "online.mxfp4.linear": online("mxfp4"),
}


# of these the CPU's kernels hold codes in wider dtypes than the operators of an NPU, which a plan counts
WIDENED = {"mxfp8", "mxfp4", "w4a4_dynamic"}


@pytest.fixture
def launch(warm_session, monkeypatch, capsys):
    """The command line, on ranks of Ray that are there already."""

    @contextmanager
    def opened(*args, **options):
        yield warm_session

    monkeypatch.setattr("framework.jobs.ranks.open_session", opened)

    def run(*given):
        status = cli.main(list(given))
        return status, capsys.readouterr().err

    return run


def pipeline(root, source):
    """A whole pipeline of quantized transformers; of one where only one was quantized."""
    base = wan_pipeline(root / "base")
    if source is None:
        return base
    quantized = source
    if isinstance(source, str):
        quantized = root / "quantized"
        for name, folder in {"transformer": "high_noise_model", "transformer_2": "low_noise_model"}.items():
            model = golden_model(name)
            write(quantized / folder, model, linears(model, source))
    if not (quantized / "low_noise_model").is_dir():
        index = json.loads((base / "model_index.json").read_text())
        index |= {"transformer_2": [None, None], "boundary_ratio": None}
        (base / "model_index.json").write_text(json.dumps(index))
    repack(base, quantized, root / "repacked", lambda stage, done, total: None)
    return root / "repacked"


def frames_of(path):
    shown = imageio_ffmpeg.count_frames_and_secs(str(path))
    return shown[0]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("row", ROWS)
def test_a_video_is_drawn_by_every_row(launch, tmp_path, row):
    source, overrides = RUNS[row]
    folder = pipeline(tmp_path, source)
    run = tmp_path / "run"
    status, said = launch(
        "recipe=diffusion/local", f"model.path={folder}", f"run.dir={run}", "parallel.tp_size=2", "hardware=a5",
        "capability.allow=[tbd]", "job.prompts=[red boat]", "job.steps=3", "job.height=32", "job.width=48",
        "job.frames=6", "job.fps=8", *overrides,
    )  # fmt: skip
    assert status == 0, said
    assert "job.frames=6" in said and "5 are made" in said
    (line,) = (run / "results.jsonl").read_text().splitlines()
    assert json.loads(line) == {"index": 0, "prompt": "red boat", "label": None, "seed": 0, "files": ["output-000.mp4"]}
    assert frames_of(run / "output-000.mp4") == 5
    story = json.loads((run / "output-000.json").read_text())
    assert story["seed"] == 0 and story["settings"]["num_frames"] == 5 and story["versions"]["diffusers"]
    assert story["recipe"]["parallel"]["tp_size"] == 2
    plan = json.loads((run / "plan.json").read_text())
    judged = [module for module in plan["modules"] if module["row"] == row]
    assert judged and {module["name"].split(".")[1] for module in judged} >= {"blocks"}
    metrics = json.loads((run / "metrics.json").read_text())
    planned = [rank["weights_bytes"] for rank in plan["ranks"]]
    assert {module["scheme"] for module in plan["modules"]} & WIDENED or all(
        abs(held - rank) <= 0.05 * rank for held, rank in zip(metrics["bytes_per_rank"], planned, strict=True)
    )


def test_every_row_that_judges_has_a_run_and_no_other():
    assert set(ROWS) == set(RUNS)


@pytest.mark.slow
@pytest.mark.ray
def test_copies_draw_outputs_of_their_own_and_equal_one_rank(launch, tmp_path):
    def drawn(name, *overrides):
        run = tmp_path / name
        given = ("recipe=diffusion/digits", f"run.dir={run}", "job.labels=[3,1,4]", "job.steps=4", *overrides)
        status, said = launch(*given)
        assert status == 0, said
        files = sorted(run.glob("output-*.png"))
        assert len(files) == 3 and (run / "grid.png").is_file()
        with Image.open(files[1]) as read:
            story = json.loads(read.text[KEY])
        assert (story["label"], story["seed"], story["settings"]["class_labels"]) == (1, 1, [1])
        return np.stack([np.asarray(Image.open(file)) for file in files]).astype(int)

    one = drawn("one", "parallel.tp_size=1", "runtime.dtype=float32")
    two = drawn("two", "parallel.tp_size=1", "parallel.data_size=2", "runtime.dtype=float32")
    assert np.abs(one - two).max() <= 1
    assert np.abs(one[0] - one[1]).max() > 50
