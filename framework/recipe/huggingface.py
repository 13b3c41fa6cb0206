"""The Hugging Face hub, through its own client: its cache, its credentials, its settings."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from framework.errors import Problem, Refused
from framework.recipe.remote import (
    Progress,
    RemoteFile,
    Repository,
    Unreachable,
    fetch_failed,
    safe_files,
    transport_errors,
)


def open_repository(name: str, revision: str | None) -> Repository:
    """Ask the hub what a repository holds.

    Raises:
        Unreachable: the hub does not answer, or HF_HUB_OFFLINE is set.
        InputError: `fetch-failed`.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import HfApi, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    try:
        info = HfApi().model_info(name, revision=revision, files_metadata=True)
    except (HfHubHTTPError, HFValidationError) as error:
        raise fetch_failed("hf", name, revision, str(error)) from error
    except transport_errors() as error:
        raise Unreachable(str(error)) from error
    files = {
        s.rfilename: RemoteFile(
            s.size or 0, s.lfs.sha256 if s.lfs else None, hf_hub_url(name, s.rfilename, revision=info.sha)
        )
        for s in info.siblings or ()
    }
    return Repository("hf", name, revision, str(info.sha), safe_files(files), build_hf_headers())


def cached(repository: Repository, names: Sequence[str]) -> Path | None:
    """Return the folder of the client's cache if it has all of these files."""
    folder = offline(repository.name, repository.commit)
    if folder is None or not all(
        (folder / name).is_file() and (folder / name).stat().st_size == repository.files[name].size for name in names
    ):
        return None
    return folder


def offline(name: str, revision: str | None) -> Path | None:
    """Return the folder of the client's cache for a revision, whatever it holds."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # a pattern that matches nothing: asking for all files would miss those that were never wanted
        return Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=["<none>"]))
    except LocalEntryNotFoundError:
        return None


def fetch(repository: Repository, names: Sequence[str], report: Progress) -> Path:
    """Return the folder of the client's cache, after fetching what it lacks of these files.

    Raises:
        InputError: `fetch-failed`.
        Refused: `disk-full`.
    """
    from huggingface_hub import snapshot_download

    total = sum(repository.files[name].size for name in names)
    report("fetch", 0, total)
    try:
        folder = Path(
            snapshot_download(repository.name, revision=repository.revision,
                              allow_patterns=[_literal(name) for name in names], tqdm_class=_reporting(report, total))
        )  # fmt: skip
    except transport_errors() as error:
        raise repository.failed(str(error)) from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise repository.failed(str(error)) from error
        raise Refused(
            Problem("disk-full", "the disk is full", f"hf://{repository.name}",
                    f"{total / 2**30:.1f} GiB are needed", "free some space, or HF_HOME=/another/disk")
        ) from error  # fmt: skip
    report("fetch", total, total)
    return folder


def _reporting(report: Progress, total: int) -> Any:  # noqa: ANN401
    """A stand-in for tqdm that adds up bytes of all files."""
    from tqdm.auto import tqdm

    done = 0

    class Reporting(tqdm):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
            kwargs.pop("name", None)
            super().__init__(*args, **{**kwargs, "disable": True})
            self.bytes = kwargs.get("unit") == "B"

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal done
            if self.bytes:
                done += int(n or 0)
                report("fetch", min(done, total), total)
            return None

    return Reporting


def _literal(name: str) -> str:
    """A file name as a glob that matches nothing else."""
    return re.sub(r"([*?[])", r"[\1]", name)
