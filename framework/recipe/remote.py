"""A repository on a hub: its files read by ranges, side by side, into folders that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from framework.errors import InputError, Problem
from framework.recipe.cache import CHUNK_BYTES, cache_dir, disk_full, mismatch, work_folder
from framework.recipe.secrets import mask_secrets

Progress = Callable[[str, int, int], None]
# path (for messages), the first bytes of a file, its size -> bytes that its header takes; more than given: go on
HeaderBytes = Callable[[Path, bytes, int], int]

FIRST_BYTES = 64 << 10  # holds the header of most files of a split
ATTEMPTS, WAIT_S, PATIENCE_S = 4, 0.25, 20.0  # the first wait between attempts; of one read
HEADER_WORKERS, FILE_WORKERS = 16, 8
_MAX_FILE_BYTES = 1 << 43  # no file is that large, and no file system refuses a hole of that size
_PASSING = (408, 429, 500, 502, 503, 504)
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")
_ELSEWHERE = {
    "hf": "fetch it elsewhere (hf download {0}), then model.path=/the/folder\n"
    "a private or gated repository wants HF_TOKEN, a mirror HF_ENDPOINT",
    "modelscope": "fetch it elsewhere (modelscope download --model {0}), then model.path=/the/folder\n"
    "a private repository wants MODELSCOPE_API_TOKEN, another site MODELSCOPE_ENDPOINT",
}


class Unreachable(Exception):
    """A hub does not answer, or must not be asked."""


class _Cancelled(Exception):
    """Another file failed, or the user interrupts."""


class _Passing(Exception):
    """An answer that may be another one in a moment."""


@dataclass(frozen=True)
class RemoteFile:
    """One file: its size, its digest where the hub tells it, where it is."""

    size: int
    sha256: str | None
    url: str


@dataclass(frozen=True)
class Repository:
    """A repository in one state, named by `commit`; `headers` go with every request."""

    scheme: str
    name: str
    revision: str | None
    commit: str
    files: Mapping[str, RemoteFile]
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    def failed(self, why: str) -> InputError:
        """Make the error of a fetch that did not work."""
        return fetch_failed(self.scheme, self.name, self.revision, why)


def fetch_failed(scheme: str, name: str, revision: str | None, why: str) -> InputError:
    """Make the error of a repository that could not be fetched."""
    first = next((line for line in mask_secrets(why).splitlines() if line.strip()), "no answer")
    at = f"@{revision}" if revision else ""
    return InputError(
        Problem("fetch-failed", f"{name} could not be fetched from the hub", f"{scheme}://{name}{at}", first,
                _ELSEWHERE[scheme].format(name))
    )  # fmt: skip


def safe_files(files: Mapping[str, RemoteFile]) -> dict[str, RemoteFile]:
    """Leave out what a folder cannot hold: names that lead out of it, sizes that cannot be."""
    return {
        name: file
        for name, file in files.items()
        if 0 <= file.size < _MAX_FILE_BYTES
        and not ("\\" in name or "\0" in name or PurePosixPath(name).is_absolute() or ".." in name.split("/"))
    }


def transport_errors() -> tuple[type[Exception], ...]:
    """The errors of a lost connection, of whichever HTTP library huggingface_hub uses."""
    modules = [sys.modules[name] for name in ("httpx2", "httpx", "requests") if name in sys.modules]
    found = [getattr(module, name, None) for module in modules for name in ("HTTPError", "RequestException")]
    return (ConnectionError, *(error for error in found if error is not None))


def fetch_headers(repository: Repository, names: Sequence[str], header_bytes: HeaderBytes, report: Progress) -> Path:
    """Return a folder with these files, of which the large ones are a header and a hole of the right size.

    It lies in the cache under the commit's hash, apart from what holds weights.

    Raises:
        InputError: `fetch-failed`, `cache-unwritable`; whatever `header_bytes` raises.
        Refused: `disk-full`.
    """
    target = _place("headers", repository, names)
    if target.is_dir():
        return target
    tally = _Tally(report, "headers", 0)
    with work_folder() as folder:

        def fetch(name: str, cancelled: threading.Event) -> None:
            size = repository.files[name].size
            where = Path(repository.name, name)
            have, wanted = bytearray(), min(size, FIRST_BYTES)
            while len(have) < wanted:
                before = len(have)
                for chunk in _read(repository, name, before, wanted, cancelled):
                    have += chunk
                tally.add(len(have) - before)
                wanted = header_bytes(where, bytes(have), size)
            path = folder / "files" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as out:
                out.write(have[:wanted])
                out.truncate(size)

        _side_by_side(fetch, names, HEADER_WORKERS)
        _put(folder / "files", target)
    return target


def fetch_whole(repository: Repository, names: Sequence[str], report: Progress) -> Path:
    """Return a folder with these files, as links to the cache's one copy of each; what has come is not fetched again.

    Raises:
        InputError: `fetch-failed`, `sha256-mismatch`, `cache-unwritable`.
        Refused: `disk-full`.
    """
    if found := find_whole(repository, names):
        return found
    target = _place("whole", repository, names)
    blobs = {name: _blob(repository.files[name]) for name in names}
    missing = [name for name, blob in blobs.items() if not blob.is_file()]
    tally = _Tally(report, "fetch", sum(repository.files[name].size for name in missing))
    with work_folder() as folder:
        if tally.total > (free := _free_bytes(folder)):
            raise disk_full(tally.total - free)

        def fetch(name: str, cancelled: threading.Event) -> None:
            file, part = repository.files[name], folder / blobs[name].name
            digest = hashlib.sha256()
            with part.open("wb") as out:
                for chunk in _read(repository, name, 0, file.size, cancelled):
                    out.write(chunk)
                    digest.update(chunk)
                    tally.add(len(chunk))
                out.flush()
                os.fsync(out.fileno())
            if file.sha256 is not None and digest.hexdigest() != file.sha256:
                fix = "nothing was kept of it; run it again"
                raise mismatch(f"{repository.scheme}://{repository.name}/{name}", file.sha256, digest.hexdigest(), fix)
            blobs[name].parent.mkdir(parents=True, exist_ok=True)
            part.replace(blobs[name])

        _side_by_side(fetch, missing, FILE_WORKERS)
        for name, blob in blobs.items():
            link = folder / "files" / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(blob)
        _put(folder / "files", target)
    return target


def find_whole(repository: Repository, names: Sequence[str]) -> Path | None:
    """Return the folder that `fetch_whole` made of these files, if it did."""
    target = _place("whole", repository, names)
    return target if all((target / name).is_file() for name in names) else None


def remember(kind: str, source: str, folder: Path, sha256: str | None) -> None:
    """Note which folder a source was last, for the time when its hub cannot be asked."""
    record = _record(kind, source)
    record.parent.mkdir(parents=True, exist_ok=True)
    temporary = record.with_name(f"{record.name}.{os.getpid()}")
    temporary.write_text(json.dumps({"folder": str(folder), "sha256": sha256}), encoding="utf-8")
    temporary.replace(record)


def recall(kind: str, source: str) -> tuple[Path, str | None] | None:
    """Return the folder that a source was last, if it is still there, and the digest of the file it named."""
    try:
        said = json.loads(_record(kind, source).read_text(encoding="utf-8"))
        folder, sha256 = Path(said["folder"]), said["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return (folder, sha256) if folder.is_dir() else None


def _record(kind: str, source: str) -> Path:
    return cache_dir() / kind / "refs" / f"{quote(source, safe='')}.json"


def _place(kind: str, repository: Repository, names: Iterable[str]) -> Path:
    chosen = hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()[:12]
    own = repository.name.split("/")[-1]  # messages name a folder by its last part
    return cache_dir() / kind / repository.scheme / repository.name / repository.commit / chosen / own


def _put(made: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        made.rename(target)
    except OSError:
        if not target.is_dir():  # else another process was first, with the same files
            raise


def _blob(file: RemoteFile) -> Path:
    return (
        cache_dir()
        / "whole"
        / "blobs"
        / (file.sha256 or hashlib.sha256(f"{file.url} {file.size}".encode()).hexdigest())
    )


def _free_bytes(folder: Path) -> int:
    state = os.statvfs(folder)
    return state.f_bavail * state.f_frsize


class _Tally:
    """Bytes that have come, of all threads."""

    def __init__(self, report: Progress, stage: str, total: int) -> None:
        self.total = total
        self._report, self._stage = report, stage
        self._done, self._lock = 0, threading.Lock()
        report(stage, 0, total)

    def add(self, count: int) -> None:
        with self._lock:
            self._done += count
            self._report(self._stage, self._done, self.total)


def _side_by_side(work: Callable[[str, threading.Event], None], names: Iterable[str], workers: int) -> None:
    """Do the work for each name in some threads; the first that fails, or an interrupt, ends all of them."""
    cancelled = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        pending = [pool.submit(work, name, cancelled) for name in names]
        try:
            for done in as_completed(pending):
                done.result()
        except BaseException:
            cancelled.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _read(repository: Repository, name: str, start: int, stop: int, cancelled: threading.Event) -> Iterator[bytes]:
    """Yield bytes `start` to `stop` of a file; a connection that breaks is taken up where it broke.

    Raises:
        InputError: `fetch-failed`.
    """
    why = ""
    passing: tuple[type[Exception], ...] = (_Passing, *transport_errors())
    for attempt in range(ATTEMPTS):
        if attempt:
            cancelled.wait(WAIT_S * 4 ** (attempt - 1))
        try:
            for chunk in _answer(repository, name, start, stop):
                if cancelled.is_set():
                    raise _Cancelled
                start += len(chunk)
                yield chunk
            if start == stop:
                return
            why = f"the answer ends at byte {start} of {repository.files[name].size}"
        except passing as error:
            why = str(error) or type(error).__name__
    raise repository.failed(f"{name}: {why}")


def _answer(repository: Repository, name: str, start: int, stop: int) -> Iterator[bytes]:
    """Yield what one request brings of the bytes `start` to `stop`."""
    if start == stop:
        return
    from huggingface_hub import get_session

    headers = {**repository.headers, "Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
    file = repository.files[name]
    with get_session().stream("GET", file.url, headers=headers, timeout=PATIENCE_S) as answer:
        skip = start - _begins(repository, name, answer, start)
        left = stop - start
        for chunk in answer.iter_raw(CHUNK_BYTES):
            taken = chunk[skip : skip + left]
            skip, left = max(0, skip - len(chunk)), left - len(taken)
            if taken:
                yield taken
            if not left:  # a server that knows no ranges goes on: hang up
                return


def _begins(repository: Repository, name: str, answer: Any, start: int) -> int:  # noqa: ANN401 - httpx or httpx2
    """Return the byte at which an answer begins: 0 of a server that knows no ranges.

    Raises:
        InputError: `fetch-failed`.
    """
    size, status = repository.files[name].size, answer.status_code
    if status in _PASSING:
        raise _Passing(f"the server answers {status}")
    begin, total = 0, answer.headers.get("Content-Length", "*")
    if status == 206:
        match = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        begin, total = (int(match[1]), match[2]) if match else (-1, "*")
    if status not in (200, 206):
        raise repository.failed(f"{name}: the server answers {status}")
    if begin not in (0, start) or answer.headers.get("Content-Encoding", "identity") != "identity":
        raise repository.failed(f"{name}: the server does not answer with the bytes that were asked for")
    if total.isdigit() and int(total) != size:
        raise repository.failed(f"{name}: the hub lists {size} bytes, the server has {total}")
    return begin
