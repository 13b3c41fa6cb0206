"""Open a checkpoint by what it is, not by what it is called."""

from __future__ import annotations

from pathlib import Path

from framework.checkpoint import gguf, safetensors
from framework.checkpoint.faults import readable
from framework.checkpoint.index import Index
from framework.errors import InputError, Problem

_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


def open_index(path: Path) -> Index:
    """Read the headers of a GGUF file, a safetensors file, or a folder with either.

    Raises:
        InputError: `model-missing`, `wrong-magic`, `pickle-refused`, and all that the containers raise.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(
            Problem(
                "model-missing",
                "there is no such file or folder",
                str(path),
                fix="model.path=/where/the/model/is",
            )
        )
    if path.is_dir():
        return _open_folder(path)
    with readable(path), path.open("rb") as file:
        magic = file.read(4)
    if magic == gguf.MAGIC or path.suffix == ".gguf":
        return gguf.read_index(path)
    if magic.startswith(_PICKLE_MAGIC) or path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise safetensors.pickle_refused(path)
    return safetensors.read_index(path)


def header_bytes(path: Path, data: bytes, size: int) -> int:
    """Return how many bytes of a file tell what it holds, from its first bytes; all of one that holds no tensors.

    More than were given: look at so many and ask again.

    Raises:
        InputError: as the readers of headers do.
    """
    match path.suffix:
        case ".gguf":
            return gguf.header_bytes(path, data, size)
        case ".safetensors":
            return safetensors.header_bytes(path, data, size)
        case _:
            return size


def _open_folder(path: Path) -> Index:
    names = sorted(path.glob("*.gguf"))
    if not names or any(path.glob("*.safetensors")):
        return safetensors.read_index(path)
    sets = {gguf.SPLIT.sub(r"\1", name.name) for name in names}
    if len(sets) > 1:
        raise InputError(
            Problem(
                "model-ambiguous",
                f"the folder holds {len(sets)} GGUF models",
                str(path),
                ", ".join(name.name for name in names[:4]),
                f"model.path={names[0]}",
            )
        )
    return gguf.read_index(names[0])
