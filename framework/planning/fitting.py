"""What would fit, where a plan does not."""

from __future__ import annotations

from dataclasses import replace

from framework.errors import Problem
from framework.planning.check import Checked, check
from framework.planning.draft import draft_plan
from framework.planning.memory import PAGE_TOKENS, page_bytes
from framework.planning.plan import Plan, RankPlan
from framework.planning.ranks import GIB

_MOST_TRIED = 3  # tensor-parallel sizes: each is a check and a plan of its own


def too_big(checked: Checked, plan: Plan) -> Problem | None:
    """Return `memory`, for the first rank that does not fit, with what would; None if all do."""
    rank = next((rank for rank in plan.ranks if not rank.fits), None)
    if rank is None:
        return None
    recipe = checked.recipe
    parts = [f"weights {rank.weights_bytes / GIB:.2f}"]
    if plan.spec:
        parts += [f"KV cache {rank.kv_cache_bytes / GIB:.2f} ({_tokens(plan)})"]
        parts += [f"workspace {rank.workspace_bytes / GIB:.2f}"]
    parts += [f"load peak {rank.load_peak_bytes / GIB:.2f}"]
    return Problem(
        "memory",
        f"rank {rank.rank} needs {_need(rank) / GIB:.2f} GiB, {rank.capacity_bytes / GIB:.2f} GiB may be used",
        f"{recipe.hardware.name}, rank {rank.rank}",
        f"{', '.join(parts)} GiB; memory_fraction {recipe.runtime.memory_fraction} of {recipe.hardware.hbm_gib:g} GiB",
        "   or   ".join(_what_fits(checked, plan, rank)),
    )


def _need(rank: RankPlan) -> int:
    return max(rank.weights_bytes + rank.kv_cache_bytes + rank.workspace_bytes, rank.load_peak_bytes)


def _tokens(plan: Plan) -> str:
    runtime = plan.runtime
    tokens, wanted = runtime.cache_pages * PAGE_TOKENS, runtime.max_batch * -(-runtime.context // PAGE_TOKENS)
    if runtime.cache_pages == wanted:
        return f"{runtime.max_batch} sequences of {runtime.context} tokens"
    return f"{tokens} tokens, the least there can be"


def _what_fits(checked: Checked, plan: Plan, rank: RankPlan) -> list[str]:
    fixes = []
    runtime, room = plan.runtime, rank.capacity_bytes - rank.weights_bytes - rank.workspace_bytes
    if plan.spec and room > 0:
        per_page = page_bytes(plan.spec, rank.heads, runtime.cache_dtype)
        sequences = room // (per_page * -(-runtime.context // PAGE_TOKENS))
        tokens = room // (per_page * runtime.max_batch) * PAGE_TOKENS
        fixes += [f"runtime.max_batch={sequences}"] if 0 < sequences < runtime.max_batch else []
        fixes += [f"runtime.context={tokens}"] if 0 < tokens < runtime.context else []
    if size := _size_that_fits(checked, plan):
        fixes.append(f"parallel.tp_size={size}")
    if room <= 0:
        fixes.append("a checkpoint with fewer bits a weight")
    return fixes


def _size_that_fits(checked: Checked, plan: Plan) -> int:
    """Return the least tensor-parallel size that deals heads evenly, fits and caches a whole context; 0 if none is."""
    heads = plan.spec.heads if plan.spec else min(spec.heads for spec in plan.transformers.values())
    dealt = sum(rank.weights_bytes for rank in plan.ranks) / max(1, plan.size // plan.tp_size)
    least = max(plan.tp_size + 1, -(-int(dealt) // plan.ranks[0].capacity_bytes))
    sizes = [size for size in range(least, heads + 1) if heads % size == 0]
    return next((size for size in sizes[:_MOST_TRIED] if _fits(checked, plan, size)), 0)


def _fits(checked: Checked, plan: Plan, size: int) -> bool:
    recipe = replace(checked.recipe, parallel=replace(checked.recipe.parallel, tp_size=size))
    other = check(recipe, {part.prefix: part.index for part in checked.model.parts}, checked.capability)
    if not other.ok:
        return False
    drafted = draft_plan(other, plan.runtime.device)
    whole = drafted.runtime.cache_pages * PAGE_TOKENS >= drafted.runtime.context
    return whole and all(rank.fits for rank in drafted.ranks)
