"""The JSON documents of the jobs have the keys that people script against."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "golden" / "tiny-qwen3" / "gguf-q4_k_m"
LOCAL = ["recipe=llm/local", f"model.path={FOLDER / 'model.gguf'}", "job.format=json"]


def document(tmp_path, *given, status=0):
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *given, f"run.dir={tmp_path / 'run'}"],
        capture_output=True, text=True, cwd=tmp_path, timeout=240, check=False,
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    return json.loads(done.stdout)


def test_check(tmp_path):
    found = document(tmp_path, *LOCAL, "job=check")
    assert list(found) == ["ok", "tier", "table", "format", "rows", "problems", "ledger"]
    assert list(found["rows"][0]) == ["row", "status", "scheme", "layer_type", "modules", "pattern"]
    assert list(found["ledger"]) == ["consumed", "ignored", "missing", "unexpected"]
    assert (found["ok"], found["tier"], found["format"], found["rows"][0]["modules"]) == (True, "a2", "gguf", 15)
    assert not (tmp_path / "run").exists()


def test_a_refused_check_is_still_one_document(tmp_path):
    found = document(tmp_path, *LOCAL, "job=check", "parallel.tp_size=64", status=1)
    assert list(found["problems"][0]) == ["code", "what", "where", "why", "fix"]
    assert found["problems"][0]["code"] == "tp-heads"


def test_a_plan_that_does_not_fit_is_still_one_document_and_a_directory(tmp_path):
    given = ["recipe=llm/qwen3-32b-w8a8", "job=plan", "job.format=json", "hardware.variant=910B4", "parallel.tp_size=1"]
    found = document(tmp_path, *given, status=1)
    assert [rank["fits"] for rank in found["ranks"]] == [False]
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == found
    # the size that is offered is the least that deals the heads evenly and fits
    assert [rank["fits"] for rank in document(tmp_path, *given, "parallel.tp_size=2")["ranks"]] == [True, True]


def test_plan(tmp_path):
    found = document(tmp_path, *LOCAL, "job=plan", "parallel.tp_size=3")
    rank, module = found["ranks"][0], found["modules"][2]
    nbytes = ("weights_bytes", "kv_cache_bytes", "workspace_bytes", "capacity_bytes")
    assert list(rank)[:8] == ["rank", "node", "device", *nbytes, "fits"]
    assert list(module)[:7] == ["name", "format", "scheme", "row", "split", "shape", "shards"]
    assert module["name"] == "model.layers.0.self_attn.q_proj"
    # 8 query heads of 32 over 3 ranks, 4 KV heads: two groups, one, one
    assert module["shards"] == [[0, 128, 0, 256], [128, 192, 0, 256], [192, 256, 0, 256]]
    assert json.loads((tmp_path / "run" / "plan.json").read_text()) == found


def test_a_plan_survives_json():
    from framework.planning.plan import Plan
    from tests.plans import plan_for

    plan = plan_for(FOLDER / "model.gguf", tp_size=3)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan


def test_verify_holds_and_fails_with_its_status(tmp_path):
    given = [*LOCAL, "job=verify", f"job.reference={FOLDER / 'reference.npz'}", "runtime.dtype=float32"]
    found = document(tmp_path, *given, "job.per_module=true")
    assert list(found)[:4] == ["ok", "metric", "prompts", "tolerance"]
    assert list(found["prompts"][0]) == ["tokens", "max_abs", "mean_abs", "rel_l2", "cosine", "kl", "top1"]
    assert found["ok"] and found["prompts"][0]["max_abs"] < 1e-3
    assert len(found["modules"]) == 15

    with np.load(FOLDER / "reference.npz") as reference:
        arrays = {name: reference[name] for name in reference.files}
    arrays["prompt1.logits_dequant_fp32"] = arrays["prompt1.logits_dequant_fp32"] + 0.5
    np.savez(tmp_path / "off.npz", **arrays)
    found = document(tmp_path, *given, f"job.reference={tmp_path / 'off.npz'}", status=1)
    assert not found["ok"]


def test_verify_against_another_recipe(tmp_path):
    recipe = tmp_path / "exact.yaml"
    recipe.write_text(f"model: {{path: {FOLDER / 'model.gguf'}}}\nruntime: {{dtype: float32}}\n")
    found = document(tmp_path, *LOCAL, "job=verify", f"job.against={recipe}", "runtime.dtype=float32")
    assert found["ok"]
    assert found["prompts"][0]["max_abs"] == 0.0


@pytest.mark.slow
def test_bench(tmp_path):
    found = document(tmp_path, *LOCAL, "job=bench", "job.prompt_tokens=40", "job.new_tokens=8", "job.batch_sizes=[1,3]")
    assert list(found) == ["ttft_s", "prefill_tok_s", "decode_tok_s", "aggregate", "load_s", "bytes_per_rank"]
    assert list(found["aggregate"]) == ["1", "3"]
    assert all(value > 0 for value in found["aggregate"].values())


def test_matrix(tmp_path):
    found = document(tmp_path, "job=matrix", "job.format=json")
    keys = ["row", "format", "scheme", "layer_type", "mode", "a2", "a3", "a5", "diffusion", "origin", "note", "source"]
    assert list(found["rows"][0])[:12] == keys
    assert sum(row["origin"] == "table" for row in found["rows"]) == 31


@pytest.mark.slow
def test_doctor_on_a_machine_without_npus(tmp_path):
    found = document(tmp_path, "job=doctor", "job.format=json")
    assert found["ok"]
    assert {f["name"] for f in found["findings"]} >= {"python", "torch", "torch_npu", "ray", "packages"}
