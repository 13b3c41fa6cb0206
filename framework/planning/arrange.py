"""`parallel.devices`: a layout for a number of devices, and why it is this one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from framework.checkpoint.index import Index
from framework.errors import Problem
from framework.planning.axes import guidance_off, ulysses_sizes
from framework.planning.check import Capability, Checked, check
from framework.planning.draft import planned_modules
from framework.planning.layout import Layout
from framework.planning.memory import held_at_once
from framework.planning.ranks import GIB, capacity_bytes
from framework.recipe.schema import Recipe

# Of a device's memory: the rest is for activations, text encoder and decoder, which a plan does not count.
WEIGHTS_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Choice:
    """A layout and a sentence about each axis."""

    layout: Layout
    reasons: tuple[str, ...]


def check_arranged(recipe: Recipe, indexes: Mapping[str, Index], capability: Capability) -> Checked:
    """Check a recipe (see planning.check); with `parallel.devices` in the layout that is chosen for so many.

    Sizes above 1 are kept, the others are chosen: `tp` so large that the weights fit, then what makes one output ready
    soonest: the two predictions of guidance side by side, then tokens over ranks; copies where there are devices left.
    """
    devices = recipe.parallel.devices
    if devices is None or recipe.model.kind != "diffusion":
        return check(recipe, indexes, capability)
    given = Layout.of(recipe.parallel)
    free, rest = divmod(devices, given.size)
    if rest:
        checked = check(recipe, indexes, capability)
        return replace(checked, problems=(*checked.problems, _uneven(recipe, given, devices)))
    tried = _cut(recipe, indexes, capability, [n for n in _divisors(free) if given.tp_size == 1 or n == 1])
    if not tried[-1].ok:
        return tried[-1]
    checked = tried[-1]
    tp_size = checked.recipe.parallel.tp_size
    choice = choose(
        devices,
        replace(given, tp_size=tp_size),
        _about_weights(tried),
        guidance_off(checked.recipe, checked.model),
        ulysses_sizes(checked.model, tp_size),
    )
    done = check(_laid_out(recipe, choice.layout), indexes, capability)
    return replace(done, notes=(f"{devices} devices: {choice.layout}", *choice.reasons, *done.notes))


def choose(devices: int, given: Layout, about_weights: str, off: str, token_sizes: list[int]) -> Choice:
    """Deal what `given` leaves of the devices.

    Args:
        devices: ranks in all, a multiple of those of `given`.
        given: sizes that are settled; 1: to be chosen (but of `tp`).
        about_weights: why `tp` is as large as it is.
        off: why a step makes one prediction; empty: it makes two.
        token_sizes: ranks that the tokens can be dealt to.
    """
    free = devices // given.size
    reasons = [f"tp {given.tp_size}: {about_weights}"]
    layout = given
    if given.cfg_size == 1:
        if free % 2 == 0 and not off:
            layout, free = replace(layout, cfg_size=2), free // 2
            reasons.append("cfg 2: the two predictions of a step are made side by side, almost without talking")
        elif off:
            reasons.append(f"cfg 1: {off}")
    if given.ulysses_size == 1:
        size = max(n for n in token_sizes if free % n == 0)
        layout, free = replace(layout, ulysses_size=size), free // size
        if size > 1:
            reasons.append(
                f"ulysses {size}: the tokens of a step are dealt; heads allow {_listed(token_sizes, devices)}"
            )
    if free > 1:
        layout = replace(layout, data_size=layout.data_size * free)
        reasons.append(f"data {layout.data_size}: devices that one output cannot use draw others")
    reasons.append(
        "chosen for the time of one output; for many, copies finish more in the same time: parallel.data_size"
    )
    return Choice(layout, tuple(reasons))


def _cut(recipe: Recipe, indexes: Mapping[str, Index], capability: Capability, sizes: list[int]) -> list[Checked]:
    """Check at growing tensor-parallel sizes up to the first that fits; sizes that cannot be cut are left out."""
    tried: list[Checked] = []
    for size in sizes:
        tp_size = recipe.parallel.tp_size * size
        checked = check(_laid_out(recipe, replace(Layout.of(recipe.parallel), tp_size=tp_size)), indexes, capability)
        if checked.ok or not tried:
            tried.append(checked)
        if not checked.ok and size == 1:
            break  # what is wrong on one rank is wrong on all
        if checked.ok and _weights(checked) <= WEIGHTS_SHARE * (capacity_bytes(checked) or float("inf")):
            break
    return tried


def _about_weights(tried: list[Checked]) -> str:
    room = capacity_bytes(tried[-1])
    took = [f"{_weights(one) / GIB:.1f} GiB at tp {one.recipe.parallel.tp_size}" for one in tried]
    half = f"half of the {room / GIB:.1f} GiB that a device may use" if room else "a device of unknown memory"
    fits = not room or _weights(tried[-1]) <= WEIGHTS_SHARE * room
    return f"the weights of a rank are {', '.join(took)}; {'within' if fits else 'above'} {half}"


def _weights(checked: Checked) -> int:
    modules, runtime = planned_modules(checked), checked.recipe.runtime
    return max(
        sum(held_at_once(modules, rank, runtime.dtype, runtime.offload))
        for rank in range(checked.recipe.parallel.tp_size)
    )


def _laid_out(recipe: Recipe, layout: Layout) -> Recipe:
    sizes = {f"{axis}_size": size for axis, size in layout.sizes.items()}
    return replace(recipe, parallel=replace(recipe.parallel, **sizes))


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _listed(sizes: list[int], most: int) -> str:
    return ", ".join(str(n) for n in sizes if n <= most)


def _uneven(recipe: Recipe, given: Layout, devices: int) -> Problem:
    size = prod(given.sizes.values())
    return Problem(
        "devices-uneven",
        f"{devices} devices cannot be divided into groups of {size} ranks",
        recipe.where("parallel.devices"),
        f"the recipe asks for {given}; sizes above 1 are kept, the others are chosen",
        f"parallel.devices={size * max(1, round(devices / size))}   or   those sizes=1",
    )
