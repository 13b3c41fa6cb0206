"""Safetensors headers: one file, or a folder with one or many, with or without an index."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

from framework.checkpoint.faults import check_ranges, malformed, readable, truncated
from framework.checkpoint.index import Index, TensorInfo
from framework.errors import InputError, Problem

DTYPE_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4,
    "U16": 2, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip
# Quantizers and diffusers name it after their weights: quant_model_weights..., diffusion_pytorch_model...
INDEX_PATTERN = "*.safetensors.index.json"
# What quantizers write beside the weights.
DOCUMENTS = (
    "quant_model_description*.json",
    "quantize_config.json",
    "quant_config.json",
    "quantization_config.json",
    "generation_config.json",
)
_MAX_HEADER_BYTES = 100 << 20  # the limit of the safetensors library
_MAX_DIMENSIONS, _MAX_EXTENT = 16, 1 << 48  # keep the product of a shape that nobody means a small number
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")


def read_header(path: Path) -> tuple[dict[str, str], list[TensorInfo]]:
    """Read one file's header: its `__metadata__` and its tensors.

    Raises:
        InputError: `file-truncated`, `file-malformed`.
    """
    with readable(path), path.open("rb") as file:
        size = path.stat().st_size
        start = header_bytes(path, file.read(8), size)
        header = _json(path, file.read(start - 8))
    if not isinstance(header, dict):
        raise malformed(path, "the header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    infos = [_info(path, name, entry, start) for name, entry in header.items()]
    check_ranges(path, infos, start, size)
    return metadata if isinstance(metadata, dict) else {}, infos


def header_bytes(path: Path, data: bytes, size: int) -> int:
    """Return how many bytes the header of a file of `size` bytes takes, its length included, from its first eight.

    Raises:
        InputError: `file-truncated`, `file-malformed`.
    """
    length = int.from_bytes(data[:8], "little")
    if size < 8 or length > size - 8:
        raise truncated(path, f"the header takes {length} bytes, the file has {max(size - 8, 0)} after its length")
    if length > _MAX_HEADER_BYTES:
        raise malformed(path, f"a header of {length} bytes is not read", "the limit is 100 MB")
    return 8 + length


def _info(path: Path, name: str, entry: Any, start: int) -> TensorInfo:  # noqa: ANN401
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    except (TypeError, KeyError, ValueError) as error:
        raise malformed(path, f"the entry of {name} lacks dtype, shape or data_offsets") from error
    numbers = (*shape, begin, end)
    if set(map(type, numbers)) != {int} or min(numbers) < 0 or max(numbers) >= _MAX_EXTENT:
        raise malformed(path, f"shape or offsets of {name} are no whole numbers below 2^48")
    if len(shape) > _MAX_DIMENSIONS:
        raise malformed(path, f"{name} has {len(shape)} dimensions")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise malformed(path, f"{name} has the unknown dtype {dtype!r}")
    if end - begin != prod(shape) * DTYPE_BYTES[dtype]:
        raise malformed(path, f"{name} takes {end - begin} bytes, its shape {list(shape)} of {dtype} needs "
                        f"{prod(shape) * DTYPE_BYTES[dtype]}")  # fmt: skip
    return TensorInfo(name, path, start + begin, end - begin, dtype, shape)


def read_index(path: Path) -> Index:
    """Index a .safetensors file or a folder of them, with its config.json.

    Raises:
        InputError: `pickle-refused`, `file-missing`, `file-malformed`, `file-truncated`, `weight-map`.
    """
    if not path.is_dir():
        _, infos = read_header(path)
        config = _config(path.parent)
        held = {info.name: info for info in infos}
        documents = _documents(path.parent)
        return Index(path, "safetensors", held, config=config, files=(path,), notes=_notes(config), documents=documents)
    index_file = _index_file(path)
    weight_map = _weight_map(index_file) if index_file else None
    files = _files(path, index_file, weight_map)
    tensors: dict[str, TensorInfo] = {}
    for file in files:
        for info in read_header(file)[1]:
            if info.name in tensors:
                raise malformed(file, f"tensor {info.name} stands in {tensors[info.name].file.name}, too")
            tensors[info.name] = info
    config = _config(path)
    if index_file and weight_map is not None:
        _check_weight_map(index_file, weight_map, tensors, files)
    return Index(
        path,
        "safetensors",
        tensors,
        config=config,
        files=tuple(files),
        notes=_notes(config),
        documents=_documents(path),
    )


def _documents(folder: Path) -> dict[str, Any]:
    names = sorted({path.name for pattern in DOCUMENTS for path in folder.glob(pattern)})
    return {name: read_json(folder / name) for name in names}


def _notes(config: dict[str, Any] | None) -> tuple[str, ...]:
    if config and "auto_map" in config:
        return ("auto_map in config.json is ignored: code from a checkpoint is never run",)
    return ()


def _index_file(folder: Path) -> Path | None:
    found = sorted(folder.glob(INDEX_PATTERN), key=lambda path: (not path.name.startswith("model."), path.name))
    return found[0] if found else None


def _files(folder: Path, index_file: Path | None, weight_map: dict[str, str] | None) -> list[Path]:
    if weight_map is not None:
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).is_absolute() or ".." in Path(name).parts or not name.endswith(".safetensors"):
                raise InputError(
                    Problem(
                        "weight-map",
                        f"the index names {name!r} as a file",
                        str(index_file),
                        "file names must be relative, inside the folder and end in .safetensors",
                        "do not use this checkpoint unless you trust where it came from",
                    )
                )
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise InputError(
                Problem(
                    "file-missing",
                    f"{len(missing)} of {len(names)} weight files are not there",
                    str(folder),
                    f"missing: {', '.join(missing[:4])}",
                    "fetch the checkpoint again: it is incomplete",
                )
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        if pickles:
            raise pickle_refused(folder / pickles[0])
        raise InputError(
            Problem(
                "file-missing",
                "the folder holds no weights",
                str(folder),
                "no *.safetensors and no *.gguf in it",
                "model.path=/the/folder/with/the/weights",
            )
        )
    return files


def pickle_refused(path: Path) -> InputError:
    """Pickled weights can run any code when they are loaded."""
    return InputError(
        Problem(
            "pickle-refused",
            f"{path.name} is not read: pickled weights can run code",
            str(path),
            "only safetensors and GGUF files are loaded",
            "use the model's safetensors files, or convert it with safetensors.torch.save_file elsewhere",
        )
    )


def _weight_map(path: Path) -> dict[str, str]:
    data = read_json(path)
    given = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(given, dict) or not all(isinstance(name, str) for name in given.values()):
        raise malformed(path, "it has no weight_map from tensor to file names")
    return given


def _check_weight_map(
    index_file: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo], files: list[Path]
) -> None:
    said = {file: Path(file).name for file in set(weight_map.values())}
    names = {file: file.name for file in files}
    for name, file in weight_map.items():
        held = tensors.get(name)
        if held is None or names[held.file] != said[file]:
            where = f"it is in {held.file.name}" if held else "no file has it"
            raise InputError(
                Problem("weight-map", f"the index says {name} is in {file}", str(index_file), where,
                        "fetch the checkpoint again: index and files are of different releases")
            )  # fmt: skip


def _config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    data = read_json(path)
    if not isinstance(data, dict):
        raise malformed(path, "config.json is not a JSON object")
    return data


def read_json(path: Path) -> Any:  # noqa: ANN401
    """Parse a JSON file of at most 100 MB.

    Raises:
        InputError: `file-malformed`, `file-missing`, `file-unreadable`.
    """
    with readable(path), path.open("rb") as file:
        raw = file.read(_MAX_HEADER_BYTES + 1)
    if len(raw) > _MAX_HEADER_BYTES:
        raise malformed(path, f"{path.name} is not read", "it is larger than 100 MB")
    return _json(path, raw)


def _json(path: Path, raw: bytes) -> Any:  # noqa: ANN401
    try:
        return json.loads(raw, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise malformed(path, f"its JSON cannot be read: {error}", "the file is damaged, or was cut") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a dict; a name that stands there twice would hide a tensor."""
    found = dict(pairs)
    if len(found) != len(pairs):
        name = next(name for i, (name, _) in enumerate(pairs) if name in dict(pairs[:i]))
        raise ValueError(f"the name {name[:200]!r} stands there twice")
    return found
