"""job=plan job.against=PLAN.json, and the files that the job reads and writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from framework.errors import InputError
from framework.report.against import against_markdown, against_text, difference, read_plan
from tests.jobs.plan_documents import TINY, tiny

ROOT = Path(__file__).parents[2]


def shown(was, now):
    return " ".join(against_text(difference(was, now), now, ("a.json", "b.json")).split())


def test_a_plan_does_not_differ_from_itself():
    plan = tiny()[0].to_json()
    found = difference(plan, json.loads(json.dumps(plan)))
    assert found == {"same": True, "facts": {}, "ranks": [], "modules": [], "notes": {"gone": [], "new": []}}
    assert shown(plan, plan).endswith("no difference")
    assert against_markdown(found) == "no difference"


def test_another_size_is_other_shards_bytes_and_notes():
    was, now = (tiny(f"parallel.tp_size={size}")[0].to_json() for size in (2, 3))
    found = difference(was, now)
    assert found["facts"] == {"tp_size": [2, 3]}
    assert [rank["only"] for rank in found["ranks"]] == ["", "", "new"]
    for rank in found["ranks"][:2]:
        for key, pair in rank["bytes"].items():
            assert pair == [plan["ranks"][rank["rank"]][key] for plan in (was, now)]
    by_name = {module["name"]: module for module in found["modules"]}
    q_proj = by_name["model.layers.*.self_attn.q_proj"]
    assert set(q_proj["changes"]) == {"shards"}
    assert q_proj["layers"] == list(range(was["spec"]["layers"]))
    assert found["notes"]["new"] == [note for note in now["notes"] if "uneven heads" in note] != []
    # 8 heads of 32: half of 256 rows before, 4 of 8 heads' groups dealt 2, 1, 1 after
    text = shown(was, now)
    assert "tp_size 2 -> 3" in text
    assert "rank 2 new" in text
    assert "rank 1 [128:256, 0:256] -> [128:192, 0:256]" in text


def test_schemes_rows_and_modules_that_differ_are_named_with_their_layers():
    was, now = (json.loads(json.dumps(tiny()[0].to_json())) for _ in range(2))
    for entry in now["modules"]:
        if entry["name"].endswith("q_proj"):
            entry |= {"scheme": "w8a8_dynamic", "row": "some.row"}
    gone = now["modules"].pop()
    found = difference(was, now)
    assert [module["name"] for module in found["modules"]] == ["model.layers.*.self_attn.q_proj", gone["name"]]
    assert found["modules"][0]["changes"] == {
        "scheme": ["float", "w8a8_dynamic"],
        "row": ["gguf.all.linear", "some.row"],
    }
    assert found["modules"][1]["changes"] == {"name": [gone["name"], None]}
    assert f"name {gone['name']} -> none" in shown(was, now)


@pytest.mark.parametrize("columns", [80, 120])
def test_no_line_is_wider_than_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    was, now = (tiny(f"parallel.tp_size={size}")[0].to_json() for size in (2, 3))
    text = against_text(difference(was, now), now, ("a.json", "b.json"))
    assert max(map(len, text.split("\n"))) <= columns


def damaged(change):
    plan = json.loads(json.dumps(tiny()[0].to_json()))
    change(plan)
    return json.dumps(plan).encode()


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "cannot be read"),
        (b"", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[1]", "it is no JSON object"),
        (b"{}", "recipe is not there"),
        (damaged(lambda plan: plan.pop("ranks")), "ranks is not there"),
        (damaged(lambda plan: plan.update(tp_size="2")), "tp_size is not there, or is no whole number"),
        (damaged(lambda plan: plan["ranks"].append(None)), "ranks[1] is no JSON object"),
        (damaged(lambda plan: plan["ranks"][0].pop("weights_bytes")), "ranks[0].weights_bytes"),
        (damaged(lambda plan: plan["modules"][1].update(shards=[3])), "the shards of model.layers.0.input_layernorm"),
        (damaged(lambda plan: plan["modules"][2].update(name=4)), "modules[2].name"),
    ],
)
def test_what_is_no_plan_is_refused_as_input(tmp_path, content, why):
    path = tmp_path / "plan.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as refused:
        read_plan(path)
    (problem,) = refused.value.problems
    assert problem.code == "plan-file"
    assert problem.where == str(path)
    assert why in problem.why


def launch(tmp_path, *given):
    command = [sys.executable, str(ROOT / "launch.py"), "recipe=llm/local", f"model.path={TINY}", "job=plan", *given]
    return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=240, check=False)


def test_the_job_draws_and_compares(tmp_path):
    first = launch(tmp_path, "run.dir=first", "job.html=plan.html", "parallel.tp_size=2")
    assert first.returncode == 0, first.stderr
    assert str(tmp_path / "plan.html") in first.stdout
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "plan.html"]  # no temporary file is left
    assert (tmp_path / "plan.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")

    second = launch(tmp_path, "run.dir=second", "job.against=first/plan.json", "job.format=json")
    assert second.returncode == 0, second.stderr
    assert json.loads(second.stdout)["facts"]["tp_size"] == [2, 1]


def test_a_picture_that_cannot_be_written_is_the_users_input(tmp_path):
    done = launch(tmp_path, "run.dir=run", "job.html=nowhere/plan.html")
    assert done.returncode == 2
    assert "error[html-file]" in done.stderr
    assert f"there is no folder {tmp_path / 'nowhere'}" in done.stderr
    assert not (tmp_path / "run").exists()
