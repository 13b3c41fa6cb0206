"""Whether a model has what the axes of a recipe's layout deal to ranks."""

from __future__ import annotations

from framework.errors import Problem
from framework.families.guided import GUIDED
from framework.planning.parts import Described
from framework.recipe.schema import Recipe


def axes(recipe: Recipe, model: Described) -> list[Problem]:
    """Problems: `parallel-unused`, `cfg-guidance`, `ulysses-heads`, `runtime-unused`, `cache-layout`."""
    if model.decoder:
        return _runtime(recipe, model) + [
            _unused(recipe, name, "it deals a picture's work to ranks, this model writes text")
            for name in ("cfg_size", "ulysses_size", "data_size", "devices")
            if getattr(recipe.parallel, name) not in (1, None)
        ]
    return [*_guidance(recipe, model), *_tokens(recipe, model), *_runtime(recipe, model), *_cache(recipe)]


def _cache(recipe: Recipe) -> list[Problem]:
    """Steps are reused by what a rank sees: all ranks have to see the same, and their transformers to stay."""
    if not recipe.job.options.get("cache_threshold"):
        return []
    told = {
        "parallel.cfg_size": (recipe.parallel.cfg_size, 1, "each rank sees one of the two predictions"),
        "parallel.ulysses_size": (recipe.parallel.ulysses_size, 1, "each rank sees some of the tokens"),
        "runtime.offload": (recipe.runtime.offload, "none", "an expert that is dropped forgets its last step"),
    }
    return [
        Problem("cache-layout", f"job.cache_threshold goes with {key}={plain} only", recipe.where(key), why,
                f"{key}={plain}   or   job.cache_threshold=null")
        for key, (value, plain, why) in told.items()
        if value not in (plain, None)
    ]  # fmt: skip


def _runtime(recipe: Recipe, model: Described) -> list[Problem]:
    """Options of the runtime that this model has nothing for."""
    single = len(model.transformers or {}) == 1
    idle = {
        "offload": "" if recipe.runtime.offload == "none" else "none",
        "vae_tiling": "false" if recipe.runtime.vae_tiling and model.decoder else "",
        "vae_slicing": "false" if recipe.runtime.vae_slicing and model.decoder else "",
    }
    if not model.decoder and not single:
        idle["offload"] = ""
    return [
        Problem(
            "runtime-unused",
            f"runtime.{name} has nothing to do",
            recipe.where(f"runtime.{name}"),
            "this pipeline has one transformer" if single else "this model writes text",
            f"runtime.{name}={off}",
        )
        for name, off in idle.items()
        if off
    ]


def guidance_off(recipe: Recipe, model: Described) -> str:
    """Return why a step of the recipe's job makes one prediction; empty: it makes two."""
    guided = GUIDED.get(model.pipeline)
    return guided.off(recipe.job.options) if guided else f"{model.pipeline} makes one prediction a step"


def ulysses_sizes(model: Described, tp_size: int) -> list[int]:
    """Return the ranks that the tokens of all transformers can be dealt to."""
    heads = [spec.heads for spec in (model.transformers or {}).values()]
    return [n for n in range(1, min(heads) + 1) if all(one % (tp_size * n) == 0 for one in heads)] or [1]


def _guidance(recipe: Recipe, model: Described) -> list[Problem]:
    if recipe.parallel.cfg_size == 1:
        return []
    if model.pipeline not in GUIDED:
        return [_unused(recipe, "cfg_size", f"{model.pipeline} makes one prediction a step")]
    off = guidance_off(recipe, model)
    return (
        [
            Problem(
                "cfg-guidance",
                "two groups of ranks are asked for the two predictions of guidance, and one is made",
                recipe.where("parallel.cfg_size"),
                off,
                "parallel.cfg_size=1" + ("" if "empty" in off else f"   or   job.{GUIDED[model.pipeline].word}=4"),
            )
        ]
        if off
        else []
    )


def _tokens(recipe: Recipe, model: Described) -> list[Problem]:
    size, tp_size = recipe.parallel.ulysses_size, recipe.parallel.tp_size
    specs = list((model.transformers or {}).values())
    if size == 1:
        return []
    uneven = [spec for spec in specs if spec.heads % (tp_size * size)]
    if not uneven:
        return []
    sizes = ulysses_sizes(model, tp_size)
    return [
        Problem(
            "ulysses-heads",
            f"{uneven[0].heads} attention heads cannot be dealt evenly to {tp_size} x {size} ranks",
            recipe.where("parallel.ulysses_size"),
            "for attention every rank of parallel.ulysses_size takes as many heads of its tensor-parallel part",
            f"parallel.ulysses_size={' or '.join(map(str, sizes))}   or   another parallel.tp_size",
        )
    ]


def _unused(recipe: Recipe, name: str, why: str) -> Problem:
    return Problem(
        "parallel-unused",
        f"parallel.{name} has nothing to deal",
        recipe.where(f"parallel.{name}"),
        why,
        "parallel.tp_size=N" if name == "devices" else f"parallel.{name}=1",
    )
