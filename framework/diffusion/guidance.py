"""Classifier-free guidance over two ranks: each makes one of the two predictions that a step combines."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn

from framework.families.guided import Guided
from framework.layers.group import Group


def share_guidance(model: nn.Module, guided: Guided, group: Group) -> None:
    """Let each of the two ranks make one prediction of every pair; both get both, and combine them alike."""
    (_share_batch if guided.passes == "batch" else _share_calls)(model, group)


def _share_batch(model: nn.Module, group: Group) -> None:
    """Each call is for both predictions, one half of the batch each."""
    forward, signature = model.forward, inspect.signature(model.forward)

    def half(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        given = signature.bind(*args, **kwargs)
        batch = given.arguments["hidden_states"].shape[0]
        if batch % 2:
            raise RuntimeError(f"a batch of {batch} is not the two predictions of guidance")
        for name, value in given.arguments.items():
            if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch:
                given.arguments[name] = value.chunk(2)[group.rank]
        out = forward(*given.args, **given.kwargs)
        both = group.all_gather(out[0], [batch // 2] * 2, dim=0)
        return (both,) if isinstance(out, tuple) else type(out)(sample=both)

    model.forward = half


def _share_calls(model: nn.Module, group: Group) -> None:
    """Two calls a step on the same latents: rank 0 makes the first, rank 1 the second, at the same time.

    Rank 1 cannot return the first prediction before rank 0 has made it: it returns an empty tensor, which becomes
    that prediction in the second call. Pipelines combine the two only after both calls.
    """
    forward = model.forward
    latents: list[Tensor] = []
    first: list[Tensor] = []

    def turn(*args: Any, **kwargs: Any) -> tuple[Tensor]:  # noqa: ANN401
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if not first:
            latents[:] = [x]
            first[:] = [forward(*args, **kwargs)[0] if group.rank == 0 else x.new_empty(0)]
            return (first[0],)
        if x is not latents[0]:
            raise RuntimeError("the two predictions of guidance are not made from the same latents")
        cond = first.pop()
        own = cond if group.rank == 0 else forward(*args, **kwargs)[0]
        both = group.all_gather(own, [len(own)] * 2, dim=0).chunk(2)
        if group.rank == 1:
            cond.set_(both[0])
        return (both[1],)

    model.forward = turn
