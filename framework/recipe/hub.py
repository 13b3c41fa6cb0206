"""hf://, modelscope://org/name[@revision][/file]: what a model needs of a repository, never a pickle.

Two hubs, one way: a hub lists a repository's files and where they are. Its headers, or all of it, are brought here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

from framework.errors import InputError, Problem, nearest
from framework.recipe import huggingface, modelscope
from framework.recipe.cache import mismatch
from framework.recipe.remote import (
    HeaderBytes,
    Progress,
    Repository,
    Unreachable,
    fetch_failed,
    fetch_headers,
    fetch_whole,
    find_whole,
    recall,
    remember,
)

MAX_SIDE_BYTES = 100 << 20  # larger ones are no side files: no reader of ours takes them

_SOURCE = re.compile(r"([\w.-]+/[\w.-]+)(?:@([\w.%/-]+?))?(?:/(.+))?")
_PART = re.compile(r"(.*)-\d{5}-of-(\d{5})\.(gguf|safetensors)")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
_SIDE_FILES = (".json", ".jinja", ".model", ".tiktoken", ".txt")
_OPEN = {"hf": huggingface.open_repository, "modelscope": modelscope.open_repository}


def fetch_repository(
    scheme: str, source: str, report: Progress, *, sha256: str | None = None, header_bytes: HeaderBytes | None = None
) -> Path:
    """Return the local folder of a repository, or the file of it that was named, fetching what is not cached.

    Args:
        scheme: `hf` or `modelscope`.
        source: `org/name[@revision][/file]`.
        report: progress.
        sha256: what the named file must hash to; looked at here where only headers come, and the hub tells it.
        header_bytes: if given, the headers are enough: a folder without weights may be returned.

    Raises:
        InputError: `source-syntax`, `fetch-failed`, `file-ambiguous`, `pickle`, `sha256-mismatch`.
        Refused: `disk-full`.
    """
    name, revision, file = _parse(scheme, source)
    shown, headers = f"{scheme}://{source}", header_bytes is not None
    try:
        repository = _OPEN[scheme](name, revision)
    except Unreachable as error:
        folder, digest = _offline(shown, name, revision, headers=headers)
        if folder is None or (file and not (folder / file).is_file()):
            raise fetch_failed(scheme, name, revision, f"it is not in the cache, and {error}") from error
        path = folder / (file or _one(wanted_files([*_files(folder)], None, shown)))
    else:
        wanted = wanted_files(list(repository.files), file, f"{scheme}://{name}")
        one = file or _one(wanted)
        folder = (
            _headers(repository, wanted, header_bytes, report) if header_bytes else _whole(repository, wanted, report)
        )
        path, digest = folder / one, repository.files[one].sha256 if one else None
        remember("headers" if headers else "whole", shown, folder, digest)
    if headers and sha256 and digest and sha256.lower() != digest:
        raise mismatch(shown, sha256, digest, "mend model.sha256, or do not use this file")
    return path


def _whole(repository: Repository, wanted: Sequence[str], report: Progress) -> Path:
    fetch = huggingface.fetch if repository.scheme == "hf" else fetch_whole
    return fetch(repository, wanted, report)


def _headers(repository: Repository, wanted: Sequence[str], header_bytes: HeaderBytes, report: Progress) -> Path:
    """Return a folder with headers: the model itself where it is here already."""
    find = huggingface.cached if repository.scheme == "hf" else find_whole
    small = [n for n in wanted if not n.endswith(_SIDE_FILES) or repository.files[n].size <= MAX_SIDE_BYTES]
    return find(repository, wanted) or fetch_headers(repository, small, header_bytes, report)


def wanted_files(names: Sequence[str], file: str | None, repo: str) -> list[str]:
    """Choose what is needed of a repository's files; `repo` is its source, for messages.

    A named file brings its siblings of a split and the small files beside it. Otherwise: the safetensors of
    the top folder (of all folders for a Diffusers pipeline), else the one GGUF there is, and the small files.
    """
    if file is not None:
        if file.endswith(_PICKLES):
            raise _pickle(repo, file)
        if file not in names:
            near = nearest(file, names, count=3, cutoff=0.4)
            raise InputError(
                Problem("fetch-failed", f"the repository holds no {file}", repo,
                        f"nearest: {', '.join(near)}" if near else "",
                        f"{repo}/{near[0]}" if near else "")
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
                Problem("file-ambiguous", f"the repository holds {len(first)} GGUF files", repo,
                        ", ".join(sorted(first.values())[:8]), f"{repo}/{sorted(first.values())[0]}")
            )  # fmt: skip
        weights = [part for n in first.values() for part in _with_siblings(n, names)]
    if not weights:
        pickles = [n for n in here if n.endswith(_PICKLES)]
        raise _pickle(repo, pickles[0]) if pickles else InputError(
            Problem("fetch-failed", "the repository holds neither safetensors nor GGUF files", repo,
                    f"its files: {', '.join(list(names)[:10])}")
        )  # fmt: skip
    return [*weights, *(n for n in here if n.endswith(_SIDE_FILES) and n not in weights)]


def _parse(scheme: str, source: str) -> tuple[str, str | None, str | None]:
    match = _SOURCE.fullmatch(source)
    if match is None or (match[3] and ".." in match[3].split("/")) or match[1].endswith((".", "/..")):
        raise InputError(
            Problem("source-syntax", "this does not name a repository", f"{scheme}://{source}",
                    f"a source is {scheme}://org/name[@revision][/file]", f"{scheme}://Qwen/Qwen3-0.6B")
        )  # fmt: skip
    return match[1], unquote(match[2]) if match[2] else None, match[3]


def _with_siblings(file: str, names: Sequence[str]) -> list[str]:
    match = _PART.fullmatch(file)
    if match is None:
        return [file]
    pattern = re.compile(rf"{re.escape(match[1])}-\d{{5}}-of-{match[2]}\.{match[3]}")
    return [name for name in names if pattern.fullmatch(name)]


def _one(wanted: Sequence[str]) -> str:
    """The first file of a repository of GGUF alone; any other is its folder."""
    return min((name for name in wanted if name.endswith(".gguf")), default="")


def _files(folder: Path) -> Iterator[str]:
    return (str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def _offline(shown: str, name: str, revision: str | None, *, headers: bool) -> tuple[Path | None, str | None]:
    """Return what the caches have of a source, and the digest of the file it names: weights first, then headers."""
    found = recall("whole", shown) or (recall("headers", shown) if headers else None)
    if found is None and shown.startswith("hf://"):
        return huggingface.offline(name, revision), None
    return found or (None, None)


def _pickle(repo: str, file: str) -> InputError:
    return InputError(
        Problem("pickle", f"{file} is a pickle, it could run code when opened", repo,
                "only safetensors and GGUF are read", "a revision that holds safetensors: hf://org/name@refs%2Fpr%2F1")
    )  # fmt: skip
