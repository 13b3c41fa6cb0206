"""Described diffusion transformers have the names and shapes of the diffusers class, for every switch of its config."""

import json

import diffusers
import pytest
import torch

from framework.errors import InputError, Refused
from framework.families.diffusion import CLASSES, KEPT_FP32, DiffusionSpec, describe_transformer, diffusion_modules
from framework.families.pipeline import describe_pipeline
from framework.geometry import Kind, Split

SMALL = dict(num_layers=2, num_attention_heads=4, attention_head_dim=8)
WAN = dict(_class_name="WanTransformer3DModel", ffn_dim=48, freq_dim=16, text_dim=24, rope_max_seq_len=32) | SMALL
FLUX = dict(
    _class_name="FluxTransformer2DModel", num_single_layers=2, in_channels=16, joint_attention_dim=24,
    pooled_projection_dim=20, axes_dims_rope=[2, 2, 4],
) | SMALL  # fmt: skip
DIT = dict(
    _class_name="DiTTransformer2DModel", norm_type="ada_norm_zero", activation_fn="gelu-approximate",
    norm_elementwise_affine=False, num_embeds_ada_norm=10, sample_size=8,
) | SMALL  # fmt: skip
SD3 = dict(
    _class_name="SD3Transformer2DModel", joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=20,
    pos_embed_max_size=6, sample_size=8,
) | SMALL  # fmt: skip
QWEN = dict(_class_name="QwenImageTransformer2DModel", joint_attention_dim=24, axes_dims_rope=[2, 2, 4]) | SMALL
IMAGE = dict(image_dim=40, added_kv_proj_dim=32)
CONFIGS = {
    "wan": WAN,
    "wan-patch": WAN | dict(patch_size=[1, 4, 2], in_channels=6, out_channels=None, cross_attn_norm=False),
    "wan-image": WAN | IMAGE,
    "wan-image-positions": WAN | IMAGE | dict(pos_embed_seq_len=7),
    "flux": FLUX,
    "flux-guidance": FLUX | dict(guidance_embeds=True, out_channels=12, patch_size=2),
    "dit": DIT,
    "dit-no-bias": DIT | dict(attention_bias=False, out_channels=8, patch_size=4),
    "sd3": SD3,
    "sd3.5": SD3 | dict(qk_norm="rms_norm", dual_attention_layers=[0], out_channels=None),
    "sd3-computed-positions": SD3 | dict(pos_embed_max_size=None),
    "qwen-image": QWEN,
    "qwen-image-condition": QWEN | dict(use_additional_t_cond=True, out_channels=None),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_are_those_of_the_class(name):
    config = CONFIGS[name]
    with torch.device("meta"):
        model = getattr(diffusers, config["_class_name"]).from_config(config)
    described = {}
    for module in diffusion_modules(describe_transformer(config)):
        if module.kind is Kind.PARAMETER:
            described[module.name] = module.dims
            continue
        described[f"{module.name}.weight"] = module.shape[:1] if module.kind is Kind.NORM else module.shape
        if module.bias:
            described[f"{module.name}.bias"] = module.shape[:1]
    assert described == {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_heads_and_feed_forward_nets_are_dealt_and_all_else_is_on_every_rank(name):
    spec = describe_transformer(CONFIGS[name])
    lengths = {"heads": {spec.heads}, "ffn": {spec.ffn}}
    for module in diffusion_modules(spec):
        if module.axis:
            dealt = module.shape[1 if module.split is Split.ROW else 0]
            assert dealt == module.unit * next(iter(lengths[module.axis]))
            assert module.unit == (spec.head_dim if module.axis == "heads" else 1)
        elif module.packed:
            assert module.name.startswith("single_transformer_blocks.") and module.name.endswith(".proj_out")
            assert module.shape[1] == sum(unit * next(iter(lengths[axis])) for axis, unit in module.packed)
        else:
            assert module.split is Split.REPLICATED
        parts = module.name.split(".")
        in_block = parts[0].endswith("blocks") and parts[-1] not in ("proj_out", "1", "linear", "linear_1", "linear_2")
        assert bool(module.axis) == (in_block and module.kind is Kind.LINEAR)


@pytest.mark.parametrize("name", CLASSES)
def test_what_a_config_leaves_out_is_the_default_of_the_class(name):
    with torch.device("meta"):
        given = dict(getattr(diffusers, name)(num_layers=1).config)
    full = describe_transformer({"_class_name": name} | given)
    assert describe_transformer({"_class_name": name, "num_layers": 1}) == full


def test_a_spec_survives_json():
    for config in CONFIGS.values():
        spec = describe_transformer(config)
        assert DiffusionSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_the_old_class_name_of_dit_is_known():
    assert describe_transformer(DIT | dict(_class_name="Transformer2DModel")) == describe_transformer(DIT)


@pytest.mark.parametrize(
    ("config", "word"),
    [
        (WAN | dict(_class_name="WanTransformer3D"), "WanTransformer3DModel"),
        (WAN | dict(qk_norm="layer_norm"), "qk_norm layer_norm"),
        (DIT | dict(activation_fn="geglu"), "activation_fn geglu"),
        (DIT | dict(_class_name="Transformer2DModel", norm_type="layer_norm"), "Transformer2DModel"),
    ],
)
def test_other_classes_and_variants_are_refused(config, word):
    with pytest.raises(Refused) as caught:
        describe_transformer(config)
    problem = caught.value.problems[0]
    assert problem.code == "architecture-unsupported" and word in problem.what + problem.fix


@pytest.mark.parametrize("change", [dict(num_layers="many"), dict(text_dim=0), dict(patch_size=2), dict(ffn_dim=-4)])
def test_values_that_cannot_be_are_named(change):
    with pytest.raises(InputError, match="config-value"):
        describe_transformer(WAN | change)


def index(folder, **entries):
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline", **entries}))
    return folder


def test_a_pipeline_lists_its_components_and_says_which_are_transformers(tmp_path):
    wan = ["diffusers", "WanTransformer3DModel"]
    index(
        tmp_path, _diffusers_version="0.42.1", boundary_ratio=0.875, image_encoder=[None, None], transformer=wan,
        text_encoder=["transformers", "UMT5EncoderModel"], transformer_2=wan, vae=["diffusers", "AutoencoderKLWan"],
    )  # fmt: skip
    found = describe_pipeline(tmp_path)
    assert found.class_name == "WanPipeline" and found.options == {"boundary_ratio": 0.875}
    assert [c.name for c in found.components] == ["transformer", "text_encoder", "transformer_2", "vae"]
    assert [c.folder for c in found.transformers] == [tmp_path / "transformer", tmp_path / "transformer_2"]
    assert {(c.library, c.class_name) for c in found.transformers} == {tuple(wan)}


def test_a_pipeline_may_leave_its_second_transformer_out(tmp_path):
    index(tmp_path, transformer=["diffusers", "WanTransformer3DModel"], transformer_2=[None, None])
    assert [c.name for c in describe_pipeline(tmp_path).transformers] == ["transformer"]


@pytest.mark.parametrize("entries", [{}, {"_class_name": 3}, {"../vae": ["diffusers", "AutoencoderKL"]}])
def test_an_index_that_is_none_is_refused(tmp_path, entries):
    with pytest.raises(InputError, match="config-value"):
        describe_pipeline(index(tmp_path, **entries))


def test_a_folder_without_an_index_is_said(tmp_path):
    with pytest.raises(InputError, match="file-missing"):
        describe_pipeline(tmp_path)


@pytest.mark.parametrize("name", CLASSES)
def test_what_stays_fp32_is_what_diffusers_says(name):
    assert KEPT_FP32.get(name, ()) == tuple(getattr(diffusers, name)._keep_in_fp32_modules or ())
