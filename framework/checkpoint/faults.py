"""What can be wrong with a file's structure, as user errors, and the check of its byte ranges."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from framework.checkpoint.index import TensorInfo
from framework.errors import InputError, Problem


def malformed(path: Path, what: str, why: str = "") -> InputError:
    """A file whose structure contradicts itself."""
    return InputError(
        Problem(
            "file-malformed",
            what,
            str(path),
            why or "the header contradicts itself",
            "fetch or convert the file again",
        )
    )


def truncated(path: Path, why: str) -> InputError:
    """A file that ends too early."""
    return InputError(
        Problem(
            "file-truncated",
            f"{path.name} ends too early",
            str(path),
            why,
            "fetch the file again: it is incomplete",
        )
    )


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """Turn what the system says about a file that cannot be read into a user error.

    Raises:
        InputError: `file-missing`, also for a link to nothing; `file-unreadable`.
    """
    try:
        yield
    except FileNotFoundError as error:
        target = f"it is a link to {path.readlink()}, which is not there" if path.is_symlink() else ""
        raise InputError(
            Problem(
                "file-missing",
                f"{path.name} is not there",
                str(path),
                target or "it was named or listed, and cannot be opened",
                "fetch the checkpoint again: it is incomplete",
            )
        ) from error
    except OSError as error:
        raise InputError(
            Problem(
                "file-unreadable",
                f"{path.name} cannot be read",
                str(path),
                f"the system says: {error.strerror or error}",
                "is it a file, and may this user read it?",
            )
        ) from error


def check_ranges(path: Path, infos: Sequence[TensorInfo], start: int, size: int) -> None:
    """Refuse duplicate names and ranges that leave the file or overlap.

    Raises:
        InputError: `file-truncated`, `file-malformed`.
    """
    if len({info.name for info in infos}) != len(infos):
        raise malformed(path, "two tensors have the same name")
    end, before = start, ""
    for info in sorted(infos, key=lambda info: (info.offset, info.nbytes)):
        if info.offset + info.nbytes > size:
            raise truncated(path, f"{info.name} ends at byte {info.offset + info.nbytes}, the file has {size}")
        if info.offset < end:
            raise malformed(path, f"{info.name} overlaps {before or 'the header'}")
        end, before = info.offset + info.nbytes, info.name
