"""The real command, when a rank is killed or the user interrupts: one message, in time, nothing left."""

import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "tests" / "golden" / "tiny-qwen3" / "gguf-q4_k_m" / "model.gguf"
MARK = "NPU_LAUNCH_TEST_RUN"
pytestmark = [pytest.mark.ray, pytest.mark.slow]


def marked(mark):
    """(pid, command line) of live processes whose environment carries the mark."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                found.append((int(entry.name), (entry / "cmdline").read_bytes()))
        except OSError:
            continue
    return found


def ranks(mark):
    return sorted(pid for pid, line in marked(mark) if line.startswith(b"ray::Rank"))


def wait_for(condition, what):
    end = time.monotonic() + 120
    while not (value := condition()):
        assert time.monotonic() < end, what
        time.sleep(0.02)
    return value


@pytest.mark.parametrize(
    ("stage", "sent", "status"),
    [("prefill", signal.SIGKILL, 1), ("decode", signal.SIGKILL, 1), ("decode", signal.SIGINT, 130)],
)
def test_the_command_ends_within_ten_seconds_and_leaves_nothing(stage, sent, status, tmp_path):
    mark = uuid.uuid4().hex
    shm = sorted(Path("/dev/shm").iterdir())
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {MARK: mark}
    prompts = tmp_path / "prompts.txt"
    line = "def f(x): return x " * (20 if stage == "decode" else 40)
    prompts.write_text(f"{line}\n" * (1 if stage == "decode" else 400))
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        environment["TMPDIR"] = folder
        command = [
            sys.executable, str(ROOT / "launch.py"), "recipe=llm/local", f"model.path={MODEL}", "parallel.tp_size=2",
            f"job.prompt_file={prompts}", "job.chat=false", "job.max_new_tokens=100000", f"run.dir={tmp_path / 'run'}",
        ]  # fmt: skip
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, start_new_session=True
        )
        err = b""
        while b"ready" not in err:
            chunk = os.read(process.stderr.fileno(), 4096)
            assert chunk, err.decode()
            err += chunk
        if stage == "decode":
            process.stdout.read(1)  # the first text
        pids = wait_for(lambda: ranks(mark), "no rank found")
        assert len(pids) == 2
        begin = time.monotonic()
        if sent == signal.SIGINT:
            os.killpg(process.pid, sent)  # as a terminal does
        else:
            os.kill(pids[1], sent)
        _, rest = process.communicate(timeout=30)
        assert time.monotonic() - begin < 10
        message = (err + rest).decode()
        assert process.returncode == status, message
        assert "Traceback" not in message
        if status == 1:
            assert "error[rank-lost]" in message
            assert "signal 9" in message
        assert list(Path(folder).iterdir()) == []
    assert marked(mark) == []
    assert sorted(Path("/dev/shm").iterdir()) == shm
