"""A faster way to a module's own parts, and to its forward."""

from __future__ import annotations

from typing import Any

from torch import nn


class LeanModule(nn.Module):
    """A module that is called at the price of a function.

    nn.Module looks for hooks of six kinds at every call, and a decoded token makes 240 of them. Here a forward hook
    of the module's own is honoured, no other kind.
    """

    def __call__(self, *args: Any) -> Any:  # noqa: ANN401
        """Call `forward`, through nn.Module where the module has a forward hook."""
        return super().__call__(*args) if self._forward_hooks else self.forward(*args)


def find_submodules_directly(module: nn.Module) -> None:
    """Let attribute access find submodules in the instance, not through nn.Module.__getattr__.

    That look-up costs 2 us, and a decoded token makes 240 of them. Called at the end of `__init__`; the parts
    stay registered, so that `modules()` and hooks see them.
    """
    module.__dict__.update(module._modules)
