"""What a recipe asks of the model as a whole that it does not have: context, dtype, parallel axes."""

from __future__ import annotations

from framework.errors import Problem
from framework.planning.axes import axes
from framework.planning.parts import Described
from framework.recipe.schema import Recipe


def demands(recipe: Recipe, model: Described) -> list[Problem]:
    """Problems: `dtype-device`, `context`, `ep-size`, and those of `axes`."""
    return [*_dtype(recipe), *_context(recipe, model), *_experts(recipe, model), *axes(recipe, model)]


def _dtype(recipe: Recipe) -> list[Problem]:
    if recipe.runtime.dtype != "float32" or recipe.runtime.device != "npu":
        return []
    return [
        Problem(
            "dtype-device",
            "float32 is the reference mode of the CPU, this recipe asks for NPUs",
            recipe.where("runtime.dtype"),
            "the NPU ops of the quantized layers take float16 and bfloat16",
            "runtime.dtype=bfloat16   or   runtime.device=cpu",
        )
    ]


def _context(recipe: Recipe, model: Described) -> list[Problem]:
    context, spec = recipe.runtime.context, model.decoder
    if spec is None or context in (None, "auto") or int(context) <= spec.context:
        return []
    return [
        Problem(
            "context",
            f"a context of {int(context)} tokens was asked, the model has {spec.context}",
            recipe.where("runtime.context"),
            "positions beyond the model's context give garbage",
            f"runtime.context={spec.context}",
        )
    ]


def _experts(recipe: Recipe, model: Described) -> list[Problem]:
    ep_size, tp_size = recipe.parallel.ep_size, recipe.parallel.tp_size
    if ep_size == 1:
        return []
    moe = model.decoder.moe if model.decoder else None
    where = recipe.where("parallel.ep_size")
    if moe is None:
        return [
            Problem(
                "parallel-unused",
                "parallel.ep_size deals experts to ranks, this model has none",
                where,
                fix="parallel.ep_size=1",
            )
        ]
    if tp_size % ep_size == 0 and ep_size <= moe.experts:
        return []
    sizes = [size for size in range(1, tp_size + 1) if tp_size % size == 0 and size <= moe.experts]
    return [
        Problem(
            "ep-size",
            f"{moe.experts} experts cannot be dealt to {ep_size} groups of {tp_size} ranks",
            where,
            "the ranks of parallel.tp_size are divided into equal groups, each with its own experts",
            f"parallel.ep_size={' or '.join(map(str, sizes))}   or   parallel.tp_size={ep_size}",
        )
    ]
