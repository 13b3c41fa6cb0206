"""What a recipe asks of the model as a whole that it does not have: context, dtype, parallel axes."""

from __future__ import annotations

from framework.errors import Problem
from framework.planning.parts import Described
from framework.recipe.schema import Recipe


def demands(recipe: Recipe, model: Described) -> list[Problem]:
    """Problems: `dtype-device`, `context`, `parallel-unused`."""
    return [*_dtype(recipe), *_context(recipe, model), *_parallel(recipe)]


def _dtype(recipe: Recipe) -> list[Problem]:
    if recipe.runtime.dtype != "float32" or recipe.runtime.device != "npu":
        return []
    return [
        Problem(
            "dtype-device",
            "float32 is the reference mode of the CPU, this recipe asks for NPUs",
            recipe.origins.get("runtime.dtype", "runtime.dtype"),
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
            recipe.origins.get("runtime.context", "runtime.context"),
            "positions beyond the model's context give garbage",
            f"runtime.context={spec.context}",
        )
    ]


def _parallel(recipe: Recipe) -> list[Problem]:
    return [
        Problem(
            "parallel-unused",
            f"parallel.{name} cannot be planned yet",
            recipe.origins.get(f"parallel.{name}", f"parallel.{name}"),
            "models are split by tensor parallelism alone",
            f"parallel.{name}=1",
        )
        for name in ("ep_size", "cfg_size", "ulysses_size", "data_size")
        if getattr(recipe.parallel, name) != 1
    ]
