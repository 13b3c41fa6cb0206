"""A hub on the loopback interface that speaks the protocols of both, counts what it serves, and can misbehave."""

import hashlib
import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORIES = {"hf": "hf://org/name", "modelscope": "modelscope://org/name"}


class Hub(ThreadingHTTPServer):
    """What it holds, what it does wrong, what it saw."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files = {}  # bytes by name
        self.ranges = True
        self.lies = {}  # a size of a file that is listed and not so
        self.drops = self.busy = 0  # answers that will break off in the middle, and that will be 503
        self.pause_s = 0.0  # after each piece
        self.token = ""  # what requests must show
        self.seen, self.served = [], 0

    @property
    def size(self):
        return sum(map(len, self.files.values()))

    def environment(self, folder):
        """What points both clients here, with caches of their own."""
        return {"HF_ENDPOINT": self.url, "HF_HOME": str(folder / "hf"), "MODELSCOPE_ENDPOINT": self.url,
                "XDG_CACHE_HOME": str(folder / "cache")}  # fmt: skip


class Handler(BaseHTTPRequestHandler):
    """The routes that a listing, a snapshot and a range need."""

    def do_HEAD(self):
        self.route(body=False)

    def do_GET(self):
        self.route(body=True)

    def route(self, *, body):
        hub, url = self.server, urlsplit(self.path)
        path, asked = unquote(url.path), {key: values[0] for key, values in parse_qs(url.query).items()}
        hub.seen.append(path)
        sizes = {name: hub.lies.get(name, len(data)) for name, data in hub.files.items()}
        if hub.token and hub.token not in self.headers.get("Authorization", ""):
            self.reply(401, b'{"Message": "who are you?"}', body)
        elif path.startswith("/api/models/org/name/tree/"):
            self.reply_json([{"type": "file", "path": n, "size": sizes[n], "oid": "0" * 40} for n in hub.files], body)
        elif path.startswith("/api/models/org/name"):
            siblings = [{"rfilename": n, "size": sizes[n], "blobId": "0" * 40,
                         "lfs": {"size": sizes[n], "sha256": sha256(d), "pointerSize": 100}}
                        for n, d in hub.files.items()]  # fmt: skip
            self.reply_json({"id": "org/name", "sha": COMMIT, "siblings": siblings, "private": False}, body)
        elif path == "/api/v1/models/org/name/repo/files":
            files = [{"Path": n, "Type": "blob", "Size": sizes[n], "Sha256": sha256(d), "Revision": COMMIT}
                     for n, d in hub.files.items()]  # fmt: skip
            self.reply_json({"Data": {"Files": [{"Path": "folder", "Type": "tree", "Size": 0}, *files]}}, body)
        elif path == "/api/v1/models/org/name/repo" and asked["FilePath"] in hub.files:
            self.reply_file(hub.files[asked["FilePath"]], body)
        elif (match := re.fullmatch(r"/org/name/resolve/[^/]+/(.+)", path)) and match[1] in hub.files:
            self.reply_file(hub.files[match[1]], body)
        else:
            self.reply(404, b'{"Message": "there is no such model"}', body, {"X-Error-Code": "RepoNotFound"})

    def reply_json(self, document, body):
        self.reply(200, json.dumps(document).encode(), body)

    def reply_file(self, data, body):
        hub, status = self.server, 200
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{sha256(data)}"'}
        if body and hub.busy:
            hub.busy -= 1
            self.reply(503, b"", body)
            return
        if hub.ranges and (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            begin, end = int(asked[1]), min(int(asked[2] or len(data)) + 1, len(data))
            headers["Content-Range"], status = f"bytes {begin}-{end - 1}/{len(data)}", 206
            data = data[begin:end]
        drop = body and hub.drops > 0
        hub.drops -= drop
        self.reply(status, data, body, headers, stop=len(data) // 2 if drop else len(data))

    def reply(self, status, data, body, headers=None, stop=None):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if not body:
            return
        for start in range(0, stop or len(data), 16384):
            piece = data[start : min(start + 16384, stop or len(data))]
            try:
                self.wfile.write(piece)
            except OSError:  # the other side hung up
                return
            self.server.served += len(piece)
            time.sleep(self.server.pause_s)

    def log_message(self, *arguments):
        """Say nothing."""


def sha256(data):
    return hashlib.sha256(data).hexdigest()


@contextmanager
def running():
    """Serve while the block runs."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()
