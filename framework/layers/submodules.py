"""A faster way to a module's own parts."""

from __future__ import annotations

from torch import nn


def find_submodules_directly(module: nn.Module) -> None:
    """Let attribute access find submodules in the instance, not through nn.Module.__getattr__.

    That look-up costs 2 us, and a decoded token makes 240 of them. Called at the end of `__init__`; the parts
    stay registered, so that `modules()` and hooks see them.
    """
    module.__dict__.update(module._modules)
