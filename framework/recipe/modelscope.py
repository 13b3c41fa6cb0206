"""The ModelScope hub, through its public HTTP API; environment names are those of its own client."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from framework.recipe.remote import (
    PATIENCE_S,
    RemoteFile,
    Repository,
    Unreachable,
    fetch_failed,
    safe_files,
    transport_errors,
)

DEFAULT_ENDPOINT = "https://modelscope.cn"
DEFAULT_REVISION = "master"


def open_repository(name: str, revision: str | None) -> Repository:
    """Ask the hub what a repository holds. The listing names no commit: the digest of its files stands for one.

    Raises:
        Unreachable: the hub does not answer, or HF_HUB_OFFLINE is set.
        InputError: `fetch-failed`.
    """
    from huggingface_hub import get_session

    token = os.environ.get("MODELSCOPE_API_TOKEN")
    headers = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}
    base, asked = f"{_endpoint()}/api/v1/models/{name}", revision or DEFAULT_REVISION
    query = urlencode({"Revision": asked, "Recursive": "true"})
    try:
        answer = get_session().get(f"{base}/repo/files?{query}", headers=headers, timeout=PATIENCE_S)
    except transport_errors() as error:
        raise Unreachable(str(error)) from error
    try:
        said = answer.json()
        listed = said["Data"]["Files"] if answer.status_code == 200 else None
        files = {entry["Path"]: _file(base, asked, entry) for entry in listed or () if entry.get("Type") != "tree"}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise fetch_failed("modelscope", name, revision, "the answer is no listing of files") from error
    if not files:
        told = said.get("Message") if isinstance(said, Mapping) else None
        why = f"the hub answers {answer.status_code}" + (f": {told}" if told else "")
        raise fetch_failed("modelscope", name, revision, why)
    state = json.dumps(sorted((path, file.size, file.sha256, file.url) for path, file in files.items()))
    commit = hashlib.sha256(state.encode()).hexdigest()[:40]
    return Repository("modelscope", name, revision, commit, safe_files(files), headers)


def _endpoint() -> str:
    given = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or DEFAULT_ENDPOINT
    return (given if "://" in given else f"https://{given}").rstrip("/")


def _file(base: str, asked: str, entry: Mapping[str, Any]) -> RemoteFile:
    """A file is asked for by the commit that last changed it, where the listing says which."""
    query = urlencode({"Revision": entry.get("Revision") or asked, "FilePath": entry["Path"]})
    return RemoteFile(int(entry.get("Size") or 0), entry.get("Sha256") or None, f"{base}/repo?{query}")
