"""Whole tiny pipelines of every class with random weights, written by diffusers itself."""

import json
import string

import diffusers
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import BPE

from tests.diffusion.made import CONFIGS

WAN = dict(num_attention_heads=4, attention_head_dim=32, ffn_dim=96, num_layers=2, text_dim=32, freq_dim=32,
           out_channels=16)  # fmt: skip

LEARNED_SIGMA = {"sample_size": 8, "out_channels": 8}


def write(folder, class_name, options=None, **parts):
    """Write the parts of a pipeline and its index; return plain diffusers' pipeline of them."""
    index = {"_class_name": class_name, **(options or {})}
    for name, part in parts.items():
        if part is None:
            index[name] = [None, None]
            continue
        part.save_pretrained(folder / name)
        library = "transformers" if type(part).__module__.startswith("transformers") else "diffusers"
        index[name] = [library, type(part).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    made = getattr(diffusers, class_name)(**parts, **(options or {}))
    made.set_progress_bar_config(disable=True)
    return made


def flow(**more):
    return diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, **more)


def t5(cls, config, width):
    """A tokenizer of letters and an encoder."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    vocabulary += [(letter, -3.0) for letter in string.ascii_lowercase]
    tokenizer = transformers.T5Tokenizer(vocab=vocabulary, extra_ids=0)
    made = config(vocab_size=32, d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=4)
    return tokenizer, cls(made).eval()


def wan(folder, class_name="WanPipeline", experts=1, in_channels=16, options=None):
    torch.manual_seed(0)
    tokenizer, encoder = t5(transformers.UMT5EncoderModel, transformers.UMT5Config, 32)
    models = [diffusers.WanTransformer3DModel(**WAN, in_channels=in_channels) for _ in range(experts)]
    nothing = {"image_encoder": None, "image_processor": None} if "Image" in class_name else {}
    return write(
        folder, class_name, options, tokenizer=tokenizer, text_encoder=encoder, scheduler=flow(flow_shift=3.0),
        vae=diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        transformer=models[0], transformer_2=models[1] if experts > 1 else None, **nothing,
    )  # fmt: skip


def clip(width):
    """A tokenizer of letters and a text model."""
    words = ["<|startoftext|>", "<|endoftext|>", *string.ascii_lowercase, *(f"{c}</w>" for c in string.ascii_lowercase)]
    bpe = BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<|endoftext|>",
              end_of_word_suffix="</w>")  # fmt: skip
    tokenizer = transformers.CLIPTokenizer(vocab=dict(bpe_vocabulary(bpe)), merges=[], model_max_length=77)
    config = transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=width, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return tokenizer, config


def bpe_vocabulary(bpe):
    return Tokenizer(bpe).get_vocab()


def kl(latents):
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=latents, norm_num_groups=4, layers_per_block=1, sample_size=32, shift_factor=0.0,
        scaling_factor=1.0, use_quant_conv=False, use_post_quant_conv=False,
    )  # fmt: skip


def flux(folder):
    torch.manual_seed(0)
    tokenizer, config = clip(12)
    tokenizer_2, encoder_2 = t5(transformers.T5EncoderModel, transformers.T5Config, 16)
    return write(
        folder, "FluxPipeline", scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        tokenizer=tokenizer, text_encoder=transformers.CLIPTextModel(config).eval(), tokenizer_2=tokenizer_2,
        text_encoder_2=encoder_2, vae=kl(2),
        transformer=diffusers.FluxTransformer2DModel(**CONFIGS["FluxTransformer2DModel"]),
    )  # fmt: skip


def sd3(folder):
    torch.manual_seed(0)
    tokenizer, config = clip(6)
    tokenizer_3, encoder_3 = t5(transformers.T5EncoderModel, transformers.T5Config, 16)
    return write(
        folder, "StableDiffusion3Pipeline", scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        tokenizer=tokenizer, text_encoder=transformers.CLIPTextModelWithProjection(config).eval(),
        tokenizer_2=tokenizer, text_encoder_2=transformers.CLIPTextModelWithProjection(config).eval(),
        tokenizer_3=tokenizer_3, text_encoder_3=encoder_3, vae=kl(4),
        transformer=diffusers.SD3Transformer2DModel(**CONFIGS["SD3Transformer2DModel"]),
    )  # fmt: skip


def dit(folder):
    torch.manual_seed(0)
    return write(
        folder, "DiTPipeline", scheduler=diffusers.DDIMScheduler(), vae=kl(4),
        transformer=diffusers.DiTTransformer2DModel(**CONFIGS["DiTTransformer2DModel"] | LEARNED_SIGMA).eval(),
    )  # fmt: skip
