"""Diffusion transformers described: from a component's config.json to every weight of its diffusers class.

Names, shapes and class defaults are those of diffusers 0.42. Text towers and VAEs are not described: they stay float.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from framework.errors import InputError, Problem, Refused, nearest
from framework.families.base import MOST_LAYERS
from framework.families.pieces import attention, column, copied, embedder, feed_forward, norm, packed, parameter, patch
from framework.geometry import Module

Config = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class DiffusionSpec:
    """A diffusion transformer: `layers` blocks of width `heads` x `head_dim` with feed-forward nets of width `ffn`.

    `options` are the constructor's arguments with the class's defaults filled in, without those that change no weight.
    """

    class_name: str
    layers: int
    heads: int
    head_dim: int
    ffn: int
    options: dict[str, Any]

    @property
    def hidden(self) -> int:
        """Width of the residual stream."""
        return self.heads * self.head_dim

    def to_json(self) -> dict[str, Any]:
        """Return plain data, `from_json` reads it back."""
        return {name: getattr(self, name) for name in self.__slots__}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DiffusionSpec:
        """Read what `to_json` wrote, or what JSON made of it."""
        return cls(**(data | {"options": _frozen(data["options"])}))


def describe_transformer(config: Config) -> DiffusionSpec:
    """Return the transformer that a diffusers config describes.

    Raises:
        Refused: `architecture-unsupported`, a class or a variant of one that is not described.
        InputError: `config-value`, a value of the wrong type or size.
    """
    name = str(config.get("_class_name"))
    if name == "Transformer2DModel" and config.get("norm_type") == "ada_norm_zero":
        name = "DiTTransformer2DModel"  # the class's name before it had one of its own
    if name not in CLASSES:
        like = nearest(name, CLASSES)
        raise Refused(
            Problem(
                "architecture-unsupported",
                f"transformers of class {name} cannot be run yet",
                "config.json: _class_name",
                f"supported: {', '.join(sorted(CLASSES))}",
                f"is it a {like[0]}?" if like else "use a pipeline whose transformer is of a supported class",
            )
        )
    known = CLASSES[name]
    options = _frozen({key: config.get(key, default) for key, default in known.defaults.items()})
    _refuse_variants(name, known, config)
    try:
        heads, head_dim = int(options["num_attention_heads"]), int(options["attention_head_dim"])
        ffn = int(options.get("ffn_dim") or 4 * heads * head_dim)
        spec = DiffusionSpec(name, int(options["num_layers"]), heads, head_dim, ffn, options)
        if max(spec.layers, int(options.get("num_single_layers") or 0)) > MOST_LAYERS:
            raise ValueError(f"more than {MOST_LAYERS} blocks")
        made = list(diffusion_modules(spec))
        if min(min(module.shape) for module in made) < 1:
            raise ValueError("a size is below 1")
    except (TypeError, ValueError, IndexError) as error:
        raise InputError(
            Problem(
                "config-value",
                f"a value in the config of this {name} is unusable: {error}",
                "config.json",
                fix="use the config.json that was published with the weights",
            )
        ) from error
    return spec


def _frozen(options: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}


def diffusion_modules(spec: DiffusionSpec) -> Iterator[Module]:
    """Yield every weight of the transformer.

    Attention is dealt by `heads`, feed-forward nets by `ffn`; Flux's proj_out of single blocks, whose columns lie on
    both, by its rows. All else is on every rank: embedders, modulation, outputs.
    """
    return CLASSES[spec.class_name].modules(spec)


def _wan(spec: DiffusionSpec) -> Iterator[Module]:
    o, dim = spec.options, spec.hidden
    yield from patch("patch_embedding", dim, int(o["in_channels"]), *o["patch_size"])
    yield from embedder("condition_embedder.time_embedder", o["freq_dim"], dim)
    yield copied("condition_embedder.time_proj", 6 * dim, dim)
    yield from embedder("condition_embedder.text_embedder", o["text_dim"], dim)
    if (image := o["image_dim"]) is not None:
        name = "condition_embedder.image_embedder"
        if o["pos_embed_seq_len"] is not None:
            yield parameter(f"{name}.pos_embed", 1, o["pos_embed_seq_len"], image)
        yield norm(f"{name}.norm1", image, bias=True)
        yield copied(f"{name}.ff.net.0.proj", image, image)
        yield copied(f"{name}.ff.net.2", dim, image)
        yield norm(f"{name}.norm2", dim, bias=True)
    for i in range(spec.layers):
        block = f"blocks.{i}"
        yield parameter(f"{block}.scale_shift_table", 1, 6, dim)
        yield from attention(f"{block}.attn1", spec.heads, spec.head_dim, norm_size=dim)
        yield from attention(f"{block}.attn2", spec.heads, spec.head_dim, norm_size=dim)
        if (image := o["added_kv_proj_dim"]) is not None:
            yield column(f"{block}.attn2.add_k_proj", dim, image, "heads", spec.head_dim)
            yield column(f"{block}.attn2.add_v_proj", dim, image, "heads", spec.head_dim)
            yield norm(f"{block}.attn2.norm_added_k", dim)
        if o["cross_attn_norm"]:
            yield norm(f"{block}.norm2", dim, bias=True)
        yield from feed_forward(f"{block}.ffn", dim, spec.ffn)
    yield parameter("scale_shift_table", 1, 2, dim)
    yield copied("proj_out", int(o["out_channels"] or o["in_channels"]) * prod(o["patch_size"]), dim)


def _flux(spec: DiffusionSpec) -> Iterator[Module]:
    o, dim = spec.options, spec.hidden
    yield from embedder("time_text_embed.timestep_embedder", 256, dim)
    if o["guidance_embeds"]:
        yield from embedder("time_text_embed.guidance_embedder", 256, dim)
    yield from embedder("time_text_embed.text_embedder", o["pooled_projection_dim"], dim)
    yield copied("context_embedder", dim, o["joint_attention_dim"])
    yield copied("x_embedder", dim, o["in_channels"])
    for i in range(spec.layers):
        block = f"transformer_blocks.{i}"
        yield copied(f"{block}.norm1.linear", 6 * dim, dim)
        yield copied(f"{block}.norm1_context.linear", 6 * dim, dim)
        yield from attention(f"{block}.attn", spec.heads, spec.head_dim, norm_size=spec.head_dim, added=True)
        yield from feed_forward(f"{block}.ff", dim, spec.ffn)
        yield from feed_forward(f"{block}.ff_context", dim, spec.ffn)
    for i in range(int(o["num_single_layers"])):
        block = f"single_transformer_blocks.{i}"
        yield copied(f"{block}.norm.linear", 3 * dim, dim)
        yield from attention(f"{block}.attn", spec.heads, spec.head_dim, norm_size=spec.head_dim, out=False)
        yield column(f"{block}.proj_mlp", spec.ffn, dim, "ffn")
        yield packed(f"{block}.proj_out", dim, dim + spec.ffn, ("heads", spec.head_dim), ("ffn", 1))
    yield from _modulated_output(spec, o["patch_size"])


def _dit(spec: DiffusionSpec) -> Iterator[Module]:
    o, dim = spec.options, spec.hidden
    yield from patch("pos_embed.proj", dim, int(o["in_channels"]), o["patch_size"], o["patch_size"])
    for i in range(spec.layers):
        block = f"transformer_blocks.{i}"
        yield from embedder(f"{block}.norm1.emb.timestep_embedder", 256, dim)
        # one row more than classes: that of no class
        table = f"{block}.norm1.emb.class_embedder.embedding_table.weight"
        yield parameter(table, int(o["num_embeds_ada_norm"]) + 1, dim)
        yield copied(f"{block}.norm1.linear", 6 * dim, dim)
        yield from attention(f"{block}.attn1", spec.heads, spec.head_dim, bias=bool(o["attention_bias"]))
        yield from feed_forward(f"{block}.ff", dim, spec.ffn)
    yield copied("proj_out_1", 2 * dim, dim)
    yield copied("proj_out_2", int(o["patch_size"]) ** 2 * int(o["out_channels"] or o["in_channels"]), dim)


def _sd3(spec: DiffusionSpec) -> Iterator[Module]:
    o, dim, heads, head_dim = spec.options, spec.hidden, spec.heads, spec.head_dim
    norm_size = head_dim if o["qk_norm"] else 0
    yield from patch("pos_embed.proj", dim, int(o["in_channels"]), o["patch_size"], o["patch_size"])
    if o["pos_embed_max_size"]:
        yield parameter("pos_embed.pos_embed", 1, int(o["pos_embed_max_size"]) ** 2, dim)
    yield from embedder("time_text_embed.timestep_embedder", 256, dim)
    yield from embedder("time_text_embed.text_embedder", o["pooled_projection_dim"], dim)
    yield copied("context_embedder", o["caption_projection_dim"], o["joint_attention_dim"])
    for i in range(spec.layers):
        block, last, dual = f"transformer_blocks.{i}", i == spec.layers - 1, i in o["dual_attention_layers"]
        yield copied(f"{block}.norm1.linear", (9 if dual else 6) * dim, dim)
        yield copied(f"{block}.norm1_context.linear", (2 if last else 6) * dim, dim)
        yield from attention(f"{block}.attn", heads, head_dim, norm_size=norm_size, added=True, added_out=not last)
        if dual:
            yield from attention(f"{block}.attn2", heads, head_dim, norm_size=norm_size)
        yield from feed_forward(f"{block}.ff", dim, spec.ffn)
        if not last:
            yield from feed_forward(f"{block}.ff_context", dim, spec.ffn)
    yield from _modulated_output(spec, o["patch_size"])


def _qwen_image(spec: DiffusionSpec) -> Iterator[Module]:
    o, dim = spec.options, spec.hidden
    yield from embedder("time_text_embed.timestep_embedder", 256, dim)
    if o["use_additional_t_cond"]:
        yield parameter("time_text_embed.addition_t_embedding.weight", 2, dim)
    yield norm("txt_norm", o["joint_attention_dim"])
    yield copied("img_in", dim, o["in_channels"])
    yield copied("txt_in", dim, o["joint_attention_dim"])
    for i in range(spec.layers):
        block = f"transformer_blocks.{i}"
        yield copied(f"{block}.img_mod.1", 6 * dim, dim)
        yield copied(f"{block}.txt_mod.1", 6 * dim, dim)
        yield from attention(f"{block}.attn", spec.heads, spec.head_dim, norm_size=spec.head_dim, added=True)
        yield from feed_forward(f"{block}.img_mlp", dim, spec.ffn)
        yield from feed_forward(f"{block}.txt_mlp", dim, spec.ffn)
    yield from _modulated_output(spec, o["patch_size"])


def _modulated_output(spec: DiffusionSpec, patch_size: int) -> Iterator[Module]:
    channels = int(spec.options["out_channels"] or spec.options["in_channels"])
    yield copied("norm_out.linear", 2 * spec.hidden, spec.hidden)
    yield copied("proj_out", patch_size**2 * channels, spec.hidden)


@dataclass(frozen=True, slots=True)
class _Class:
    """A diffusers class: its weights, its arguments that shape them, and the values that others must have."""

    modules: Callable[[DiffusionSpec], Iterator[Module]]
    defaults: dict[str, Any]
    fixed: dict[str, tuple[Any, ...]]


# Parts of modules' names whose values diffusers keeps in fp32 (a class's _keep_in_fp32_modules).
KEPT_FP32 = {
    "WanTransformer3DModel": ("rope", "time_embedder", "scale_shift_table", "norm1", "norm2", "norm3"),
}
CLASSES = {
    "WanTransformer3DModel": _Class(
        _wan,
        {
            "patch_size": (1, 2, 2), "num_attention_heads": 40, "attention_head_dim": 128, "in_channels": 16,
            "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 13824, "num_layers": 40,
            "cross_attn_norm": True, "image_dim": None, "added_kv_proj_dim": None, "pos_embed_seq_len": None,
        },
        {"qk_norm": ("rms_norm_across_heads",)},
    ),
    "FluxTransformer2DModel": _Class(
        _flux,
        {
            "patch_size": 1, "in_channels": 64, "out_channels": None, "num_layers": 19, "num_single_layers": 38,
            "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
            "pooled_projection_dim": 768, "guidance_embeds": False,
        },
        {},
    ),
    "DiTTransformer2DModel": _Class(
        _dit,
        {
            "num_attention_heads": 16, "attention_head_dim": 72, "in_channels": 4, "out_channels": None,
            "num_layers": 28, "attention_bias": True, "patch_size": 2, "num_embeds_ada_norm": 1000,
        },
        {
            "norm_type": ("ada_norm_zero",), "activation_fn": ("gelu-approximate", "gelu"),
            "norm_elementwise_affine": (False,), "cross_attention_dim": (None,),
        },
    ),
    "SD3Transformer2DModel": _Class(
        _sd3,
        {
            "patch_size": 2, "in_channels": 16, "num_layers": 18, "attention_head_dim": 64, "num_attention_heads": 18,
            "joint_attention_dim": 4096, "caption_projection_dim": 1152, "pooled_projection_dim": 2048,
            "out_channels": 16, "pos_embed_max_size": 96, "dual_attention_layers": (), "qk_norm": None,
        },
        {"qk_norm": (None, "rms_norm")},
    ),
    "QwenImageTransformer2DModel": _Class(
        _qwen_image,
        {
            "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_layers": 60, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 3584, "use_additional_t_cond": False,
        },
        {},
    ),
}  # fmt: skip


def _refuse_variants(name: str, known: _Class, config: Config) -> None:
    found = [f"{key} {config[key]}" for key, values in known.fixed.items() if config.get(key, values[0]) not in values]
    if found:
        raise Refused(
            Problem(
                "architecture-unsupported",
                f"the config asks for {', '.join(found)}, which cannot be run yet",
                "config.json",
                f"{name} is run with " + ", ".join(f"{k} {' or '.join(map(str, v))}" for k, v in known.fixed.items()),
                "use a checkpoint without it",
            )
        )
