"""What jobs refuse beyond a check: each with its code, its exit status, and the option that would work."""

import re
import shlex
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from framework import cli
from framework.cluster.failures import PeerLost, Remains, Scene, digest
from framework.cluster.options import ClusterOptions
from framework.cluster.placement import start
from framework.cluster.rank import RankInfo
from framework.engine.loop import Engine
from framework.engine.request import Request, SamplingParams
from framework.errors import InputError, Refused, UserError
from framework.layers.group import Alone
from framework.planning.runnable import require_runnable
from framework.recipe.cache import work_folder
from tests.checkpoints import GOLDEN, stand_in
from tests.engine.models import AttentionModel

GGUF = GOLDEN / "tiny-qwen3" / "gguf-q4_k_m" / "model.gguf"
LOCAL = ["recipe=llm/local", f"model.path={GGUF}"]
ONLINE = ["recipe=llm/local", "model.path=BASE", "job=quantize", "quantization.online=true", "capability.allow=[tbd]",
          'quantization.layers=[{pattern: "*_proj", scheme: w8a8_dynamic}]']  # fmt: skip
VERIFY = [*LOCAL, "job=verify", "job.reference=reference.npz"]

# the command, its exit status, the codes, words of the message
CASES = {
    "nowhere to quantize to": (
        ["recipe=llm/local", "model.path=BASE", "job=quantize"], 2, "output-missing", "job.output="),
    "nothing to quantize to": (
        ["recipe=llm/local", "model.path=BASE", "job=quantize", "job.output=out"], 1, "online-off",
        "quantization.online=true"),
    "an output below a file": ([*ONLINE, "job.output=FILE/out"], 2, "output-folder", "FILE/out"),
    "a run directory below a file": (
        [*LOCAL, "job=plan", "run.dir=FILE/run"], 2, "run-dir", "run.dir=/a/folder/you/can/write"),
    "a drawing below a file": ([*LOCAL, "job=plan", "job.html=FILE/plan.html"], 2, "html-file", "FILE/plan.html"),
    "nothing to repack": (
        ["job=repack", "recipe=diffusion/wan2.2-t2v-a14b-w8a8"], 2, "repack-folders " * 3, "job.original=/a/folder"),
    "folders that are none": (
        ["job=repack", "recipe=diffusion/wan2.2-t2v-a14b-w8a8", "job.original=FILE", "job.quantized=FILE",
         "job.output=out"], 2, "repack-folders " * 2, "job.quantized=/a/folder"),
    "a recipe to compare with that leaves its model open": (
        [*LOCAL, "job=verify", "job.against=llm/local"], 2, "missing-key", "overrides of this command line"),
    "a typed path of a recipe that assumes its model": (
        ["recipe=llm/qwen3-32b-w8a8", "model.path=/no/model", "job=check"], 2, "model-missing", "/no/model"),
    "more than a device holds": (
        ["recipe=llm/qwen3-32b-w8a8", "hardware.variant=910B4", "parallel.tp_size=1", "job=plan"], 1, "memory",
        "parallel.tp_size=2   or"),
    "a label that the model does not know": (
        ["recipe=diffusion/digits", "job.labels=[3,10,2000]"], 2, "label-unknown", "10, 2000"),
    "a prompt for a pipeline of labels": (
        ["recipe=diffusion/digits", "job.prompts=[x]"], 2, "setting-unknown", "takes no prompts"),
    "a reference of another vocabulary": (VERIFY, 2, "reference-mismatch", "99999"),
}  # fmt: skip


@pytest.fixture
def launch(tmp_path, monkeypatch, capsys):
    """Run the command line; BASE is a checkpoint, FILE a file, reference.npz of another vocabulary."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["launch.py"])
    (tmp_path / "FILE").write_text("no folder")
    arrays = {"prompt0.input_ids": np.array([99999]), "prompt0.logits": np.zeros((1, 512))}
    np.savez(tmp_path / "reference.npz", **arrays)

    def run(given):
        if "model.path=BASE" in given:
            stand_in("none", "float").write(tmp_path / "BASE")
        status = cli.main(given)
        shown = capsys.readouterr()
        return status, shown.out + shown.err

    return run


@pytest.mark.parametrize("case", CASES)
def test_a_job_that_cannot_begin_says_which_option_would_help(case, launch):
    given, status, codes, word = CASES[case]
    returned, said = launch(given)
    assert (returned, re.findall(r"error\[([a-z0-9-]+)\]", said)) == (status, codes.split()), said
    assert word in said and "Traceback" not in said


def test_a_check_names_the_next_command_with_all_that_was_typed_and_what_text_would_need(launch, tmp_path, capsys):
    stand_in("none", "float").write(tmp_path / "a model")
    given = [
        "recipe=llm/local",
        f'model.path="{tmp_path}/a model"',
        "job=check",
        "job.format=text",
        "parallel.tp_size=2",
    ]
    status, said = launch(given)
    assert status == 0 and "no tokenizer beside the weights" in said
    command = shlex.split(said.split("next: ")[1])
    assert command[:2] == ["python", "launch.py"] and "parallel.tp_size=2" in command
    assert launch([*command[2:], "run.dir=run"])[0] == 0
    saved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    assert saved["run"] == {"dir": "auto"} and saved["parallel"]["tp_size"] == 2


def test_a_setting_that_the_pipeline_does_not_take_is_named(launch):
    status, said = launch(["recipe=diffusion/digits", "job.labels=[]", "job.prompts=[x]", "run.dir=run"])
    assert (status, "error[setting-unknown]" in said, "Traceback" in said) == (2, True, False), said
    assert "takes no prompts" in said and "labels" in said


def test_what_has_no_running_half_is_checked_and_not_run():
    part = SimpleNamespace(format="exl2")
    checked = SimpleNamespace(
        problems=(), placed=(), recipe=SimpleNamespace(name="r"), model=SimpleNamespace(parts=[part], transformers=None)
    )
    with pytest.raises(Refused) as caught:
        require_runnable(checked)
    (problem,) = caught.value.problems
    assert problem.code == "not-yet" and "exl2" in problem.what and "job=plan" in problem.fix


def test_logits_that_are_no_numbers_stop_at_the_first_token():
    model = AttentionModel()
    model.head = torch.full_like(model.head, float("nan"))
    engine = Engine(model, model.cache(8), None, Alone(), max_batch=2, chunk_tokens=64)
    with pytest.raises(Refused) as caught:
        list(engine.generate([Request(3, [1, 2, 3], SamplingParams(max_new_tokens=2))]))
    (problem,) = caught.value.problems
    assert problem.code == "not-finite" and problem.where == "prompt 3" and "job.per_module=true" in problem.fix


def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError) as caught, work_folder():
        pass
    (problem,) = caught.value.problems
    assert problem.code == "cache-unwritable" and "XDG_CACHE_HOME=" in problem.fix


def test_ranks_without_ray_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError) as caught:
        start(ClusterOptions(), 2, 1)
    (problem,) = caught.value.problems
    assert problem.code == "package-missing" and problem.fix == "pip install ray"


def test_a_collective_of_npus_that_gave_up_has_a_code_of_its_own():
    infos = {r: RankInfo(r, "host", "10.0.0.1", 100 + r, "npu", "0", "", 0) for r in range(2)}
    scene = Scene(infos, {0: "in decode", 1: "loading"}, {}, lambda info: Remains([], None, False))
    (problem,) = digest({0: PeerLost(1, "no answer for 600 s")}, scene).problems
    assert problem.code == "hccl-timeout" and "waiting for rank 1" in problem.what and "timeout_s" in problem.fix
