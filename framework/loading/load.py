"""From a plan to a model that runs on this rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from framework.capability.tiers import require_tier
from framework.checkpoint.open import open_index
from framework.checkpoint.reader import Reader
from framework.collector import uncollected
from framework.engine.cache import KVCache
from framework.formats.registry import decoder
from framework.layers.group import Group
from framework.loading.model import LoadedModel
from framework.loading.weights import Progress, RankWeights
from framework.models.decoder import Decoder
from framework.ops.register import ensure_registered
from framework.planning.plan import Plan


def load(plan: Plan, group: Group, progress: Progress) -> LoadedModel:
    """Read this rank's rectangles, build the model and its cache.

    Raises:
        UserError: the checkpoint changed or broke since it was checked.
    """
    ensure_registered(plan.runtime.device)
    device = torch.device("cpu" if plan.runtime.device == "cpu" else "npu:0")
    if device.type == "npu":
        require_tier(plan.tier, torch.npu.get_soc_version(), torch.npu.get_device_name())
    share = plan.ranks[group.rank].heads
    with uncollected(), Reader() as reader, torch.inference_mode():
        index = replace(open_index(Path(plan.checkpoint)), options=plan.options)
        weights = RankWeights(plan, index, reader, decoder(plan.format), group, device, progress)
        model = Decoder(plan.spec, share, weights, group, plan.runtime.context).eval()
    mla, head_dim = plan.spec.mla, plan.spec.head_dim
    with torch.inference_mode():  # else every view of it in a step carries autograd's data
        cache = KVCache(
            plan.spec.layers,
            plan.runtime.cache_pages,
            1 if mla else share.kv1 - share.kv0,
            (mla.kv_rank, mla.rope_dim) if mla else (head_dim, head_dim),
            getattr(torch, plan.runtime.cache_dtype),
            device,
        )
    return LoadedModel(plan, model, cache, group, weights.prepared_bytes)
