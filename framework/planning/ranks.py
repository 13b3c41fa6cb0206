"""What each rank holds, in bytes, against what its device has."""

from __future__ import annotations

from framework.families.base import DecoderSpec
from framework.geometry import HeadShare
from framework.planning.check import Checked
from framework.planning.layout import Layout
from framework.planning.memory import PAGE_TOKENS, held_at_once, page_bytes, rank_weights, workspace_bytes
from framework.planning.plan import PlannedModule, RankPlan, RuntimePlan

GIB = 1 << 30
# Without a device the cache comes out of the host's memory, which the plan does not know.
CPU_CACHE_BYTES = 2 * GIB


def cache_pages(
    checked: Checked, decoder: DecoderSpec, modules: tuple[PlannedModule, ...], runtime: RuntimePlan
) -> int:
    """Return the pages of the KV cache: what the batch asks for; with an automatic batch, what there is room for."""
    recipe = checked.recipe
    wanted = runtime.max_batch * -(-runtime.context // PAGE_TOKENS)
    if recipe.runtime.max_batch not in (None, "auto"):
        return wanted
    per_page = [page_bytes(decoder, share, runtime.cache_dtype) for share in shares(checked)]
    room = [CPU_CACHE_BYTES // size for size in per_page] if runtime.device == "cpu" else [wanted]
    if capacity := capacity_bytes(checked):
        workspace = _workspace(checked, decoder, runtime)
        for rank, size in enumerate(per_page):
            room.append((capacity - sum(rank_weights(modules, rank, runtime.dtype)) - workspace) // size)
    least = -(-runtime.context // PAGE_TOKENS) if recipe.runtime.context not in (None, "auto") else 1
    return max(min(wanted, *room), least)


def plan_ranks(checked: Checked, modules: tuple[PlannedModule, ...], runtime: RuntimePlan) -> tuple[RankPlan, ...]:
    """Return every rank's share, and whether it fits."""
    decoder, layout = checked.model.decoder, Layout.of(checked.recipe.parallel)
    capacity = capacity_bytes(checked)
    workspace = _workspace(checked, decoder, runtime) if decoder else 0
    per_node = checked.recipe.hardware.devices_per_node or layout.size
    held = shares(checked)
    ranks = []
    for rank in range(layout.size):
        tp_rank = layout.at(rank)["tp"]
        share = held[tp_rank]
        sizes = held_at_once(modules, tp_rank, runtime.dtype, runtime.offload)
        cache = runtime.cache_pages * page_bytes(decoder, share, runtime.cache_dtype) if decoder else 0
        peak = sum(sizes) + max(sizes)
        ranks.append(
            RankPlan(
                rank=rank,
                node=rank // per_node,
                device=rank % per_node,
                heads=share,
                weights_bytes=sum(sizes),
                kv_cache_bytes=cache,
                workspace_bytes=workspace,
                capacity_bytes=capacity,
                fits=not capacity or max(peak, sum(sizes) + cache + workspace) <= capacity,
                load_peak_bytes=peak,
            )
        )
    return tuple(ranks)


def shares(checked: Checked) -> list[HeadShare]:
    """Return the heads of each rank; of a pipeline, those of its first transformer."""
    cuts = next(iter(checked.cuts.values()))
    if cuts.heads:
        return cuts.heads
    heads = cuts.axes.get("heads", [(0, 0)] * checked.recipe.parallel.tp_size)
    return [HeadShare(a, b, a, b) for a, b in heads]


def capacity_bytes(checked: Checked) -> int:
    """Return what a plan may use of a device; 0: unknown."""
    hbm = checked.recipe.hardware.hbm_gib
    return int(hbm * GIB * checked.recipe.runtime.memory_fraction) if hbm else 0


def _workspace(checked: Checked, decoder: DecoderSpec, runtime: RuntimePlan) -> int:
    parallel = checked.recipe.parallel
    return workspace_bytes(decoder, parallel.tp_size, parallel.ep_size, runtime.chunk_tokens, runtime.max_batch)
