"""Every family equals transformers in fp32, at every position, for even and uneven tensor parallelism."""

from itertools import product

import numpy as np
import pytest
import torch
import transformers

from framework import ops
from framework.loading.load import load
from tests.models.gguf_export import export
from tests.plans import plan_for
from tests.threads import on_ranks

COMMON = dict(
    vocab_size=160, hidden_size=96, intermediate_size=160, num_hidden_layers=3, max_position_embeddings=256,
    num_attention_heads=6, num_key_value_heads=3, head_dim=16,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=64,
)  # fmt: skip
YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64)
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=2.0)
MOE = dict(num_experts_per_tok=2)
MLA = dict(
    num_key_value_heads=6, q_lora_rank=32, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=20,
    n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=48, n_shared_experts=2, first_k_dense_replace=1,
    head_dim=8,
)  # fmt: skip
DEEPSEEK_YARN = dict(rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=64, mscale=1.0,
                     mscale_all_dim=1.0, beta_fast=32, beta_slow=1)  # fmt: skip
FAMILIES = {
    "llama": ("Llama", {}),
    "llama-tied-bias": ("Llama", dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "llama-llama3-rope": ("Llama", dict(rope_parameters=LLAMA3)),
    "llama-linear-rope": ("Llama", dict(rope_parameters=LINEAR)),
    "llama-yarn-rope": ("Llama", dict(rope_parameters=YARN)),
    "mistral-sliding": ("Mistral", dict(sliding_window=8)),
    "qwen2-bias": ("Qwen2", {}),
    "qwen2-sliding": ("Qwen2", dict(use_sliding_window=True, sliding_window=8, max_window_layers=1)),
    "qwen3": ("Qwen3", {}),
    "qwen3-odd-heads": ("Qwen3", dict(num_attention_heads=5, num_key_value_heads=1, head_dim=24)),
    "qwen3-moe": ("Qwen3Moe", MOE | dict(num_experts=6, moe_intermediate_size=48, norm_topk_prob=True)),
    "qwen3-moe-dense-layers": ("Qwen3Moe", MOE | dict(num_experts=6, moe_intermediate_size=48, mlp_only_layers=[1],
                                                      norm_topk_prob=False)),
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2)),
    "deepseek-v2-lite": ("DeepseekV2", MLA | dict(q_lora_rank=None, topk_method="greedy")),
    "deepseek-v2-grouped": ("DeepseekV2", MLA | dict(topk_method="group_limited_greedy", n_group=4, topk_group=2,
                                                     routed_scaling_factor=2.0)),
    "deepseek-v3": ("DeepseekV3", MLA | dict(n_group=4, topk_group=2, routed_scaling_factor=2.5)),
    "deepseek-v3-yarn": ("DeepseekV3", MLA | dict(n_group=4, topk_group=2, rope_parameters=DEEPSEEK_YARN)),
    "gemma3": ("Gemma3Text", dict(sliding_window=8, query_pre_attn_scalar=24, layer_types=[
        "sliding_attention", "full_attention", "sliding_attention"])),
    "gemma3-pattern": ("Gemma3Text", dict(num_hidden_layers=7, sliding_window=8, query_pre_attn_scalar=16)),
}  # fmt: skip
# what a converter writes for these is all that they are
AS_GGUF = ("llama", "llama-llama3-rope", "llama-linear-rope", "llama-yarn-rope", "mistral-sliding", "qwen2-bias",
           "qwen3", "qwen3-odd-heads", "gemma3-pattern", "qwen3-moe", "mixtral")  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            kind, changes = FAMILIES[name]
            config = getattr(transformers, f"{kind}Config")(**(COMMON | changes), eos_token_id=1, pad_token_id=0)
            model_class = kind.replace("Text", "")
            model = getattr(transformers, f"{model_class}ForCausalLM")(config).eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.normal_(0, 0.08) if parameter.dim() > 1 else parameter.add_(
                        0.1 * torch.randn_like(parameter)
                    )
                for buffer_name, buffer in model.named_buffers():
                    if buffer_name.endswith("e_score_correction_bias"):
                        buffer.normal_(0, 0.1)
            folder = tmp_path_factory.mktemp(name)
            model.save_pretrained(folder)
            ids = torch.randint(2, 160, (1, 40))
            with torch.no_grad():
                logits = model(ids).logits[0].numpy()
            if name in AS_GGUF:
                export(model, folder / "model.gguf")
            made[name] = folder, ids[0].tolist(), logits
        return made[name]

    return make


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "tp_size"), [*product(FAMILIES, [1, 2, 4, 5]), ("deepseek-v3", 3)]
)  # 3 of 8 heads over a latent: the operator takes 4
def test_logits_equal_transformers_in_prefill_and_step_by_step(checkpoints, family, tp_size):
    folder, ids, expected = checkpoints(family)
    assert_equal(folder, ids, expected, tp_size)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3", "gemma3", "deepseek-v3"])
def test_on_a5_no_operator_of_atb_is_called(checkpoints, family, monkeypatch):
    for name in ("_npu_reshape_and_cache", "_npu_paged_attention"):
        monkeypatch.setattr(ops, name, None)
    folder, ids, expected = checkpoints(family)
    assert_equal(folder, ids, expected, 2, "hardware=a5")


@pytest.mark.slow
@pytest.mark.parametrize("tp_size", [1, 2, 4, 5])
@pytest.mark.parametrize("family", AS_GGUF)
def test_logits_from_a_gguf_equal_transformers(checkpoints, family, tp_size):
    folder, ids, expected = checkpoints(family)
    assert_equal(folder / "model.gguf", ids, expected, tp_size)


def assert_equal(path, ids, expected, tp_size, *given):
    plan = plan_for(path, *given, tp_size=tp_size, dtype="float32")

    def work(group):
        model = load(plan, group, lambda done, total: None)
        return model.score(ids), model.score_stepwise(ids)

    prefill, stepwise = on_ranks(tp_size, work)[0]
    spread = expected.max() - expected.min()
    assert np.abs(prefill - expected).max() <= 1e-4 * spread
    assert np.abs(stepwise - expected).max() <= 1e-4 * spread
