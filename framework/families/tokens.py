"""Where the tokens of a diffusion transformer are dealt to ranks (Ulysses), and which attentions then need all.

Names are those of diffusers 0.42's classes. Between the places named here every module works token by token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Stream = Literal["image", "text"]


@dataclass(frozen=True, slots=True)
class Cut:
    """A tensor of which each rank keeps its tokens: argument `name` (or output `name`) of a module, along `dim`.

    `module`: its name, `*` for every number.
    `ndim`: only where the tensor has so many dimensions; 0: always.
    """

    module: str
    name: str | int
    dim: int
    stream: Stream
    ndim: int = 0


@dataclass(frozen=True, slots=True)
class TokenPlan:
    """`cuts` deal the tokens, `gathered` is the module after which those of the image are whole again.

    `attentions`: the last name of the modules that attend over all tokens, and the streams they attend over.
    """

    cuts: tuple[Cut, ...]
    gathered: str
    attentions: dict[str, tuple[Stream, ...]]


_FIRST = "transformer_blocks.0"
_BOTH: tuple[Stream, ...] = ("image", "text")
TOKENS = {
    "WanTransformer3DModel": TokenPlan(
        (
            Cut("", "timestep", 1, "image", ndim=2),  # a timestep per token: TI2V
            Cut("rope", 0, 1, "image"),
            Cut("rope", 1, 1, "image"),
            Cut("blocks.0", "hidden_states", 1, "image"),
        ),
        "proj_out",
        {"attn1": ("image",)},
    ),
    "FluxTransformer2DModel": TokenPlan(
        (
            Cut("", "hidden_states", 1, "image"),
            Cut("", "encoder_hidden_states", 1, "text"),
            Cut("", "img_ids", 0, "image"),
            Cut("", "txt_ids", 0, "text"),
        ),
        "proj_out",
        {"attn": _BOTH},
    ),
    "QwenImageTransformer2DModel": TokenPlan(
        (
            Cut("pos_embed", 0, 0, "image"),
            Cut("pos_embed", 1, 0, "text"),
            Cut(_FIRST, "hidden_states", 1, "image"),
            Cut(_FIRST, "encoder_hidden_states", 1, "text"),
            Cut("transformer_blocks.*", "encoder_hidden_states_mask", 1, "text"),
        ),
        "proj_out",
        {"attn": _BOTH},
    ),
    "SD3Transformer2DModel": TokenPlan(
        (Cut(_FIRST, "hidden_states", 1, "image"), Cut(_FIRST, "encoder_hidden_states", 1, "text")),
        "proj_out",
        {"attn": _BOTH, "attn2": ("image",)},
    ),
    "DiTTransformer2DModel": TokenPlan(
        (Cut(_FIRST, "hidden_states", 1, "image"),), "proj_out_2", {"attn1": ("image",)}
    ),
}
