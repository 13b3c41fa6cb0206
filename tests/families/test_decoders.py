"""Described decoders have the parameters that were published, and the tensors that transformers writes."""

import json
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open

from framework.checkpoint.index import Index
from framework.checkpoint.open import open_index
from framework.errors import InputError, Refused
from framework.families.base import DecoderSpec, ignorable, modules
from framework.families.config import describe
from framework.families.gguf import describe_gguf
from framework.formats.names import stem
from framework.geometry import Kind, Role, Split

ROOT = Path(__file__).parents[2]
# computed from the published files by the formulas of their papers, and by transformers on the meta device
PUBLISHED = {
    "Qwen3-14B": 14_768_307_200,
    "Qwen3-30B-A3B": 30_532_122_624,
    "Qwen3-32B": 32_762_123_264,
    "Qwen3-235B-A22B": 235_093_634_560,
    "Qwen3-8B": 8_190_735_360,
    "Qwen2.5-7B-Instruct": 7_615_616_512,
    "Llama-3.1-70B-Instruct": 70_553_706_496,
    "Llama-3.1-8B-Instruct": 8_030_261_248,
    "Mixtral-8x7B-Instruct-v0.1": 46_702_792_704,
    "Mistral-7B-Instruct-v0.3": 7_248_023_552,
    "gemma-3-12b-it": 11_766_034_176,
    "gemma-3-4b-it": 3_880_263_168,
    "DeepSeek-R1": 671_026_419_200,
    "DeepSeek-V2-Lite": 15_706_484_224,
    "SmolLM2-135M-Instruct": 134_515_008,
}
COMMON = dict(
    vocab_size=96, hidden_size=48, intermediate_size=80, num_hidden_layers=4, max_position_embeddings=64,
    num_attention_heads=6, num_key_value_heads=3, head_dim=16, num_experts_per_tok=2, eos_token_id=1, pad_token_id=0,
)  # fmt: skip
LATENT = dict(
    num_key_value_heads=6, head_dim=8, kv_lora_rank=24, q_lora_rank=20, qk_nope_head_dim=12, qk_rope_head_dim=8,
    v_head_dim=10, first_k_dense_replace=1, moe_intermediate_size=28, n_routed_experts=8, n_shared_experts=2,
    n_group=4, topk_group=2,
)  # fmt: skip
YARN = dict(
    rope_type="yarn", rope_theta=10000.0, factor=4.0, original_max_position_embeddings=16, mscale=0.7,
    mscale_all_dim=0.7, beta_fast=32, beta_slow=1,
)  # fmt: skip
TINY = {
    "qwen3-moe": ("Qwen3Moe", dict(num_experts=4, moe_intermediate_size=28)),
    "qwen3-moe-some-dense": ("Qwen3Moe", dict(
        num_experts=4, moe_intermediate_size=28, decoder_sparse_step=2, mlp_only_layers=[3], attention_bias=True)),
    "mixtral": ("Mixtral", dict(num_local_experts=4)),
    "deepseek-v2": ("DeepseekV2", LATENT | dict(topk_method="group_limited_greedy", attention_bias=True)),
    "deepseek-v2-lite": ("DeepseekV2", LATENT | dict(q_lora_rank=None, topk_method="greedy", rope_parameters=YARN)),
    "deepseek-v3": ("DeepseekV3", LATENT | dict(num_nextn_predict_layers=0, rope_parameters=YARN)),
}  # fmt: skip


def published(name, **changes):
    config = json.loads((ROOT / "recipes" / "assets" / "configs" / name / "config.json").read_text())
    return config | changes


def tiny(name):
    kind, changes = TINY[name]
    config = getattr(transformers, f"{kind}Config")(**(COMMON | changes))
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def made(name):
    """Return the config that transformers writes."""
    kind, changes = TINY[name]
    config = getattr(transformers, f"{kind}Config")(**(COMMON | changes), architectures=[f"{kind}ForCausalLM"])
    return json.loads(config.to_json_string(use_diff=False))


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_the_published_number_of_parameters(name):
    held = [module for module in modules(describe(published(name))) if not module.tied_to]
    assert sum(m.linears * (m.full.size + m.shape[0] * m.bias) for m in held) == PUBLISHED[name]


@pytest.mark.parametrize("name", TINY)
def test_every_tensor_that_transformers_writes_is_described_with_its_shape(name, tmp_path):
    tiny(name).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        written = {tensor: tuple(file.get_slice(tensor).get_shape()) for tensor in file.keys()}  # noqa: SIM118
    index, described = open_index(tmp_path), {}
    for module in modules(describe(index.config)):
        for one in [module.expert(e) for e in range(module.experts)] or [module]:
            name, (n, k) = stem(one, index), one.shape
            if one.kind is Kind.PARAMETER:
                described[name] = one.dims
                continue
            described[f"{name}.weight"] = (n,) if one.kind is Kind.NORM else (n, k)
            if one.bias:
                described[f"{name}.bias"] = (n,)
    assert described == written


@pytest.mark.parametrize("name", TINY)
def test_modules_on_one_axis_have_one_length_and_inputs_fit_outputs(name):
    lengths = {}
    for module in modules(describe(made(name))):
        if module.axis:
            dealt = module.shape[1 if module.split is Split.ROW else 0]
            assert dealt % module.unit == 0
            lengths.setdefault(module.axis, set()).add(dealt // module.unit)
        else:
            assert module.split is Split.REPLICATED
    assert all(len(found) == 1 for found in lengths.values()), lengths
    assert lengths["q_heads"] == {6}


@pytest.mark.parametrize("config", [*map(made, TINY), *map(published, PUBLISHED)], ids=[*TINY, *PUBLISHED])
def test_a_spec_survives_json(config):
    spec = describe(config)
    assert DecoderSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_experts_are_one_module_per_layer_and_projection_and_r1_is_described_quickly():
    spec = describe(published("DeepSeek-R1"))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        found = list(modules(spec))
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05
    experts = [module for module in found if module.kind is Kind.EXPERTS]
    assert len(experts) == 58 * 3 and {module.experts for module in experts} == {256}
    assert experts[0].name == "model.layers.3.mlp.experts.*.gate_proj"
    routers = [module.name for module in found if module.role is Role.ROUTER]
    assert routers[:2] == ["model.layers.3.mlp.gate", "model.layers.3.mlp.gate.e_score_correction_bias"]
    assert [module.name for module in found if module.role is Role.HEAD] == ["lm_head"]


def test_routing_is_that_of_each_generation():
    r1, lite = describe(published("DeepSeek-R1")).moe, describe(published("DeepSeek-V2-Lite")).moe
    assert (r1.scoring, r1.groups, r1.top_groups, r1.group_best) == ("sigmoid", 8, 4, 2)
    assert (r1.renormalize, r1.scaling, r1.correction_bias, r1.top_k) == (True, 2.5, True, 8)
    assert (lite.scoring, lite.groups, lite.renormalize, lite.scaling) == ("softmax", 1, False, 1.0)
    assert not lite.correction_bias and lite.shared_intermediate == 2816
    grouped = describe(made("deepseek-v2")).moe
    assert (grouped.groups, grouped.top_groups, grouped.group_best) == (4, 2, 1)
    assert describe(published("Mixtral-8x7B-Instruct-v0.1")).moe.renormalize
    assert not describe(published("Qwen3-30B-A3B", norm_topk_prob=False)).moe.renormalize


@pytest.mark.parametrize("name", ["deepseek-v2", "deepseek-v2-lite", "deepseek-v3"])
def test_latent_attention_is_scaled_as_in_transformers(name):
    expected = tiny(name).model.layers[0].self_attn.scaling
    assert describe(made(name)).attention_scale == pytest.approx(expected, rel=1e-12)


def test_the_cache_holds_a_latent_once_per_rank_or_keys_and_values_per_head():
    r1, qwen = describe(published("DeepSeek-R1")), describe(published("Qwen3-30B-A3B"))
    assert r1.cache_values(kv_heads=16) == r1.cache_values(kv_heads=128) == 512 + 64
    assert qwen.cache_values(kv_heads=2) == 2 * 2 * 128
    assert (r1.rotary_dim, r1.head_dim, qwen.rotary_dim) == (64, 192, 128)


def test_only_the_drafting_layers_that_the_config_counts_may_be_left_out():
    spec = describe(published("DeepSeek-R1"))
    for name in ("eh_proj.weight", "enorm.weight", "shared_head.head.weight", "mlp.experts.7.up_proj.weight"):
        assert "multi-token prediction" in ignorable(f"model.layers.61.{name}", spec)
    for name in ("model.layers.60.enorm.weight", "model.layers.62.enorm.weight", "model.extra.weight"):
        assert ignorable(name, spec) is None
    assert ignorable("model.layers.36.mlp.up_proj.weight", describe(published("Qwen3-8B"))) is None


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("DeepSeek-R1", dict(scoring_func="softmax"), "scoring_func softmax"),
        ("DeepSeek-R1", dict(topk_method="greedy"), "topk_method greedy"),
        ("DeepSeek-V2-Lite", dict(norm_topk_prob=True), "norm_topk_prob"),
        ("Qwen3-30B-A3B", dict(use_sliding_window=True, sliding_window=4096), "use_sliding_window"),
        ("Mixtral-8x7B-Instruct-v0.1", dict(architectures=["MixtrallForCausalLM"]), "MixtrallForCausalLM"),
    ],
)
def test_what_would_change_the_maths_is_refused(name, changes, word):
    with pytest.raises(Refused) as caught:
        describe(published(name, **changes))
    assert caught.value.problems[0].code == "architecture-unsupported" and word in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        (dict(n_group=7), "config-value"),
        (dict(topk_group=9), "config-value"),
        (dict(num_experts_per_tok=200), "config-value"),
        (dict(qk_rope_head_dim=0), "config-value"),
        (dict(kv_lora_rank=None), "config-value"),
    ],
)
def test_counts_that_cannot_be_are_named(changes, code):
    with pytest.raises(InputError) as caught:
        describe(published("DeepSeek-R1", **changes))
    assert caught.value.problems[0].code == code


@pytest.mark.parametrize("key", ["n_routed_experts", "kv_lora_rank", "q_lora_rank", "first_k_dense_replace"])
def test_a_missing_key_is_named(key):
    config = published("DeepSeek-R1")
    del config[key]
    with pytest.raises(InputError, match=f"config-key.*{key}"):
        describe(config)


def test_a_config_without_architectures_is_known_by_its_model_type():
    config = published("Qwen3-30B-A3B")
    del config["architectures"]
    assert describe(config) == describe(published("Qwen3-30B-A3B"))


def test_a_qwen3moe_gguf_renormalizes_whatever_its_keys():
    moe = describe_gguf(open_index(ROOT / "tests" / "golden" / "tiny-qwen3-moe" / "gguf-mxfp4_moe-1l")).moe
    assert (moe.experts, moe.top_k, moe.intermediate, moe.layers) == (8, 2, 128, (True,))
    assert (moe.scoring, moe.renormalize, moe.scaling, moe.groups) == ("softmax", True, 1.0, 1)


def gguf(arch, **changes):
    keys = {
        "block_count": 2, "embedding_length": 64, "feed_forward_length": 96, "attention.head_count": 4,
        "attention.head_count_kv": 2, "expert_count": 4, "expert_used_count": 2,
    } | changes  # fmt: skip
    metadata = {"general.architecture": arch} | {f"{arch}.{key}": value for key, value in keys.items()}
    shapes = {"token_embd.weight": (32, 64), "output.weight": (32, 64)}
    tensors = {name: type("Info", (), {"shape": shape, "name": name}) for name, shape in shapes.items()}
    return Index(Path("model.gguf"), "gguf", tensors, metadata)


def test_a_llama_gguf_with_experts_is_a_mixtral():
    spec = describe_gguf(gguf("llama"))
    assert spec.architecture == "MixtralForCausalLM"
    assert (spec.moe.experts, spec.moe.top_k, spec.moe.intermediate, spec.moe.renormalize) == (4, 2, 96, True)
    assert describe_gguf(gguf("llama", expert_count=0)).architecture == "LlamaForCausalLM"


def test_experts_under_another_architecture_are_refused():
    with pytest.raises(Refused, match="gemma3 GGUF files with 4 experts"):
        describe_gguf(gguf("gemma3"))
