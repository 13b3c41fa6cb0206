"""What each rank holds, in bytes, against what its device has; and what would fit where it does not."""

from __future__ import annotations

from framework.errors import Problem, Refused
from framework.families.base import DecoderSpec
from framework.geometry import HeadShare
from framework.planning.check import Checked
from framework.planning.layout import Layout
from framework.planning.memory import PAGE_TOKENS, held_at_once, page_bytes, rank_weights, workspace_bytes
from framework.planning.plan import PlannedModule, RankPlan, RuntimePlan

GIB = 1 << 30
# Without a device the cache comes out of the host's memory, which the plan does not know.
CPU_CACHE_BYTES = 2 * GIB
_MAX_TRIED = 64  # tensor-parallel sizes that are tried to name one that fits


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
    """Return every rank's share.

    Raises:
        Refused: `memory`, with what would fit.
    """
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
    tight = [rank for rank in ranks if not rank.fits]
    if tight:
        raise Refused(_too_big(checked, tight[0], runtime))
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
    return workspace_bytes(decoder, checked.recipe.parallel.tp_size, runtime.chunk_tokens, runtime.max_batch)


def _too_big(checked: Checked, rank: RankPlan, runtime: RuntimePlan) -> Problem:
    need = max(rank.weights_bytes + rank.kv_cache_bytes + rank.workspace_bytes, rank.load_peak_bytes)
    room = rank.capacity_bytes - rank.weights_bytes - rank.workspace_bytes
    return Problem(
        "memory",
        f"rank {rank.rank} needs {need / GIB:.2f} GiB, {rank.capacity_bytes / GIB:.2f} GiB may be used",
        f"{checked.recipe.hardware.name}, rank {rank.rank}",
        f"weights {rank.weights_bytes / GIB:.2f}, KV cache {rank.kv_cache_bytes / GIB:.2f} "
        f"({runtime.max_batch} sequences x {runtime.context} tokens), workspace {rank.workspace_bytes / GIB:.2f}, "
        f"load peak {rank.load_peak_bytes / GIB:.2f}; memory_fraction {checked.recipe.runtime.memory_fraction}",
        "   or   ".join(_what_fits(checked, rank, runtime, room)),
    )


def _what_fits(checked: Checked, rank: RankPlan, runtime: RuntimePlan, room: int) -> list[str]:
    fixes = []
    decoder = checked.model.decoder
    if decoder and room > 0:
        per_page = page_bytes(decoder, rank.heads, runtime.cache_dtype)
        sequences = room // (per_page * -(-runtime.context // PAGE_TOKENS))
        tokens = room // (per_page * runtime.max_batch) * PAGE_TOKENS
        fixes += [f"runtime.max_batch={sequences}"] if sequences > 0 else []
        fixes += [f"runtime.context={tokens}"] if tokens > 0 else []
    size = _size_that_holds(checked, rank)
    if size:
        fixes.append(f"parallel.tp_size={size}")
    if room <= 0:
        fixes.append("a checkpoint with fewer bits a weight")
    return fixes


def _size_that_holds(checked: Checked, rank: RankPlan) -> int:
    """Return the next size at which the weights would take half of the capacity or less; 0 if heads forbid it."""
    tp_size = checked.recipe.parallel.tp_size
    decoder = checked.model.decoder
    heads = decoder.heads if decoder else min(spec.heads for spec in (checked.model.transformers or {}).values())
    total = rank.weights_bytes * tp_size
    for size in range(tp_size + 1, min(heads, _MAX_TRIED) + 1):
        if heads % size == 0 and 2 * total // size <= rank.capacity_bytes:
            return size
    return 0
