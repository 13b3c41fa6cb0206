"""Text encoders: each different prompt once, on one rank, before the pipeline is loaded; then they are gone."""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from framework.diffusion.encoding import load_encoders
from framework.diffusion.pipeline import load_pipeline
from framework.jobs import drawing
from framework.jobs.common import open_checked
from framework.layers.group import Alone
from framework.planning.make import make_plan
from framework.recipe.compose import compose
from tests.diffusion import pipelines

ROOT = Path(__file__).parents[2]


def plan_of(folder):
    given = [f'model.path="{folder}"', "runtime.dtype=float32", "job=plan"]
    return make_plan(open_checked(compose(["recipe=diffusion/local", *given])), "cpu")


@pytest.mark.parametrize("make", [pipelines.wan, pipelines.flux, pipelines.sd3])
def test_embeddings_are_diffusers_at_the_length_of_the_call_and_the_pipeline_has_no_encoder(tmp_path, make):
    plain = make(tmp_path)
    plan = plan_of(tmp_path)
    encoders = load_encoders(plan, Alone(), lambda done, total: None)
    assert getattr(encoders.pipeline, "transformer", None) is None and getattr(encoders.pipeline, "vae", None) is None
    (got,) = encoders.encode([{"prompt": "a boat", "max_sequence_length": 24}])
    (longer,) = encoders.encode([{"prompt": "a boat"}])
    given = {"prompt_2": None, "prompt_3": None} if make is pipelines.sd3 else {}
    with torch.inference_mode():
        wanted = plain.encode_prompt(prompt="a boat", max_sequence_length=24, **given)
    assert torch.equal(got["prompt_embeds"], wanted[0])
    assert longer["prompt_embeds"].shape[1] > got["prompt_embeds"].shape[1]
    loaded = load_pipeline(plan, Alone(), lambda done, total: None).pipeline
    assert all(loaded.components[name] is None for name in loaded.components if name.startswith(("text_", "tokenizer")))


def test_other_ranks_load_no_encoder(tmp_path):
    pipelines.wan(tmp_path)
    encoders = load_encoders(plan_of(tmp_path), SimpleNamespace(rank=1), lambda done, total: None)
    assert encoders.pipeline is None and encoders.encode([{"prompt": "a boat"}]) == []


def test_a_pipeline_draws_beside_a_torch_npu_without_cann(tmp_path):
    """diffusers and transformers import what is installed, so each loader must hide it before them."""
    pipelines.wan(tmp_path)
    (tmp_path / "path" / "torch_npu").mkdir(parents=True)
    (tmp_path / "path" / "torch_npu" / "__init__.py").write_text("raise ImportError('libhccl.so: cannot open')")
    about = tmp_path / "path" / "torch_npu-2.13.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: torch_npu\nVersion: 2.13.0\n")
    given = [f"model.path={tmp_path}", "job.prompts=[a boat]", "job.steps=1", "job.height=16", "job.width=16"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), "recipe=diffusion/local", *given, "job.frames=1", "run.dir=run"],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path / "path")}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert (done.returncode, [path.name for path in (tmp_path / "run").glob("*.png")]) == (0, ["output-000.png"]), (
        done.stderr
    )


def test_equal_prompts_are_encoded_once_and_before_the_pipeline_is_loaded(monkeypatch):
    heard = []

    def call(method, wanted):
        heard.append((method, [one["prompt"] for one in wanted]))
        return [[{"prompt_embeds": one["prompt"].upper()} for one in wanted], []]

    @contextmanager
    def started(recipe, plan, *, log_dir, loader):
        heard.append(loader)
        yield SimpleNamespace(call=call), 0.0

    monkeypatch.setattr(drawing, "started", started)
    monkeypatch.setattr(drawing, "load", lambda session, plan, loader: heard.append(loader))
    outputs = [
        drawing.Output({"prompt": prompt, "negative_prompt": "n", "height": 32}, seed)
        for seed, prompt in enumerate("aab")
    ]
    with drawing.drawers(None, None, outputs) as (_, ready, _):
        assert heard == [drawing.ENCODERS, ("encode", ["a", "b"]), drawing.LOADER]
    assert [one.arguments for one in ready] == [{"height": 32, "prompt_embeds": prompt} for prompt in "AAB"]
    assert [one.seed for one in ready] == [0, 1, 2]
    heard.clear()
    with drawing.drawers(None, None, [drawing.Output({"class_labels": [3]}, 0)]):
        assert heard == [drawing.LOADER]
