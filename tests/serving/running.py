"""Servers for tests: the real command in a process of its own, and a client for it."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import urllib.error
import urllib.request
import uuid
from contextlib import contextmanager
from pathlib import Path

import openai

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "golden" / "tiny-qwen3" / "gguf-q4_k_m" / "model.gguf"
MARK = "NPU_LAUNCH_TEST_RUN"
CLIENT = {"api_key": "none", "max_retries": 0, "timeout": 120}


class Server:
    """A running `job=serve`. `err` grows as the command writes."""

    def __init__(self, process, mark):
        self.process, self.mark, self.err, self.url = process, mark, "", ""
        self._ready = threading.Event()
        self._listener = threading.Thread(target=self._listen)
        self._listener.start()

    def _listen(self):
        for line in self.process.stderr:
            self.err += line
            if found := re.search(r"serving +(http://\S+)/v1", line):
                self.url = found[1]
                self._ready.set()
        self._ready.set()

    def wait_ready(self):
        assert self._ready.wait(180)
        assert self.url, self.err
        return self

    def client(self, **options):
        return openai.OpenAI(base_url=f"{self.url}/v1", **(CLIENT | options))

    def async_client(self, **options):
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", **(CLIENT | options))

    def get(self, path):
        """Status and body."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def figures(self):
        """What /metrics counts, by name and labels."""
        lines = [line.rsplit(" ", 1) for line in self.get("/metrics")[1].splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in lines}

    def pages_used(self):
        return sum(value for name, value in self.figures().items() if name.startswith("kv_cache_pages_used"))

    def ranks(self):
        """Pids of the ranks."""
        return sorted(pid for pid, line in self.left().items() if line.startswith(b"ray::Rank"))

    def interrupt(self, timeout=60):
        """Ctrl-C, as a terminal sends it to all processes; return the exit status."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(timeout)

    def left(self):
        """Live processes of it: command lines by pid."""
        found = {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes():
                    found[int(entry.name)] = (entry / "cmdline").read_bytes()
            except OSError:
                continue
        return found

    def end(self):
        """End it, if it still runs, whatever it does."""
        if self.process.poll() is None:
            try:
                self.interrupt(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()
        self._listener.join(10)
        self.process.stderr.close()


@contextmanager
def serving(*overrides, model=TINY, recipe="llm/local", ready=True, environment=()):
    """Run the command until the block ends; begin it when the server is ready, or at once."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment = inherited | {MARK: uuid.uuid4().hex} | dict(environment)
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        environment["TMPDIR"] = folder
        given = [f"recipe={recipe}", "job=serve", "job.port=0", f"run.dir={folder}/run", *overrides]
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "launch.py"), *([f"model.path={model}"] if model else []), *given],
            stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
        )  # fmt: skip
        server = Server(process, environment[MARK])
        try:
            yield server.wait_ready() if ready else server
        finally:
            server.end()
