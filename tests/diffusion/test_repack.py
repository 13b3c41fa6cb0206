"""Original Wan checkpoints of the real quantizer, repacked into the diffusers layout."""

import json
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch

from framework.checkpoint import write
from framework.diffusion.repack import repack
from framework.diffusion.wan_names import diffusers_name
from framework.errors import InputError, Refused

GOLDEN = Path(__file__).parents[1] / "golden" / "diffusion"
ORIGINAL = GOLDEN / "tiny-wan22-original"
# typed from the name table of diffusers' own conversion script
NAMES = {
    "patch_embedding.weight": "patch_embedding.weight",
    "text_embedding.0.bias": "condition_embedder.text_embedder.linear_1.bias",
    "time_embedding.2.weight": "condition_embedder.time_embedder.linear_2.weight",
    "time_projection.1.weight": "condition_embedder.time_proj.weight",
    "img_emb.proj.1.weight": "condition_embedder.image_embedder.ff.net.0.proj.weight",
    "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
    "head.head.weight": "proj_out.weight",
    "head.modulation": "scale_shift_table",
    "blocks.7.modulation": "blocks.7.scale_shift_table",
    "blocks.7.self_attn.q.weight_scale": "blocks.7.attn1.to_q.weight_scale",
    "blocks.7.self_attn.o.linear.weight": "blocks.7.attn1.to_out.0.weight",
    "blocks.7.self_attn.o.div.mul_scale": "blocks.7.attn1.to_out.0.mul_scale",
    "blocks.7.cross_attn.norm_k.weight": "blocks.7.attn2.norm_k.weight",
    "blocks.7.cross_attn.k_img.weight": "blocks.7.attn2.add_k_proj.weight",
    "blocks.7.cross_attn.norm_k_img.weight": "blocks.7.attn2.norm_added_k.weight",
    "blocks.7.norm3.bias": "blocks.7.norm2.bias",
    "blocks.7.norm2.weight": "blocks.7.norm3.weight",
    "blocks.7.ffn.0.quant_bias": "blocks.7.ffn.net.0.proj.quant_bias",
    "blocks.7.ffn.2.weight": "blocks.7.ffn.net.2.weight",
    "blocks.7.self_attn.q_rot": "blocks.7.attn1.q_rot",
    "blocks.7.self_attn.quant_type": "blocks.7.attn1.quant_type",
}
SETS = {"w8a8-dynamic": True, "w8a8-static": False, "w4a4-mxfp4": False}  # whether both experts are there


@pytest.mark.parametrize(("old", "new"), NAMES.items())
def test_every_kind_of_name_has_one_rule(old, new):
    assert diffusers_name(old) == new


@pytest.mark.parametrize(
    "name", ["blocks.7.self_attn.q", "xblocks.7.ffn.0.weight", "head.head.weight.more", "conv.weight"]
)
def test_rules_are_anchored_at_both_ends(name):
    assert diffusers_name(name) is None


@pytest.fixture
def pipeline(tmp_path):
    """The float pipeline; with one transformer for the sets that hold one."""

    def make(both):
        base = tmp_path / "base"
        shutil.copytree(GOLDEN / "tiny-wan2.2", base)
        if not both:
            shutil.rmtree(base / "transformer_2")
            index = json.loads((base / "model_index.json").read_text())
            index |= {"transformer_2": [None, None], "boundary_ratio": None}
            (base / "model_index.json").write_text(json.dumps(index))
        return base

    return make


def weights(folder):
    (file,) = folder.glob("*.safetensors")
    return safetensors.torch.load_file(file)


def quiet(stage, done, total):
    assert done <= total


@pytest.mark.parametrize("name", SETS)
def test_every_tensor_arrives_bit_for_bit_under_its_name(pipeline, tmp_path, name):
    base, output = pipeline(SETS[name]), tmp_path / "out"
    counts = repack(base, ORIGINAL / name, output, quiet)
    experts = (
        {"transformer": "high_noise_model", "transformer_2": "low_noise_model"} if SETS[name] else {"transformer": "."}
    )
    assert counts.keys() == experts.keys()
    for component, folder in experts.items():
        source, made = weights(ORIGINAL / name / folder), weights(output / component)
        assert len(source) == len(made)
        for old, tensor in source.items():
            new = made[diffusers_name(old)]
            assert new.dtype == tensor.dtype and torch.equal(new.view(torch.uint8), tensor.view(torch.uint8))
        described = json.loads((output / component / "quant_model_description.json").read_text())
        assert all(made_name in described for made_name in made)
        assert not any(".self_attn." in key or ".cross_attn." in key for key in described)
        # the config is the float pipeline's, not Wan's own
        assert (output / component / "config.json").read_text().count("WanTransformer3DModel") == 1
    assert (output / "scheduler").is_dir() and (output / "model_index.json").is_file()


def test_smoothing_factors_are_kept(pipeline, tmp_path):
    repack(pipeline(both=False), ORIGINAL / "w4a4-mxfp4", tmp_path / "out", quiet)
    names = weights(tmp_path / "out" / "transformer")
    assert any(name.endswith("ffn.net.2.mul_scale") for name in names)


def test_an_output_that_exists_is_refused(pipeline, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError) as refused:
        repack(pipeline(both=True), ORIGINAL / "w8a8-dynamic", tmp_path / "out", quiet)
    assert refused.value.problems[0].code == "output-exists"


def test_experts_that_do_not_fit_the_pipeline_are_named(pipeline, tmp_path):
    with pytest.raises(InputError) as refused:
        repack(pipeline(both=True), ORIGINAL / "w8a8-static", tmp_path / "out", quiet)
    (problem,) = refused.value.problems
    assert problem.code == "repack-experts" and "transformer_2" in problem.what


def changed(tmp_path, change):
    source = tmp_path / "source"
    shutil.copytree(ORIGINAL / "w8a8-static", source)
    (file,) = source.glob("*.safetensors")
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)
    return source


def test_a_name_that_no_rule_knows_is_said(pipeline, tmp_path):
    source = changed(tmp_path, lambda tensors: tensors.update({"blocks.0.extra.weight": torch.ones(2, 2)}))
    with pytest.raises(Refused) as refused:
        repack(pipeline(both=False), source, tmp_path / "out", quiet)
    assert (
        refused.value.problems[0].code == "repack-names" and "blocks.0.extra.weight" in refused.value.problems[0].what
    )


def test_a_tensor_that_the_base_has_and_the_file_lacks_is_said(pipeline, tmp_path):
    source = changed(tmp_path, lambda tensors: tensors.pop("blocks.0.ffn.0.deq_scale"))
    with pytest.raises(Refused) as refused:
        repack(pipeline(both=False), source, tmp_path / "out", quiet)
    assert "blocks.0.ffn.net.0.proj.deq_scale" in refused.value.problems[0].what
    assert not (tmp_path / "out").exists()


def test_interrupted_it_leaves_nothing(pipeline, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(write.CheckpointWriter, "put", interrupt)
    with pytest.raises(KeyboardInterrupt):
        repack(pipeline(both=True), ORIGINAL / "w8a8-dynamic", tmp_path / "out", quiet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]
