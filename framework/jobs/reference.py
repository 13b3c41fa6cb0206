"""Reference logits from a file: .npz (`prompt{k}.input_ids`, `prompt{k}.logits...`) or .safetensors."""

from __future__ import annotations

import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from framework.errors import InputError, Problem

if TYPE_CHECKING:
    import numpy as np

# where a file holds several, the first of these is the one that the same computation should reproduce
PREFERRED = ("logits", "logits_sim", "logits_dequant_fp32")


@dataclass(frozen=True)
class Reference:
    """One prompt: token ids and logits [T, vocab] fp32."""

    ids: list[int]
    logits: np.ndarray[Any, Any]


def read_reference(path: Path, logits_key: str | None) -> list[Reference]:
    """Read all prompts of a reference file. Nothing is unpickled.

    Raises:
        InputError: `reference-file`, `reference-key`.
    """
    arrays = read_arrays(path)
    found = ((re.fullmatch(r"prompt(\d+)\.input_ids|input_ids_(\d+)", name), name) for name in arrays)
    prompts = {int(match[1] or match[2]): name for match, name in found if match}
    if not prompts:
        raise _bad_key(path, "token ids", arrays)
    return [
        Reference([int(i) for i in arrays[name]], _logits(path, arrays, k, logits_key, len(arrays[name])))
        for k, name in sorted(prompts.items())
    ]


def read_arrays(path: Path) -> dict[str, Any]:
    """Read all arrays of an .npz or .safetensors file, by name. Nothing is unpickled.

    Raises:
        InputError: `reference-file`.
    """
    if not path.is_file():
        raise InputError(
            Problem("reference-file", "the reference is not there", str(path), fix="job.reference=FILE.npz")
        )
    return _npz(path) if path.suffix == ".npz" else _safetensors(path)


def _logits(path: Path, arrays: dict[str, Any], k: int, key: str | None, tokens: int) -> Any:  # noqa: ANN401
    held = {
        name.removeprefix(f"prompt{k}.") if name.startswith("prompt") else "logits": name
        for name, array in arrays.items()
        if (name.startswith(f"prompt{k}.logits") or name == f"logits_{k}")
        and array.ndim == 2
        and array.shape[0] == tokens
    }
    chosen = key if key in held else None if key else next((name for name in PREFERRED if name in held), None)
    if chosen is None:
        raise _bad_key(path, f"{key or 'logits'} of prompt {k}", arrays)
    import numpy as np

    return arrays[held[chosen]].astype(np.float32)


def _npz(path: Path) -> dict[str, Any]:
    import numpy as np

    try:
        with zipfile.ZipFile(path):  # an array alone, or a pickle, is no archive
            pass
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            Problem("reference-file", f"the reference cannot be read: {error}", str(path), "only plain arrays are read")
        ) from error


def _safetensors(path: Path) -> dict[str, Any]:
    from framework.checkpoint.open import open_index
    from framework.checkpoint.reader import Reader

    types = {"F32": "<f4", "F64": "<f8", "F16": "<f2", "I64": "<i8", "I32": "<i4"}
    index = open_index(path)
    arrays = {}
    with Reader() as reader:
        for name, info in index.tensors.items():
            if info.dtype in types:
                rows = info.shape[0] if len(info.shape) > 1 else 1
                arrays[name] = reader.read(info, 0, rows).reshape(-1).view(types[info.dtype]).reshape(info.shape)
    return arrays


def _bad_key(path: Path, what: str, arrays: dict[str, Any]) -> InputError:
    names = ", ".join(sorted(arrays)[:12])
    return InputError(
        Problem(
            "reference-key",
            f"the reference holds no {what}",
            str(path),
            f"it holds: {names}; wanted: prompt0.input_ids and prompt0.logits (npz), "
            "input_ids_0 and logits_0 (safetensors), one row of logits per token",
            "job.logits_key=NAME of those after `prompt0.`",
        )
    )
