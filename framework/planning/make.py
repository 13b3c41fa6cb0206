"""From a check without problems to a Plan: shards, bytes per rank, the paged cache, the roofline."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from framework.errors import Problem, Refused
from framework.geometry import Rect
from framework.planning.check import Checked
from framework.planning.memory import (
    PAGE_TOKENS,
    module_bytes,
    page_bytes,
    workspace_bytes,
)
from framework.planning.plan import Plan, PlannedModule, RankPlan, RuntimePlan
from framework.planning.roofline import roofline
from framework.planning.shard import Cuts, place

GIB = 1 << 30
AUTO_CONTEXT = 32768
AUTO_BATCH = 16
CHUNK_TOKENS = 512
# Without a device the cache comes out of the host's memory, which the plan does not know.
CPU_CACHE_BYTES = 2 * GIB


def make_plan(checked: Checked, device: str) -> Plan:
    """Return the plan of a recipe that passed its check. `device` is cpu or npu.

    Raises:
        Refused: the check's problems; `memory`, a rank does not fit; `dtype-device`.
    """
    if checked.problems:
        raise Refused(checked.problems)
    assert checked.cuts is not None
    recipe, spec = checked.recipe, checked.spec
    dtype = recipe.runtime.dtype
    if dtype == "float32" and device != "cpu":
        raise Refused(
            Problem(
                "dtype-device",
                "float32 is the reference mode of the CPU, this plan is for an NPU",
                recipe.origins.get("runtime.dtype", "runtime.dtype"),
                "the NPU ops of the quantized layers take float16 and bfloat16",
                "runtime.dtype=bfloat16   or   runtime.device=cpu",
            )
        )
    modules = _placed(checked, checked.cuts)
    context = _context(checked)
    max_batch = AUTO_BATCH if recipe.runtime.max_batch in (None, "auto") else int(recipe.runtime.max_batch)
    ranks, pages = _ranks(checked, modules, device, context, max_batch)
    runtime = RuntimePlan(
        device,
        dtype,
        cache_dtype(device, dtype),
        _threads(checked),
        context,
        max_batch,
        pages,
        CHUNK_TOKENS,
        recipe.runtime.seed,
    )
    plan = Plan(
        recipe=recipe.name,
        tier=recipe.hardware.name,
        table=checked.table.name,
        checkpoint=str(Path(checked.index.root).absolute()),
        format=checked.format,
        tp_size=recipe.parallel.tp_size,
        spec=spec,
        runtime=runtime,
        modules=modules,
        ranks=ranks,
        notes=(*checked.notes, *_imbalance(checked.cuts, spec.kv_heads)),
    )
    return replace(plan, roofline=roofline(plan, recipe.hardware))


def cache_dtype(device: str, dtype: str) -> str:
    """The KV cache has the model's dtype on an NPU; on a CPU fp32, where attention is several times faster in it."""
    return "float32" if device == "cpu" else dtype


def _placed(checked: Checked, cuts: Cuts) -> tuple[PlannedModule, ...]:
    placed = []
    for given in checked.assigned:
        grain = checked.layout.grain(given.module, given.scheme, checked.index)
        split, shards = place(given.module, cuts, grain, checked.recipe.parallel.tp_size)
        row = checked.row_of[given.module.name]
        placed.append(PlannedModule(given.module, checked.format, given.scheme, row, split, shards))
    return tuple(placed)


def _context(checked: Checked) -> int:
    asked = checked.recipe.runtime.context
    if asked in (None, "auto"):
        return min(checked.spec.context, AUTO_CONTEXT)
    return int(asked)


def _threads(checked: Checked) -> int:
    asked = checked.recipe.runtime.threads
    if asked not in (None, "auto"):
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // checked.recipe.parallel.tp_size)


def held_bytes(planned: PlannedModule, rank: int, dtype: str, held: dict[str, str]) -> int:
    """Bytes of a rank's part of a module. A tied head that keeps its embedding's form holds nothing of its own.

    `held` maps the names of modules seen so far to their schemes.
    """
    module = planned.module
    held[module.name] = planned.scheme
    if module.tied_to and held.get(module.tied_to) == planned.scheme:
        return 0
    rect: Rect = planned.shards[rank]
    return module_bytes(module, planned.scheme, rect, dtype)


def _ranks(
    checked: Checked, modules: tuple[PlannedModule, ...], device: str, context: int, max_batch: int
) -> tuple[tuple[RankPlan, ...], int]:
    recipe, spec, cuts = checked.recipe, checked.spec, checked.cuts
    assert cuts is not None
    tp_size, dtype = recipe.parallel.tp_size, recipe.runtime.dtype
    hbm = recipe.hardware.hbm_gib
    capacity = int(hbm * GIB * recipe.runtime.memory_fraction) if hbm else 0
    workspace = workspace_bytes(spec, tp_size, CHUNK_TOKENS, max_batch)
    weights = []
    for rank in range(tp_size):
        held: dict[str, str] = {}
        weights.append(sum(held_bytes(planned, rank, dtype, held) for planned in modules))
    wanted = max_batch * -(-context // PAGE_TOKENS)
    per_page = [page_bytes(spec, share, cache_dtype(device, dtype)) for share in cuts.heads]
    pages = wanted
    if recipe.runtime.max_batch in (None, "auto"):
        room = [CPU_CACHE_BYTES // p for p in per_page] if device == "cpu" else [wanted]
        if capacity:
            room += [(capacity - w - workspace) // p for w, p in zip(weights, per_page, strict=True)]
        pages = min(wanted, *room)
        pages = max(pages, -(-context // PAGE_TOKENS) if recipe.runtime.context not in (None, "auto") else 1)
    per_node = recipe.hardware.devices_per_node or tp_size
    ranks = tuple(
        RankPlan(
            rank=r,
            node=r // per_node,
            device=r % per_node,
            heads=cuts.heads[r],
            weights_bytes=weights[r],
            kv_cache_bytes=pages * per_page[r],
            workspace_bytes=workspace,
            capacity_bytes=capacity,
            fits=not capacity or weights[r] + pages * per_page[r] + workspace <= capacity,
        )
        for r in range(tp_size)
    )
    tight = [rank for rank in ranks if not rank.fits]
    if tight:
        raise Refused(_too_big(checked, tight[0], context, max_batch, per_page[tight[0].rank]))
    return ranks, pages


def _too_big(checked: Checked, rank: RankPlan, context: int, max_batch: int, per_page: int) -> Problem:
    need = rank.weights_bytes + rank.kv_cache_bytes + rank.workspace_bytes
    room = rank.capacity_bytes - rank.weights_bytes - rank.workspace_bytes
    sequences = room // (per_page * -(-context // PAGE_TOKENS)) if room > 0 else 0
    tokens = room // (per_page * max_batch) * PAGE_TOKENS if room > 0 else 0
    fixes = []
    if sequences > 0:
        fixes.append(f"runtime.max_batch={sequences}")
    if tokens > 0:
        fixes.append(f"runtime.context={tokens}")
    if checked.recipe.parallel.tp_size < checked.spec.kv_heads:
        fixes.append(f"parallel.tp_size={min(2 * checked.recipe.parallel.tp_size, checked.spec.kv_heads)}")
    fixes.append("a quantized checkpoint" if room <= 0 else "runtime.max_batch=auto")
    return Problem(
        "memory",
        f"rank {rank.rank} needs {need / GIB:.2f} GiB, {rank.capacity_bytes / GIB:.2f} GiB may be used",
        f"{checked.recipe.hardware.name}, rank {rank.rank}",
        f"weights {rank.weights_bytes / GIB:.2f}, KV cache {rank.kv_cache_bytes / GIB:.2f} "
        f"({max_batch} sequences x {context} tokens), workspace {rank.workspace_bytes / GIB:.2f}; "
        f"memory_fraction {checked.recipe.runtime.memory_fraction}",
        "   or   ".join(fixes),
    )


def _imbalance(cuts: Cuts, kv_heads: int) -> list[str]:
    queries = [share.q1 - share.q0 for share in cuts.heads]
    notes = []
    if len(set(queries)) > 1:
        notes.append(
            f"uneven heads: {' + '.join(map(str, queries))} query heads on ranks 0 to {len(queries) - 1}; "
            f"the largest rank has {max(queries) * len(queries) / sum(queries):.2f} times the mean"
        )
    if len(queries) > kv_heads:
        notes.append(f"{len(queries)} ranks share {kv_heads} KV heads: each rank holds a copy of one")
    return notes
