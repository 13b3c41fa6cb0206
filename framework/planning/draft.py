"""From a check without problems to a Plan: all autos resolved, modules with their ops, ranks, the roofline."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from framework.capability.limits import Limits
from framework.errors import Problem, Refused
from framework.families.base import DecoderSpec
from framework.families.diffusion import KEPT_FP32
from framework.planning.check import Checked, Placed
from framework.planning.layout import Layout
from framework.planning.plan import Plan, PlannedModule, RuntimePlan
from framework.planning.ranks import cache_pages, plan_ranks
from framework.planning.roofline import roofline
from framework.planning.shard import Cuts

AUTO_CONTEXT = 32768
AUTO_BATCH = 16
CHUNK_TOKENS = 512


def draft_plan(checked: Checked, device: str) -> Plan:
    """Return the plan of a recipe that passed its check, whether it fits or not. `device` is cpu or npu.

    Raises:
        Refused: the check's problems; `dtype-device`.
    """
    if checked.problems:
        raise Refused(checked.problems)
    recipe, decoder = checked.recipe, checked.model.decoder
    dtype = recipe.runtime.dtype
    if dtype == "float32" and device != "cpu":
        raise Refused(
            Problem(
                "dtype-device",
                "float32 is the reference mode of the CPU, this plan is for an NPU",
                recipe.where("runtime.dtype"),
                "the NPU ops of the quantized layers take float16 and bfloat16",
                "runtime.dtype=bfloat16   or   runtime.device=cpu",
            )
        )
    modules = planned_modules(checked)
    runtime = RuntimePlan(
        device=device,
        dtype=dtype,
        cache_dtype=cache_dtype(device, dtype),
        threads=_threads(checked),
        context=_context(checked, decoder) if decoder else 0,
        max_batch=_max_batch(checked) if decoder else 0,
        cache_pages=0,
        chunk_tokens=CHUNK_TOKENS if decoder else 0,
        seed=recipe.runtime.seed,
        offload=recipe.runtime.offload,
        vae_tiling=recipe.runtime.vae_tiling,
        vae_slicing=recipe.runtime.vae_slicing,
    )
    if decoder:
        runtime = replace(runtime, cache_pages=cache_pages(checked, decoder, modules, runtime))
    plan = Plan(
        recipe=recipe.name,
        tier=recipe.hardware.name,
        table=checked.capability.table.name,
        checkpoint=str(Path(checked.root).absolute()),
        format=checked.format,
        options=dict(checked.index.options),
        layout=Layout.of(recipe.parallel),
        spec=decoder,
        transformers=dict(checked.model.transformers or {}),
        runtime=runtime,
        modules=modules,
        ranks=plan_ranks(checked, modules, runtime),
        notes=(
            *checked.notes,
            *_copies(Layout.of(recipe.parallel)),
            *_imbalance(checked.cuts, decoder),
            *_uncounted(decoder),
            *_offloaded(runtime),
        ),
    )
    return replace(plan, roofline=roofline(plan, recipe.hardware))


def planned_modules(checked: Checked) -> tuple[PlannedModule, ...]:
    """Return the modules of a plan."""
    transformers = checked.model.transformers or {}
    kept = {prefix: KEPT_FP32.get(spec.class_name, ()) for prefix, spec in transformers.items()}
    return tuple(
        _planned(placed, checked.capability.limits, kept.get(placed.assigned.part.prefix, ()))
        for placed in checked.placed
    )


def cache_dtype(device: str, dtype: str) -> str:
    """The KV cache has the model's dtype on an NPU; on a CPU fp32, where attention is several times faster in it."""
    return "float32" if device == "cpu" else dtype


def _planned(placed: Placed, limits: Limits, kept: tuple[str, ...]) -> PlannedModule:
    entry, fit = placed.assigned, placed.fit
    scheme = fit.scheme if fit else entry.scheme
    limit = limits[scheme, entry.module.layer_type] if entry.module.quantizable else None
    module = entry.module._replace(bias=any(spec.role == "bias" for spec in entry.held.tensors))
    return PlannedModule(
        name=entry.name,
        module=module,
        format=entry.part.format,
        scheme=scheme,
        row=placed.row,
        split=placed.split,
        shards=placed.shards,
        label=entry.held.label,
        group=entry.held.group,
        # a float weight whose op does not take what was asked is not quantized at all
        mode=entry.mode if scheme != "float" else "offline",
        op=fit.op if fit else limit.ops if limit else "",
        pieces=fit.pieces if fit else 1,
        bits=fit.bits if fit else 0,
        max_rows=limit.rows if limit else 0,
        fp32=not set(kept).isdisjoint(module.name.split(".")),
        expert_ranges=placed.expert_ranges,
    )


def _context(checked: Checked, decoder: DecoderSpec) -> int:
    asked = checked.recipe.runtime.context
    return min(decoder.context, AUTO_CONTEXT) if asked in (None, "auto") else int(asked)


def _max_batch(checked: Checked) -> int:
    asked = checked.recipe.runtime.max_batch
    return AUTO_BATCH if asked in (None, "auto") else int(asked)


def _threads(checked: Checked) -> int:
    asked = checked.recipe.runtime.threads
    if asked not in (None, "auto"):
        return int(asked)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // Layout.of(checked.recipe.parallel).size)


def _copies(layout: Layout) -> list[str]:
    copies = layout.size // layout.tp_size
    return [f"{layout.size} ranks: {layout}; only tp cuts weights, which are held {copies} times"] if copies > 1 else []


def _imbalance(all_cuts: Mapping[str, Cuts], decoder: DecoderSpec | None) -> list[str]:
    notes = []
    for prefix, cuts in all_cuts.items():
        counts = [q1 - q0 for q0, q1 in cuts.axes.get("q_heads" if decoder else "heads", ())]
        if len(set(counts)) > 1:
            notes.append(
                f"{f'{prefix[:-1]}: ' if prefix else ''}uneven heads: {' + '.join(map(str, counts))} query heads on "
                f"ranks 0 to {len(counts) - 1}; the largest rank has {max(counts) * len(counts) / sum(counts):.2f} "
                "times the mean"
            )
        if decoder and len(counts) > 1 and decoder.mla:
            notes.append("every rank holds the whole latent cache: MLA has no KV heads to deal")
        elif decoder and len(counts) > decoder.kv_heads:
            notes.append(f"{len(counts)} ranks share {decoder.kv_heads} KV heads: each rank holds a copy of one")
    return notes


def _uncounted(decoder: DecoderSpec | None) -> list[str]:
    if decoder:
        return []
    return ["text encoder, VAE and activations are not counted: transformers only"]


def _offloaded(runtime: RuntimePlan) -> list[str]:
    if runtime.offload == "none":
        return []
    return ["one expert is in memory at a time: each output reads both again"]
