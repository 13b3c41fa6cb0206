"""Pipelines and settings that cannot be run: one message each, with the way out, before anything loads."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors

from framework import cli
from tests.diffusion.made import WAN

ORIGINAL = Path(__file__).parents[1] / "golden" / "diffusion" / "tiny-wan22-original"
HIGH = ORIGINAL / "w8a8-dynamic" / "high_noise_model"


def in_wans_names(folder):
    shutil.rmtree(folder / "transformer")
    shutil.copytree(HIGH, folder / "transformer")
    shutil.copy(WAN / "transformer" / "config.json", folder / "transformer")


def with_wans_description(folder):
    (description,) = HIGH.glob("*description*.json")
    shutil.copy(description, folder / "transformer")


def without_an_expert(folder):
    index = json.loads((folder / "model_index.json").read_text()) | {"transformer_2": [None, None]}
    (folder / "model_index.json").write_text(json.dumps(index))


def with_a_stale_index(folder):
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    with safetensors.safe_open(path, "np") as file:
        names = [*file.keys(), "blocks.9.attn1.to_q.weight"]
    path.with_name(path.name + ".index.json").write_text(json.dumps({"weight_map": dict.fromkeys(names, path.name)}))


def with_gguf(folder):
    (folder / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
    (folder / "transformer" / "model.gguf").write_bytes(b"GGUF" + (3).to_bytes(4, "little") + bytes(16))


def nothing(folder):
    pass


MXFP8 = ("quantization.online=true", 'quantization.layers=[{pattern: "*.blocks.*", scheme: mxfp8}]')
CASES = {
    "Wan's own names": (in_wans_names, (), 2, "repack-needed", "job=repack job.original="),
    "a description in Wan's names": (with_wans_description, (), 2, "repack-needed", "self_attn"),
    "an expert's folder missing": (
        lambda folder: shutil.rmtree(folder / "transformer_2"), (), 2, "component-missing", "transformer_2"
    ),
    "an expert set to null": (without_an_expert, (), 2, "component-missing", "boundary_ratio"),
    "a stale index": (with_a_stale_index, (), 2, "weight-map", "blocks.9.attn1.to_q.weight"),
    "a GGUF transformer": (with_gguf, (), 1, "format-unsupported", "safetensors"),
    "no scheduler": (lambda folder: shutil.rmtree(folder / "scheduler"), (), 2, "component-missing", "scheduler"),
    "mxfp8 on a2": (nothing, MXFP8, 1, "row-unsupported", "hardware=a5"),
    "heads for tp": (nothing, ("parallel.tp_size=5",), 1, "tp-size", "parallel.tp_size=4"),
    "heads for ulysses": (nothing, ("parallel.ulysses_size=3",), 1, "ulysses-heads", "ulysses_size=1 or 2 or 4"),
    "no guidance over two": (nothing, ("parallel.cfg_size=2", "job.guidance=1"), 1, "cfg-guidance", "job.guidance=4"),
    "an odd size": (nothing, ("job.height=481",), 2, "size-multiple", "job.height=480   or   job.height=496"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_be_run_is_one_message_with_the_way_out(case, tmp_path, capsys):
    change, overrides, status, code, word = CASES[case]
    folder = tmp_path / "pipeline"
    shutil.copytree(WAN, folder)
    for name in ("vae", "text_encoder", "tokenizer"):
        (folder / name).mkdir()
    change(folder)
    given = ["recipe=diffusion/local", f"model.path={folder}", "job.prompts=[x]", "runtime.dtype=float32"]
    returned = cli.main([*given, f"run.dir={tmp_path / 'run'}", *overrides])
    said = capsys.readouterr().err
    assert (returned, said.count("error["), f"error[{code}]" in said) == (status, 1, True), said
    assert word in " ".join(said.split()) or word in said
    assert "Traceback" not in said and not (tmp_path / "run").exists()


def test_the_folder_that_msmodelslim_wrote_is_told_from_a_pipeline(capsys):
    assert cli.main(["recipe=diffusion/local", f"model.path={ORIGINAL / 'w8a8-dynamic'}", "job=check"]) == 2
    assert "error[repack-needed]" in capsys.readouterr().err
