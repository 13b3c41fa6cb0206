"""hf:// against a hub of our own on the loopback interface: the real client, no network."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"
FILES = {
    "config.json": b'{"architectures": ["LlamaForCausalLM"]}',
    "model.safetensors": bytes(1000),
    "pytorch_model.bin": b"never fetched",
    "README.md": b"never fetched",
}


class Hub(BaseHTTPRequestHandler):
    """The routes that a snapshot needs."""

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, *, body):
        path = self.path.split("?")[0]
        self.server.seen.append(path)
        if path.startswith("/api/models/org/name"):
            if "/tree/" in path:
                found = [
                    {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for name, data in FILES.items()
                ]
            else:
                siblings = [{"rfilename": n, "size": len(d), "blobId": "0" * 40} for n, d in FILES.items()]
                found = {"id": "org/name", "sha": COMMIT, "siblings": siblings, "private": False}
            data = json.dumps(found).encode()
            self.reply(200, data, "application/json", {}, body)
        elif (name := path.rsplit("/", 1)[-1]) in FILES and path.startswith("/org/name/resolve/"):
            etag = f'"{hashlib.sha1(FILES[name]).hexdigest()}"'
            self.reply(200, FILES[name], "application/octet-stream", {"X-Repo-Commit": COMMIT, "ETag": etag}, body)
        else:
            self.reply(404, b"{}", "application/json", {"X-Error-Code": "RepoNotFound"}, body)

    def reply(self, status, data, kind, headers, body):
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *arguments):
        """Say nothing."""


@pytest.fixture
def hub():
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.seen = []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def resolve(source, home, port, **environment):
    code = (
        "import sys\nfrom framework.errors import UserError\nfrom framework.recipe.sources import resolve\n"
        "try: print(resolve(sys.argv[1], progress=lambda *r: print(*r, file=sys.stderr)))\n"
        "except UserError as error:\n"
        "    print(error.problems[0].code, error.problems[0].why); sys.exit(error.exit_status)\n"
    )
    root = str(Path(__file__).parents[2])
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()},
        "PYTHONPATH": root, "HF_HOME": str(home), "HF_ENDPOINT": f"http://127.0.0.1:{port}", **environment,
    }  # fmt: skip
    command = [sys.executable, "-c", code, source]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_repository_is_fetched_without_pickles_and_then_needs_no_hub(hub, tmp_path):
    port = hub.server_port
    done = resolve("hf://org/name@main", tmp_path, port)
    assert done.returncode == 0, done.stdout + done.stderr
    folder = Path(done.stdout.strip())
    assert {p.name for p in folder.iterdir()} == {"config.json", "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    total = len(FILES["config.json"]) + len(FILES["model.safetensors"])
    assert done.stderr.splitlines()[-1] == f"fetch {total} {total}"
    assert not any("pytorch_model" in path for path in hub.seen)
    again = resolve("hf://org/name@main", tmp_path, port, HF_HUB_OFFLINE="1")
    assert again.stdout == done.stdout


def test_a_repository_that_is_not_there_and_a_hub_that_is_not_there_are_one_message(hub, tmp_path):
    done = resolve("hf://org/other", tmp_path, hub.server_port)
    assert (done.returncode, done.stdout.split()[0]) == (2, "fetch-failed"), done.stderr
    done = resolve("hf://org/name", tmp_path, 9)
    assert (done.returncode, done.stdout.split()[0]) == (2, "fetch-failed"), done.stderr
