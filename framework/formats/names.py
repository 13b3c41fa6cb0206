"""Canonical module names to the names that safetensors files use: wrapper prefixes, Mixtral's own words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

from framework.checkpoint.index import Index
from framework.geometry import Module

# wrappers of multimodal checkpoints put the text model under one of these
PREFIXES = ("", "language_model.", "model.language_model.")
TOWERS = (
    "vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.", "visual.",
    "model.visual.",
)  # fmt: skip
_SUFFIXES = ("weight", "qweight", "weight_packed")
_MIXTRAL = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
_EXPERT = re.compile(r"\.mlp\.(experts\.\d+\.)(gate_proj|up_proj|down_proj)$")


@dataclass(frozen=True, slots=True)
class Naming:
    """How one file names modules."""

    prefix: str
    mixtral: bool  # block_sparse_moe.experts.E.{w1,w3,w2}

    def of(self, name: str) -> str:
        """Return the file's name, without suffix, for a canonical one."""
        if self.mixtral and ".mlp." in name:
            expert = _EXPERT.search(name)
            if expert:
                name = f"{name[: expert.start()]}.block_sparse_moe.{expert[1]}{_MIXTRAL[expert[2]]}"
            else:
                name = name.replace(".mlp.", ".block_sparse_moe.")
        if self.prefix == "model.language_model.":
            # transformers 5 writes model.language_model.layers..., not model.language_model.model.layers...
            return self.prefix + name.removeprefix("model.") if name.startswith("model.") else name
        return self.prefix + name


@lru_cache(maxsize=8)
def naming(index: Index) -> Naming:
    """Return how this file names modules."""
    tensors = index.tensors
    mixtral = any(".block_sparse_moe." in name for name in tensors)
    candidates = [Naming(prefix, mixtral=mixtral) for prefix in PREFIXES]
    found = (n for n in candidates if f"{n.of('model.embed_tokens')}.weight" in tensors)
    return next(found, candidates[0])


def stem(module: Module, index: Index) -> str:
    """Return the name, without suffix, of a module's tensors; of what it is tied to where it has none itself."""
    names = naming(index)
    own = names.of(module.name)
    if module.tied_to and not any(f"{own}.{suffix}" in index.tensors for suffix in _SUFFIXES):
        return names.of(module.tied_to)
    return own


def tower(name: str) -> str | None:
    """Say that a tensor is of the vision side of a wrapper, or None."""
    return "the vision side of a multimodal model; text only is run" if name.startswith(TOWERS) else None
