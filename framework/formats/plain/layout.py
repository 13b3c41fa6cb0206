"""Plain float checkpoints: safetensors under Hugging Face names, nothing quantized."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from framework.checkpoint.index import Index
from framework.errors import Problem
from framework.formats.base import FLOATS, Assumed, Held, TensorSpec
from framework.formats.names import stem, tower
from framework.geometry import Kind, Module


def float_tensors(module: Module, index: Index) -> tuple[TensorSpec, ...]:
    """Return what a module that is not quantized has in the file: every format stores those alike.

    A norm may carry a bias that its architecture does not know: anti-outlier methods shift it there.
    """
    name = stem(module, index)
    n, k = module.shape
    if module.kind is Kind.PARAMETER:
        return (TensorSpec("weight", name, module.dims, FLOATS),)
    shape = (n,) if module.kind is Kind.NORM else (n, k)
    weight = TensorSpec("weight", f"{name}.weight", shape, FLOATS)
    if module.bias or (module.kind is Kind.NORM and f"{name}.bias" in index.tensors):
        return (weight, TensorSpec("bias", f"{name}.bias", (n,), FLOATS))
    return (weight,)


def held_float(module: Module, index: Index) -> Held:
    """Return a module that is not quantized."""
    return Held("float", float_tensors(module, index), label="float")


def ignorable_float(name: str) -> str | None:
    """Buffers that old releases saved, and towers of multimodal wrappers that text does not need."""
    if name.endswith((".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")):
        return "a buffer that is computed, not loaded"
    return tower(name)


def assumed_float(module: Module) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return the tensors that a float module of a stand-in has, bf16."""
    if module.kind is Kind.PARAMETER:
        return [(module.name, "BF16", module.dims)]
    n, k = module.shape
    shape: tuple[int, ...] = (n,) if module.kind is Kind.NORM else (n, k)
    made: list[tuple[str, str, tuple[int, ...]]] = [
        entry
        for name in module.names()
        for entry in [(f"{name}.weight", "BF16", shape), (f"{name}.bias", "BF16", (n,))][: 1 + module.bias]
    ]
    return [] if module.tied_to else made


class PlainLayout:
    """Layout of float safetensors (formats.base.Layout)."""

    name = "none"

    def detect(self, index: Index) -> str | None:
        """What no other format claims, with float weights."""
        if index.container != "safetensors":
            return None
        kinds = sorted({info.dtype for info in index.tensors.values()})
        return f"nothing declares a quantization; tensors are {', '.join(kinds)}"

    def held(self, module: Module, index: Index) -> Held:
        """Float only."""
        return held_float(module, index)

    def stacked(self, module: Module, index: Index) -> bool:
        """Every expert has tensors of its own."""
        return False

    def extras(self, index: Index) -> dict[str, list[TensorSpec]]:
        """Nothing beyond the modules."""
        return {}

    def ignorable(self, name: str, index: Index) -> str | None:
        """Buffers and vision towers."""
        return ignorable_float(name)

    def faults(self, modules: Sequence[Module], index: Index) -> list[Problem]:
        """Nothing is described, so nothing can be described wrongly."""
        return []

    def stand_in(self, modules: Sequence[Module], scheme: str, options: dict[str, Any]) -> Assumed:
        """Return a float checkpoint in bf16."""
        return Assumed(tuple(entry for module in modules for entry in assumed_float(module)), {}, {})
