"""Checkpoints of headers alone, to be changed and written: those of the golden folders, and stand-ins of any scheme."""

import copy
import json
import re
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from framework.checkpoint.open import open_index
from framework.checkpoint.write import write_headers
from framework.families.base import modules
from framework.families.config import describe
from framework.formats.registry import LAYOUTS

GOLDEN = Path(__file__).parent / "golden"
DENSE = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 256, "intermediate_size": 512,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32, "num_hidden_layers": 2, "vocab_size": 512,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
MOE = DENSE | {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2,
    "moe_intermediate_size": 128, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
DESCRIPTION = "quant_model_description.json"


@dataclass
class Checkpoint:
    """Dtype and shape by tensor, config.json, the documents beside it."""

    tensors: dict
    config: dict
    documents: dict = field(default_factory=dict)

    def copy(self):
        return copy.deepcopy(self)

    @property
    def declared(self):
        """What declares the quantization: the description, or quantization_config."""
        return self.documents[DESCRIPTION] if DESCRIPTION in self.documents else self.config["quantization_config"]

    def write(self, folder, **options):
        """Write the headers into a new folder and return it."""
        folder.mkdir(parents=True)
        entries = [(name, dtype, tuple(shape)) for name, (dtype, shape) in self.tensors.items()]
        write_headers(folder, entries, {"config.json": self.config} | self.documents, **options)
        return folder


def stand_in(format_name, scheme, config=DENSE, **options):
    """What the format's tool would write of a model with every linear but routers and heads in one scheme."""
    made = LAYOUTS[format_name].stand_in(tuple(modules(describe(config))), scheme, options)
    tensors = {name: (dtype, shape) for name, dtype, shape in made.tensors}
    return Checkpoint(tensors, dict(config) | made.config, dict(made.documents)).copy()


def golden(name):
    """The headers that a quantizer wrote: a folder of tests/golden, or an entry of its headers.json."""
    if name in _headers():
        return _from_entry(_headers()[name]).copy()
    index = open_index(GOLDEN / name)
    tensors = {info.name: (info.dtype, info.shape) for info in index.tensors.values()}
    return Checkpoint(tensors, dict(index.config), dict(index.documents)).copy()


@cache
def _headers():
    return json.loads((GOLDEN / "headers.json").read_text(encoding="utf-8"))


def _from_entry(entry):
    """Tensors are listed by `DTYPE SHAPE LABEL`, those of experts once for all; a description has the labels."""
    tensors, labels = {}, {}
    numbers = range(entry["config"].get("num_local_experts", 1))
    for head, listed in entry["tensors"].items():
        dtype, shape, *label = head.split(" ")
        extents = tuple(int(extent) for extent in re.findall(r"\d+", shape))
        names = list(dict.fromkeys(name.replace(".*.", f".{e}.") for name in listed for e in numbers))
        tensors |= dict.fromkeys(names, (dtype, extents))
        labels |= dict.fromkeys(names, *label) if label else {}
    documents = {DESCRIPTION: dict(entry.get("notes") or {}) | labels} if labels else {}
    return Checkpoint(tensors, entry["config"], documents)
