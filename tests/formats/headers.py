"""Headers of all golden checkpoints, as their tools wrote them; experts folded to `*`."""

import json
from functools import cache
from math import prod
from pathlib import Path

from framework.checkpoint.index import Index, TensorInfo
from framework.checkpoint.ledger import settle
from framework.families.base import modules
from framework.families.config import describe

GOLDEN = Path(__file__).parents[1] / "golden"
CONFIGS = Path(__file__).parents[2] / "recipes" / "assets" / "configs"
DESCRIPTION = "quant_model_description.json"


@cache
def recorded():
    """By folder: config, `notes` (entries of the description that name no tensor), names by `dtype shape [entry]`."""
    return json.loads((GOLDEN / "headers.json").read_text())


def folders(*prefixes):
    """Names of the folders whose own name begins so."""
    return [name for name in recorded() if name.split("/")[1].startswith(prefixes)]


def headers(name, **options):
    """The index of one folder."""
    held = recorded()[name]
    experts = held["config"].get("num_experts") or held["config"].get("num_local_experts", 0)
    infos, entries = {}, dict(held.get("notes", {}))
    for kind, patterns in held["tensors"].items():
        dtype, extents, *entry = kind.split(" ")
        shape = tuple(map(int, extents.split("x")))
        for pattern in patterns:
            for tensor in [pattern.replace("*", str(e)) for e in range(experts)] if "*" in pattern else [pattern]:
                infos[tensor] = TensorInfo(tensor, Path(name) / "model.safetensors", 0, prod(shape), dtype, shape)
                entries |= {tensor: entry[0]} if entry else {}
    documents = {DESCRIPTION: entries} if "notes" in held else {}
    return Index(Path(name), "safetensors", infos, config=held["config"], documents=documents, options=options)


def model_of(index):
    return list(modules(describe(index.config)))


def each(model):
    """Every module, experts one by one."""
    for module in model:
        yield from [module.expert(e) for e in range(module.experts)] if module.experts else [module]


def account(layout, model, index):
    """Held by module, and the ledger of the file."""
    held = {module.name: layout.held(module, index) for module in each(model)}
    tensors = {name: one.tensors for name, one in held.items()}
    return held, settle(index, tensors, lambda name: layout.ignorable(name, index))


def stood_in(layout, model, scheme, **options):
    """The index of a stand-in."""
    made = layout.stand_in(model, scheme, options)
    infos = {name: TensorInfo(name, Path("model"), 0, 0, dtype, shape) for name, dtype, shape in made.tensors}
    assert len(infos) == len(made.tensors)
    return Index(Path("model"), "safetensors", infos, config=made.config, documents=made.documents)
