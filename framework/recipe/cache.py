"""The cache of fetched files: its place, digests that are not computed twice, folders of work that vanish."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from framework.errors import InputError, Problem, Refused

CHUNK_BYTES = 1 << 20
STALE_S = 3600.0


def cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/npu-launch`, by default below ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path("~/.cache").expanduser())
    return Path(base) / "npu-launch"


def check_digest(path: Path, records: Path, expected: str | None, report: Callable[[str, int, int], None]) -> str:
    """Return the SHA-256 of a file, from the record of an earlier call where size and time are unchanged.

    Args:
        path: the file.
        records: the record itself if it ends in `.sha256`, else the folder of records.
        expected: the digest it must have.
        report: progress, with the stage `verify`.

    Raises:
        InputError: `sha256-mismatch`.
    """
    if records.suffix != ".sha256":
        records = records / f"{hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:32]}.sha256"
    state = path.stat()
    digest = _recorded(records, state)
    if digest is None:
        digest = _hash(path, state.st_size, report)
        write_record(records, path, digest)
    if expected is not None and digest != expected.lower():
        fix = f"model.sha256={digest}  if this file is meant   or   fetch it again"
        raise mismatch(str(path), expected, digest, fix)
    return digest


def write_record(record: Path, path: Path, digest: str) -> None:
    """Remember a digest. A cache that cannot be written is no reason to stop."""
    state = path.stat()
    data = {"sha256": digest, "size": state.st_size, "mtime_ns": state.st_mtime_ns}
    with contextlib.suppress(OSError):
        record.parent.mkdir(parents=True, exist_ok=True)
        temporary = record.with_name(f"{record.name}.{os.getpid()}")
        temporary.write_text(json.dumps(data), encoding="utf-8")
        temporary.replace(record)


def mismatch(where: str, expected: str, digest: str, fix: str) -> InputError:
    """Make the error of a file that is not the one the recipe names."""
    what = "the file is not the one that model.sha256 names"
    return InputError(Problem("sha256-mismatch", what, where, f"expected {expected}\nit has   {digest}", fix))


@contextlib.contextmanager
def work_folder() -> Iterator[Path]:
    """Yield a folder of the cache's file system; it is gone afterwards, however the block ends.

    Raises:
        Refused: `disk-full`, also when the block runs out of space.
        InputError: `cache-unwritable`.
    """
    root = cache_dir() / "tmp"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        folder = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=root))
    except OSError as error:
        raise _unwritable(error) from error
    try:
        yield folder
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise disk_full() from error
        raise
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        for empty in (root, root.parent):
            with contextlib.suppress(OSError):
                empty.rmdir()


def disk_full(needed_bytes: int = 0) -> Refused:
    """Make the refusal of a cache without room."""
    there = cache_dir()
    while not there.exists():
        there = there.parent
    free = shutil.disk_usage(there).free
    asked = f"{needed_bytes / 2**20:.0f} MiB are needed, " if needed_bytes else ""
    return Refused(
        Problem("disk-full", "the disk is full, nothing was kept of the fetch", str(cache_dir()),
                f"{asked}{free / 2**20:.0f} MiB are free", "free some space, or XDG_CACHE_HOME=/another/disk")
    )  # fmt: skip


def _recorded(record: Path, state: os.stat_result) -> str | None:
    try:
        data = json.loads(record.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(data, dict) or (data.get("size"), data.get("mtime_ns")) != (
        state.st_size,
        state.st_mtime_ns,
    ):
        return None
    digest = data.get("sha256")
    return digest if isinstance(digest, str) else None


def _hash(path: Path, total: int, report: Callable[[str, int, int], None]) -> str:
    digest, done = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            report("verify", done, total)
    return digest.hexdigest()


def _sweep(root: Path) -> None:
    """Remove what killed processes left."""
    for folder in root.iterdir():
        pid = folder.name.split("-")[0]
        with contextlib.suppress(OSError):
            old = time.time() - folder.stat().st_mtime > STALE_S
            if pid.isdigit() and not Path(f"/proc/{pid}").exists() and (old or Path("/proc/self").exists()):
                shutil.rmtree(folder, ignore_errors=True)


def _unwritable(error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full()
    return InputError(
        Problem("cache-unwritable", f"the cache cannot be written: {error.strerror}", str(cache_dir()),
                fix="XDG_CACHE_HOME=/a/folder/you/can/write")
    )  # fmt: skip
