"""A diffusers transformer whose linears are ours: built from a plan, a rank's part of the weights and no more."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from framework.checkpoint.index import Index
from framework.checkpoint.reader import Reader
from framework.families.diffusion import DiffusionSpec
from framework.formats.base import Decoder
from framework.geometry import Kind, Split
from framework.layers.flat import DealtRMSNorm, FlatLinear
from framework.layers.group import Group
from framework.loading.weights import Progress, RankWeights
from framework.planning.plan import Plan, PlannedModule


def build_transformer(
    plan: Plan,
    prefix: str,
    index: Index,
    reader: Reader,
    decoder: Decoder,
    group: Group,
    device: torch.device,
    progress: Progress,
) -> nn.Module:
    """Return the transformer of one component on this rank.

    Linears that are quantized or dealt become ours; heads are those of this rank; norms over all heads add their
    squares over the ranks. Everything else is diffusers', with weights in its own dtype.
    """
    own = tuple(planned for planned in plan.modules if planned.name.startswith(prefix))
    weights = RankWeights(replace(plan, modules=own), index, reader, decoder, group, device, progress)
    spec = plan.transformers[prefix]
    model = empty_model(spec, cast("Mapping[str, Any]", index.config))
    for planned in own:
        name = planned.module.name
        if planned.module.kind is Kind.LINEAR and (planned.scheme != "float" or planned.split is not Split.REPLICATED):
            _put(model, name, FlatLinear(weights.linear(name), weights.dtype))
            continue
        dtype = torch.float32 if planned.fp32 else weights.dtype
        for suffix, values in _tensors(planned, weights).items():
            _assign(model, f"{name}.{suffix}" if suffix else name, values.to(device=device, dtype=dtype))
    _deal_heads(model, spec, own, group)
    return model.eval()


def empty_model(spec: DiffusionSpec, config: Mapping[str, Any]) -> nn.Module:
    """Return the diffusers model without weights (meta); its buffers are computed."""
    import diffusers

    _watch_parameters()
    _BUILDING.empty = True
    try:
        return cast("nn.Module", getattr(diffusers, spec.class_name).from_config(dict(config)))
    finally:
        _BUILDING.empty = False


_BUILDING = threading.local()


@cache
def _watch_parameters() -> None:
    """Register, once, the hook that drops the memory of parameters in a thread that builds an empty model.

    torch's device context would also take the buffers, which nothing stores; a hook of the module sees which is which.
    """
    register_module_parameter_registration_hook(_dropped)


def _dropped(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    if parameter is None or not getattr(_BUILDING, "empty", False):
        return None
    return nn.Parameter(parameter.to("meta"), requires_grad=False)


def _tensors(planned: PlannedModule, weights: RankWeights) -> dict[str, Tensor]:
    """Return the tensors of a module that stays diffusers', by suffix ("" for a parameter)."""
    module = planned.module
    if module.kind is Kind.PARAMETER:
        return {"": weights.parameter(module.name)}
    if module.kind is Kind.NORM:
        weight, bias = weights.norm(module.name)
        return {"weight": weight} | ({} if bias is None else {"bias": bias})
    found = {"weight": weights.matrix(module.name)}
    if module.bias:
        found["bias"] = weights.bias(module.name)
    return found


def _deal_heads(model: nn.Module, spec: DiffusionSpec, own: tuple[PlannedModule, ...], group: Group) -> None:
    """Give every attention this rank's heads, and its norms over all heads this rank's features."""
    if group.size == 1:
        return
    for planned in own:
        module = planned.module
        parent, _, leaf = module.name.rpartition(".")
        if module.axis != "heads" or leaf not in ("to_q",):
            continue
        rect = planned.shards[group.rank]
        attention = model.get_submodule(parent)
        attention.heads = (rect.n1 - rect.n0) // spec.head_dim
        attention.inner_dim = rect.n1 - rect.n0
        for name in ("norm_q", "norm_k", "norm_added_k"):
            norm = getattr(attention, name, None)
            if norm is not None and norm.weight is not None and norm.weight.shape[0] == module.shape[0]:
                part = norm.weight.detach()[rect.n0 : rect.n1].clone()
                setattr(attention, name, DealtRMSNorm(part, norm.eps, module.shape[0], group))


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, layer)


def _assign(model: nn.Module, name: str, values: Tensor) -> None:
    """Replace a parameter, or a buffer that the checkpoint stores."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    if leaf in owner._buffers:
        owner._buffers[leaf] = values
        return
    shape = owner._parameters[leaf].shape if owner._parameters.get(leaf) is not None else values.shape
    owner._parameters[leaf] = nn.Parameter(values.reshape(shape), requires_grad=False)
