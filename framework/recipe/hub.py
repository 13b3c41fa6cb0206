"""hf://org/name[@revision][/file]: what a model needs of a Hugging Face repository, never a pickle."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from framework.errors import InputError, Problem, Refused, nearest
from framework.recipe.secrets import mask_secrets

Progress = Callable[[str, int, int], None]

_SOURCE = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.%/-]+?))?(?:/(.+))?")
_PART = re.compile(r"(.*)-\d{5}-of-(\d{5})\.(gguf|safetensors)")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
_SIDE_FILES = (".json", ".jinja", ".model", ".tiktoken", ".txt")


def fetch_repository(source: str, report: Progress) -> Path:
    """Return the local folder of a repository, or the file of it that was named, fetching what is not cached.

    Raises:
        InputError: `source-syntax`, `fetch-failed`, `file-ambiguous`, `pickle`.
        Refused: `disk-full`.
    """
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    repo, revision, file = _parse(source)
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    offline: tuple[type[Exception], ...] = (LocalEntryNotFoundError, ConnectionError, *_transport_errors())
    try:
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    except HfHubHTTPError as error:
        raise _failed(repo, revision, str(error)) from error
    except offline as error:
        return _cached(repo, revision, file, str(error))
    sizes = {s.rfilename: s.size or 0 for s in info.siblings or ()}
    wanted = wanted_files(list(sizes), file, repo)
    total = sum(sizes[name] for name in wanted)
    report("fetch", 0, total)
    try:
        folder = Path(
            snapshot_download(repo, revision=revision, allow_patterns=[_literal(name) for name in wanted],
                              tqdm_class=_reporting(report, total))
        )  # fmt: skip
    except HfHubHTTPError as error:
        raise _failed(repo, revision, str(error)) from error
    except offline as error:
        raise _failed(repo, revision, str(error)) from error
    except OSError as error:
        raise _no_room(repo, total, error) from error
    report("fetch", total, total)
    return folder / file if file else _one(folder, wanted)


def wanted_files(names: Sequence[str], file: str | None, repo: str) -> list[str]:
    """Choose what is needed of a repository's files.

    A named file brings its siblings of a split and the small files beside it. Otherwise: the safetensors of
    the top folder (of all folders for a Diffusers pipeline), else the one GGUF there is, and the small files.
    """
    if file is not None:
        if file.endswith(_PICKLES):
            raise _pickle(repo, file)
        if file not in names:
            near = nearest(file, names, count=3, cutoff=0.4)
            raise InputError(
                Problem("fetch-failed", f"the repository holds no {file}", f"hf://{repo}",
                        f"nearest: {', '.join(near)}" if near else "",
                        f"hf://{repo}/{near[0]}" if near else "")
            )  # fmt: skip
        return [*_with_siblings(file, names), *(n for n in names if "/" not in n and n.endswith(_SIDE_FILES))]
    pipeline = "model_index.json" in names
    here = [n for n in names if pipeline or "/" not in n]
    weights = [n for n in here if n.endswith(".safetensors")]
    if any(not n.startswith("consolidated") for n in weights):
        weights = [n for n in weights if not n.startswith("consolidated")]
    if not weights:
        first = {(_PART.fullmatch(n) or [n, n])[1]: n for n in here if n.endswith(".gguf")}
        if len(first) > 1:
            raise InputError(
                Problem("file-ambiguous", f"the repository holds {len(first)} GGUF files", f"hf://{repo}",
                        ", ".join(sorted(first.values())[:8]), f"hf://{repo}/{sorted(first.values())[0]}")
            )  # fmt: skip
        weights = [part for n in first.values() for part in _with_siblings(n, names)]
    if not weights:
        pickles = [n for n in here if n.endswith(_PICKLES)]
        raise _pickle(repo, pickles[0]) if pickles else InputError(
            Problem("fetch-failed", "the repository holds neither safetensors nor GGUF files", f"hf://{repo}",
                    f"its files: {', '.join(list(names)[:10])}")
        )  # fmt: skip
    return [*weights, *(n for n in here if n.endswith(_SIDE_FILES) and n not in weights)]


def _parse(source: str) -> tuple[str, str | None, str | None]:
    match = _SOURCE.fullmatch(source)
    if match is None or (match[3] and ".." in match[3].split("/")):
        raise InputError(
            Problem("source-syntax", "this does not name a Hugging Face repository", f"hf://{source}",
                    "a source is hf://org/name[@revision][/file]", "hf://Qwen/Qwen3-0.6B")
        )  # fmt: skip
    return match[1], unquote(match[2]) if match[2] else None, match[3]


def _with_siblings(file: str, names: Sequence[str]) -> list[str]:
    match = _PART.fullmatch(file)
    if match is None:
        return [file]
    pattern = re.compile(rf"{re.escape(match[1])}-\d{{5}}-of-{match[2]}\.{match[3]}")
    return [name for name in names if pattern.fullmatch(name)]


def _one(folder: Path, wanted: Sequence[str]) -> Path:
    """A repository of GGUF alone is its first file, any other is its folder."""
    ggufs = sorted(name for name in wanted if name.endswith(".gguf"))
    return folder / ggufs[0] if ggufs else folder


def _cached(repo: str, revision: str | None, file: str | None, why: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # a pattern that matches nothing: asking for all files would miss those that were never wanted
        folder = Path(snapshot_download(repo, revision=revision, local_files_only=True, allow_patterns=["<none>"]))
    except LocalEntryNotFoundError as error:
        raise _failed(repo, revision, why) from error
    names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    if file and file not in names:
        raise _failed(repo, revision, f"{file} is not in the cache, and {why}")
    return folder / file if file else _one(folder, wanted_files(names, None, repo))


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


def _transport_errors() -> tuple[type[Exception], ...]:
    """The errors of a lost connection, of whichever HTTP library huggingface_hub uses."""
    modules = [sys.modules[name] for name in ("httpx2", "httpx", "requests") if name in sys.modules]
    found = [getattr(module, name, None) for module in modules for name in ("HTTPError", "RequestException")]
    return tuple(error for error in found if error is not None)


def _literal(name: str) -> str:
    """A file name as a glob that matches nothing else."""
    return re.sub(r"([*?[])", r"[\1]", name)


def _failed(repo: str, revision: str | None, why: str) -> InputError:
    first = next((line for line in mask_secrets(why).splitlines() if line.strip()), "no answer")
    at = f"@{revision}" if revision else ""
    return InputError(
        Problem("fetch-failed", f"{repo} could not be fetched from the hub", f"hf://{repo}{at}", first,
                f"fetch it elsewhere (hf download {repo}), then model.path=/the/folder\n"
                "a private or gated repository wants HF_TOKEN, a mirror HF_ENDPOINT")
    )  # fmt: skip


def _pickle(repo: str, file: str) -> InputError:
    return InputError(
        Problem("pickle", f"{file} is a pickle, it could run code when opened", f"hf://{repo}",
                "only safetensors and GGUF are read", "a revision that holds safetensors: hf://org/name@refs%2Fpr%2F1")
    )  # fmt: skip


def _no_room(repo: str, total: int, error: OSError) -> Exception:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Refused(
            Problem("disk-full", "the disk is full", f"hf://{repo}", f"{total / 2**30:.1f} GiB are needed",
                    "free some space, or HF_HOME=/another/disk")
        )  # fmt: skip
    return _failed(repo, None, str(error))
