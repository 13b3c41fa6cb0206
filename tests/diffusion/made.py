"""Tiny transformers of every class with random weights, as pipeline folders; their inputs; a whole Wan pipeline."""

import json
import shutil
import string
from pathlib import Path

import torch

WAN = Path(__file__).parents[1] / "golden" / "diffusion" / "tiny-wan2.2"

CONFIGS = {
    "WanTransformer3DModel": dict(
        num_attention_heads=4, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16,
        ffn_dim=64, num_layers=2,
    ),
    "FluxTransformer2DModel": dict(
        in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=16, pooled_projection_dim=12, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    ),
    "DiTTransformer2DModel": dict(
        num_attention_heads=4, attention_head_dim=8, in_channels=4, num_layers=2, sample_size=6, patch_size=2,
        num_embeds_ada_norm=1000, norm_type="ada_norm_zero", norm_elementwise_affine=False,
        activation_fn="gelu-approximate",
    ),
    "SD3Transformer2DModel": dict(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=4, joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=12,
        pos_embed_max_size=8, dual_attention_layers=(0,), qk_norm="rms_norm",
    ),
    "QwenImageTransformer2DModel": dict(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
    ),
}  # fmt: skip


def reference(class_name, seed=0):
    """The plain diffusers model in fp32; no weight is 0 or 1."""
    import diffusers

    torch.manual_seed(seed)
    model = getattr(diffusers, class_name)(**CONFIGS[class_name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


def folder_of(path, class_name):
    """Write what is checked and loaded of a pipeline with one transformer of the class; return the model."""
    model = reference(class_name)
    model.save_pretrained(path / "transformer")
    parts = {"_class_name": "AnyPipeline", "transformer": ["diffusers", class_name]}
    (path / "model_index.json").write_text(json.dumps(parts))
    return model


def inputs_of(class_name, batch=2):
    """Keyword arguments of a call; as many tokens as no number of ranks divides."""
    torch.manual_seed(1)
    match class_name:
        case "WanTransformer3DModel":
            return {
                "hidden_states": torch.randn(batch, 4, 3, 6, 10),
                "timestep": torch.tensor([700.0] * batch),
                "encoder_hidden_states": torch.randn(batch, 7, 16),
            }
        case "FluxTransformer2DModel":
            ids = torch.stack(torch.meshgrid(*map(torch.arange, (1, 3, 5)), indexing="ij"), -1).view(-1, 3)
            return {
                "hidden_states": torch.randn(batch, 15, 8),
                "encoder_hidden_states": torch.randn(batch, 7, 16),
                "pooled_projections": torch.randn(batch, 12),
                "timestep": torch.tensor([0.7] * batch),
                "img_ids": ids.float(),
                "txt_ids": torch.zeros(7, 3),
                "guidance": torch.tensor([3.5] * batch),
            }
        case "DiTTransformer2DModel":
            return {
                "hidden_states": torch.randn(batch, 4, 6, 6),
                "timestep": torch.tensor([500] * batch),
                "class_labels": torch.tensor([3, 7, 1, 9][:batch]),
            }
        case "SD3Transformer2DModel":
            return {
                "hidden_states": torch.randn(batch, 4, 6, 10),
                "encoder_hidden_states": torch.randn(batch, 7, 16),
                "pooled_projections": torch.randn(batch, 12),
                "timestep": torch.tensor([500] * batch),
            }
        case "QwenImageTransformer2DModel":
            return {
                "hidden_states": torch.randn(batch, 15, 16),
                "encoder_hidden_states": torch.randn(batch, 7, 24),
                "encoder_hidden_states_mask": torch.arange(7) < torch.tensor([[7], [5], [7], [3]][:batch]),
                "timestep": torch.tensor([0.5] * batch),
                "img_shapes": [[(1, 3, 5)]] * batch,
            }


def wan_pipeline(folder):
    """Write the golden transformers and scheduler with a text encoder and a decoder of random weights."""
    import diffusers
    import transformers

    shutil.copytree(WAN, folder)
    torch.manual_seed(0)
    diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).save_pretrained(
        folder / "vae"
    )
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocabulary += [(letter, -3.0) for letter in string.ascii_lowercase]
    transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(folder / "tokenizer")
    config = transformers.UMT5Config(vocab_size=32, d_model=64, d_kv=16, d_ff=64, num_layers=1, num_heads=4)
    transformers.UMT5EncoderModel(config).save_pretrained(folder / "text_encoder")
    return folder
