"""quant_model_description.json: a quant type by tensor, under the names that the file has."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

from framework.checkpoint.index import Index
from framework.formats.declared import DESCRIPTION, declarations, settings
from framework.formats.modelslim.types import FLOAT

# Wrappers of multimodal models, and Mixtral's words: a description may use others than its file.
_WRAPPER = re.compile(r"^(model\.language_model|language_model\.model)\.")
_WORDS = ((".block_sparse_moe.", ".mlp."), (".w1.", ".gate_proj."), (".w3.", ".up_proj."), (".w2.", ".down_proj."))


@lru_cache(maxsize=8)
def described(index: Index) -> Mapping[str, str]:
    """Return the entries of tensors: keys with a dot whose value is a word.

    A quantized one that names no tensor stands under the tensor that it means, if there is one without an entry.
    """
    given = {name: kind for name, kind in settings(index, "modelslim").items() if isinstance(kind, str) and "." in name}
    strays = [name for name, kind in given.items() if kind != FLOAT and name not in index.tensors]
    if not strays:
        return given
    here = {canonical(name): name for name in index.tensors}
    meant = {name: here[canonical(name)] for name in strays if canonical(name) in here}
    own = {name: kind for name, kind in given.items() if name not in meant}
    return {tensor: given[name] for name, tensor in meant.items()} | own


@lru_cache(maxsize=8)
def malformed(index: Index) -> Mapping[str, object]:
    """Return entries of tensors whose value is no word (keys without a dot are the tool's own notes)."""
    given = settings(index, "modelslim")
    return {name: kind for name, kind in given.items() if "." in name and not isinstance(kind, str)}


def canonical(name: str) -> str:
    """Return a tensor's name without wrapper and in Qwen's words."""
    name = _WRAPPER.sub("model.", name).removeprefix("language_model.")
    for theirs, ours in _WORDS:
        name = name.replace(theirs, ours)
    return name


def place(index: Index) -> str:
    """Name the folder and file of the description."""
    source = next((d.place for d in declarations(index) if d.format == "modelslim"), DESCRIPTION)
    return f"{index.root.name}/{source}"
