"""Plain float checkpoints: safetensors under Hugging Face names, nothing quantized."""

from __future__ import annotations

from framework.checkpoint.index import Index
from framework.formats.base import TensorSpec
from framework.geometry import Kind, Module

FLOATS = ("BF16", "F16", "F32")
# wrappers of multimodal checkpoints put the text model under one of these
PREFIXES = ("", "language_model.", "model.language_model.")


def tensor_name(module: Module, index: Index) -> str:
    """Return the name, without suffix, of the tensor that holds a module's weight."""
    prefix = prefix_of(index)
    name = module.name
    if module.tied_to and f"{_prefixed(prefix, name)}.weight" not in index.tensors:
        name = module.tied_to
    return _prefixed(prefix, name)


def prefix_of(index: Index) -> str:
    """Return the wrapper prefix of the text model in this file."""
    for prefix in PREFIXES:
        if f"{_prefixed(prefix, 'model.embed_tokens')}.weight" in index.tensors:
            return prefix
    return ""


def _prefixed(prefix: str, name: str) -> str:
    # transformers 5 writes model.language_model.layers..., not model.language_model.model.layers...
    if prefix == "model.language_model." and name.startswith("model."):
        return prefix + name.removeprefix("model.")
    return name if prefix == "model.language_model." else prefix + name


class PlainLayout:
    """Layout of float safetensors (formats.base.Layout)."""

    name = "none"

    def detect(self, index: Index) -> str | None:
        """What no other format claims, with float weights."""
        if index.container != "safetensors":
            return None
        kinds = sorted({info.dtype for info in index.tensors.values()})
        return f"nothing declares a quantization; tensors are {', '.join(kinds)}"

    def schemes_of(self, module: Module, index: Index) -> tuple[str, ...]:
        """Float only."""
        return ("float",)

    def tensors_of(self, module: Module, index: Index) -> list[TensorSpec]:
        """A weight, and a bias where the module has one; vectors have one dimension."""
        name = tensor_name(module, index)
        n, k = module.shape
        shape = (n,) if module.kind is Kind.NORM else (n, k)
        specs = [TensorSpec("weight", f"{name}.weight", shape, FLOATS)]
        if module.bias:
            specs.append(TensorSpec("bias", f"{name}.bias", (n,), FLOATS))
        return specs

    def extras(self, index: Index) -> dict[str, list[TensorSpec]]:
        """Nothing beyond the modules."""
        return {}

    def ignorable(self, name: str) -> str | None:
        """Buffers that old releases saved, and towers of multimodal wrappers that text does not need."""
        if name.endswith((".rotary_emb.inv_freq", ".masked_bias", ".attn.bias")):
            return "a buffer that is computed, not loaded"
        if name.startswith(
            ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
        ):
            return "the vision side of a multimodal model; text only is run"
        return None

    def grain(self, module: Module, scheme: str, index: Index) -> tuple[int, int]:
        """Floats can be cut anywhere."""
        return (1, 1)
