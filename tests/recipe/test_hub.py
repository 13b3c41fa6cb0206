"""hf:// and modelscope:// against a hub of our own on the loopback interface, without a network."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from framework import cli
from framework.checkpoint.open import open_index
from framework.errors import InputError, Refused
from framework.recipe.cache import cache_dir
from framework.recipe.sources import resolve
from tests.checkpoints import DENSE, GOLDEN, stand_in
from tests.recipe.hubs import REPOSITORIES, running, sha256

ROOT = Path(__file__).parents[2]
BASE = GOLDEN / "tiny-qwen3" / "base"
GGUF = GOLDEN / "tiny-qwen3" / "gguf-q4_k_m" / "model.gguf"
BOTH = pytest.mark.parametrize("source", REPOSITORIES.values(), ids=REPOSITORIES)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub; the clients of this process look there, and have empty caches."""
    import huggingface_hub.constants

    monkeypatch.setattr(sys, "argv", ["launch.py"])
    for name in [n for n in os.environ if n.startswith(("HF_", "MODELSCOPE_")) or "proxy" in n.lower()]:
        monkeypatch.delenv(name)
    with running() as server:
        for name, value in server.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
        yield server


def read(folder):
    """The files of a folder, as a hub holds them."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def sharded(folder):
    """A model of several files of some MB, with files that no job wants."""
    checkpoint = stand_in("modelslim", "w8a8_dynamic", DENSE | {"vocab_size": 8192})
    return read(checkpoint.write(folder, shard_bytes=2 << 20)) | {
        "pytorch_model.bin": b"never fetched", "README.md": b"never fetched",
        "../../escaped.json": b"{}",
    }  # fmt: skip


def gguf():
    return {"model-Q4_K_M.gguf": GGUF.read_bytes(), "README.md": b"never fetched"}


def left_behind(tmp_path):
    """Files and holes of the caches, locks of the client apart."""
    return [path for path in tmp_path.rglob("*") if path.is_file() and ".locks" not in path.parts]


def problem_of(run):
    with pytest.raises((InputError, Refused)) as error:
        run()
    (problem,) = error.value.problems
    return problem


def headers(source, **options):
    from framework.checkpoint.open import header_bytes

    return resolve(source, header_bytes=header_bytes, **options)


@BOTH
@pytest.mark.parametrize("job", ["check", "plan"])
@pytest.mark.parametrize("container", ["safetensors", "gguf"])
def test_check_and_plan_serve_themselves_with_headers_alone(hub, source, job, container, tmp_path, capsys):
    hub.files = sharded(tmp_path / "made") if container == "safetensors" else gguf()
    weights = [name for name in hub.files if name.endswith(container)]
    assert len(weights) == (3 if container == "safetensors" else 1)

    def said(path):
        run = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        command = ["recipe=llm/local", f"job={job}", "job.format=json", f"model.path={path}", f"run.dir={run}"]
        assert cli.main(command) == 0
        return json.loads(capsys.readouterr().out) | {"checkpoint": "elsewhere"}

    remote = said(source)
    assert hub.served < hub.size / 10
    # as of the whole files
    local = tmp_path / "local"
    local.mkdir()
    for name in hub.files.keys() - {"../../escaped.json"}:
        (local / name).write_bytes(hub.files[name])
    assert said(local if container == "safetensors" else local / weights[0]) == remote
    # again: a listing, no file
    hub.seen.clear()
    assert said(source) == remote
    assert len(hub.seen) == 1
    assert not list(tmp_path.rglob("escaped.json"))


@BOTH
def test_headers_are_files_of_the_real_size_that_take_no_room(hub, source, tmp_path):
    hub.files = sharded(tmp_path / "made")
    folder = headers(source)
    assert {path.name for path in folder.iterdir()} == {
        name for name in hub.files if name.endswith((".json", ".safetensors")) and "/" not in name
    }
    for path in folder.glob("*.safetensors"):
        assert path.stat().st_size == len(hub.files[path.name])
        assert path.stat().st_blocks * 512 <= 128 << 10
    assert (folder / "config.json").read_bytes() == hub.files["config.json"]
    assert cache_dir() / "headers" in folder.parents
    assert len(open_index(folder).tensors) > 20


@BOTH
def test_weights_are_fetched_for_the_jobs_that_load_them_and_then_serve_the_others(hub, source, tmp_path):
    hub.files = read(BASE) | {"pytorch_model.bin": b"never fetched"}
    light = headers(source)
    whole = resolve(source)
    assert whole != light
    assert (whole / "model.safetensors").read_bytes() == hub.files["model.safetensors"]
    assert (light / "model.safetensors").read_bytes() != hub.files["model.safetensors"]
    assert headers(source) == whole
    assert not any("pytorch_model" in path for path in hub.seen)
    served = hub.served
    assert resolve(source) == whole
    assert hub.served - served < hub.size / 100  # listings
    # by its path the other is no model
    assert problem_of(lambda: resolve(str(light))).code == "model-missing"
    assert problem_of(lambda: resolve(str(light / "model.safetensors"))).code == "model-missing"
    assert headers(str(light)) == light


@BOTH
def test_a_hub_that_is_not_there_is_one_message_or_the_cache(hub, source, tmp_path, monkeypatch):
    hub.files = sharded(tmp_path / "made")
    known = headers(f"{source}@main")
    gone = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", gone)
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", gone)
    assert headers(f"{source}@main") == known
    for run in (lambda: headers(f"{source}@other"), lambda: resolve(f"{source}@main"), lambda: headers(source)):
        problem = problem_of(run)
        assert problem.code == "fetch-failed"
        assert "not in the cache" in problem.why


@BOTH
def test_weights_in_the_cache_need_no_hub(hub, source, monkeypatch):
    hub.files = gguf()
    whole = resolve(f"{source}/model-Q4_K_M.gguf")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.seen.clear()
    for fetch in (resolve, headers):
        assert fetch(f"{source}/model-Q4_K_M.gguf") == whole
        assert fetch(f"{source}/model-Q4_K_M.gguf").read_bytes() == hub.files["model-Q4_K_M.gguf"]
    assert hub.seen == []


@BOTH
def test_a_named_file_and_its_digest(hub, source):
    hub.files = gguf() | {"other.gguf": b"GGUF"}
    digest = sha256(hub.files["model-Q4_K_M.gguf"])
    assert headers(f"{source}/model-Q4_K_M.gguf", sha256=digest).name == "model-Q4_K_M.gguf"
    for fetch in (headers, resolve):
        assert problem_of(lambda f=fetch: f(f"{source}/model-Q4_K_M.gguf", sha256="0" * 64)).code == "sha256-mismatch"
        assert problem_of(lambda f=fetch: f(source)).code == "file-ambiguous"
        problem = problem_of(lambda f=fetch: f(f"{source}/model-Q4_K.gguf"))
        assert (problem.code, problem.fix) == ("fetch-failed", f"{source}/model-Q4_K_M.gguf")
    hub.files = sharded(Path(str(cache_dir()) + "-made"))
    assert problem_of(lambda: headers(source, sha256=digest)).code == "sha256-mismatch"


@BOTH
def test_a_server_without_ranges_is_hung_up_on(hub, source, tmp_path):
    hub.files = {"model.safetensors": BASE.joinpath("model.safetensors").read_bytes() + bytes(64 << 20)}
    hub.ranges = False
    hub.pause_s = 0.001
    path = headers(f"{source}/model.safetensors")
    assert path.read_bytes()[:1000] == hub.files["model.safetensors"][:1000]
    assert hub.served < hub.size / 2


@BOTH
def test_a_header_longer_than_the_first_piece_comes_whole(hub, source):
    header = json.dumps({f"tensor.{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(5000)})
    data = len(header).to_bytes(8, "little") + header.encode() + bytes(5000)
    hub.files = {"model.safetensors": data}
    for hub.ranges in (True, False):
        path = headers(f"{source}/model.safetensors")
        assert len(open_index(path).tensors) == 5000
        for file in path.parent.iterdir():
            file.unlink()
        path.parent.rmdir()


@BOTH
def test_an_answer_that_breaks_off_is_taken_up_where_it_broke(hub, source, monkeypatch):
    monkeypatch.setattr("framework.recipe.remote.WAIT_S", 0.01)
    hub.files = read(BASE)
    hub.drops, hub.busy = 2, 1
    folder = headers(source)
    assert hub.drops == hub.busy == 0
    assert open_index(folder).tensors.keys() == open_index(BASE).tensors.keys()


@BOTH
@pytest.mark.parametrize(
    ("name", "data", "code"),
    {
        "too short": ("model.safetensors", b"\x10", "file-truncated"),
        "ends within": ("model.safetensors", (1 << 20).to_bytes(8, "little") + b"{", "file-truncated"),
        "a huge header": ("model.safetensors", (101 << 20).to_bytes(8, "little"), "file-malformed"),
        "no gguf": ("model.gguf", b"<html>" + bytes(100), "wrong-magic"),
        "half a gguf": ("model.gguf", GGUF.read_bytes()[:5000], "file-truncated"),
        "weights cut": ("model.gguf", GGUF.read_bytes()[:-5000], "file-truncated"),
    }.values(),
)  # fmt: skip
def test_a_header_that_cannot_be_is_refused_and_not_kept(hub, source, tmp_path, name, data, code):
    room = bytes(102 << 20) if code == "file-malformed" else b""
    hub.files = {name: data + room, "config.json": b"{}"}
    assert problem_of(lambda: headers(source)).code == code
    assert left_behind(tmp_path) == []
    assert hub.served < 300_000


@BOTH
def test_a_listing_that_lies_about_a_size_is_refused(hub, source, tmp_path):
    hub.files = read(BASE)
    hub.lies = {"model.safetensors": 4_000_000}
    problem = problem_of(lambda: headers(source))
    assert problem.code == "fetch-failed"
    assert "lists 4000000 bytes, the server has" in problem.why
    assert left_behind(tmp_path) == []


@BOTH
def test_a_server_that_stays_busy_is_given_up(hub, source, tmp_path, monkeypatch):
    monkeypatch.setattr("framework.recipe.remote.WAIT_S", 0.01)
    hub.files = read(BASE)
    hub.busy = 1000
    problem = problem_of(lambda: headers(source))
    assert (problem.code, problem.why.split(": ")[1]) == ("fetch-failed", "the server answers 503")
    assert left_behind(tmp_path) == []


@BOTH
def test_tokens_are_shown_to_the_hub_and_to_nobody_else(hub, source, monkeypatch):
    hub.files, hub.token = gguf(), "a-token-of-the-tests"
    problem = problem_of(lambda: headers(source))
    assert problem.code == "fetch-failed"
    assert "HF_TOKEN" in problem.fix or "MODELSCOPE_API_TOKEN" in problem.fix
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", hub.token)
    assert headers(source).is_file()
    hub.files = {"model.gguf": b"no"}
    assert hub.token not in str(problem_of(lambda: headers(source)))


@BOTH
def test_what_is_not_there_is_one_message(hub, source, tmp_path):
    problem = problem_of(lambda: headers(source.replace("name", "other")))
    assert problem.code == "fetch-failed"
    hub.files = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    assert problem_of(lambda: headers(source)).code == "pickle"
    assert left_behind(tmp_path) == []


def test_modelscope_files_are_checked_against_the_listing_and_kept_once(hub, tmp_path, monkeypatch):
    source = REPOSITORIES["modelscope"]
    hub.files = read(BASE)
    folder = resolve(source)
    hub.files["config.json"] += b" "
    hub.seen.clear()
    again = resolve(source)
    assert again != folder
    assert (again / "config.json").read_bytes() == hub.files["config.json"]
    assert len(hub.seen) == 2  # the listing, the file that changed
    monkeypatch.setattr("tests.recipe.hubs.sha256", lambda data: "f" * 64)
    hub.files["config.json"] += b" "
    assert problem_of(lambda: resolve(source)).code == "sha256-mismatch"
    monkeypatch.undo()


def test_a_full_disk_is_a_refusal_and_leaves_nothing(hub, tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.files = gguf()
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert problem_of(lambda: resolve(REPOSITORIES["modelscope"])).code == "disk-full"
    with monkeypatch.context() as patched:
        patched.setattr("framework.recipe.remote._free_bytes", lambda folder: 1000)
        assert problem_of(lambda: resolve(REPOSITORIES["modelscope"])).code == "disk-full"
    assert left_behind(tmp_path) == []


@BOTH
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_fetch_leaves_nothing(hub, source, number, tmp_path):
    hub.files = sharded(tmp_path / "made")
    hub.pause_s = 0.2
    process = launch(hub, tmp_path, "recipe=llm/local", f"model.path={source}", "job=check")
    while hub.served < 50_000:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert [path for path in left_behind(tmp_path) if tmp_path / "made" not in path.parents] == []


@pytest.mark.slow
@BOTH
def test_after_a_check_generate_fetches_the_weights_and_runs(hub, source, tmp_path):
    hub.files = read(BASE)
    headers(source)
    assert hub.served < hub.size / 10
    arguments = ["job=generate", "job.prompts=[def]", "job.max_new_tokens=4", f"run.dir={tmp_path / 'run'}"]
    process = launch(hub, tmp_path, "recipe=llm/local", f"model.path={source}", *arguments)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, output + errors
    assert hub.served > len(hub.files["model.safetensors"])
    (line,) = (tmp_path / "run" / "results.jsonl").read_text().splitlines()
    assert len(json.loads(line)["token_ids"]) == 4


def launch(hub, tmp_path, *arguments):
    environment = {**os.environ, **hub.environment(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "launch.py"), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
