"""Headers of DeepSeek-R1's shapes (671 B parameters), fewer layers of them: counts and verdicts.

benchmarks/check_headers.py measures the whole model.
"""

import json
from pathlib import Path

import pytest

from framework.checkpoint.open import open_index
from framework.checkpoint.write import write_headers
from framework.jobs.common import read_capability
from framework.planning.check import check
from framework.planning.make import make_plan
from framework.recipe.compose import compose

CONFIG = Path(__file__).parents[2] / "recipes" / "assets" / "configs" / "DeepSeek-R1" / "config.json"
DENSE_LAYERS, EXPERTS = 3, 256
WHOLE, LAYERS = 61, 5  # layers of the published model, and of what is written here
HIDDEN, VOCAB = 7168, 129280
# [N, K] of latent attention: 128 heads of 128 + 64, latents of 1536 and 512
ATTENTION = {"q_a_proj": (1536, HIDDEN), "q_b_proj": (24576, 1536), "kv_a_proj_with_mqa": (576, HIDDEN),
             "kv_b_proj": (32768, 512), "o_proj": (HIDDEN, 16384)}  # fmt: skip
NORMS = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN, "self_attn.q_a_layernorm": 1536,
         "self_attn.kv_a_layernorm": 512}  # fmt: skip


def net(width):
    return {"gate_proj": (width, HIDDEN), "up_proj": (width, HIDDEN), "down_proj": (HIDDEN, width)}


def linears(layers):
    """Name and [N, K] of every linear but the head."""
    for layer in range(layers):
        at = f"model.layers.{layer}"
        yield from ((f"{at}.self_attn.{part}", shape) for part, shape in ATTENTION.items())
        if layer < DENSE_LAYERS:
            yield from ((f"{at}.mlp.{part}", shape) for part, shape in net(18432).items())
            continue
        yield f"{at}.mlp.gate", (EXPERTS, HIDDEN)
        yield from ((f"{at}.mlp.shared_experts.{part}", shape) for part, shape in net(2048).items())
        for e in range(EXPERTS):
            yield from ((f"{at}.mlp.experts.{e}.{part}", shape) for part, shape in net(2048).items())


def floats(layers):
    """Name and shape of everything else."""
    yield from (("model.embed_tokens.weight", (VOCAB, HIDDEN)), ("model.norm.weight", (HIDDEN,)))
    yield "lm_head.weight", (VOCAB, HIDDEN)
    for layer in range(layers):
        yield from ((f"model.layers.{layer}.{norm}.weight", (size,)) for norm, size in NORMS.items())
        if layer >= DENSE_LAYERS:
            yield f"model.layers.{layer}.mlp.gate.e_score_correction_bias", (EXPERTS,)


def headers(layers, type_of):
    """Tensors and description of a checkpoint whose linears have the quant types that `type_of` gives by name."""
    tensors, described = [], {}
    for name, (n, k) in linears(layers):
        label = type_of(name)
        made = {
            "FLOAT": [("weight", "BF16", (n, k))],
            "W8A8": [("weight", "I8", (n, k)), ("input_scale", "BF16", (1,)), ("input_offset", "BF16", (1,)),
                     ("quant_bias", "I32", (n,)), ("deq_scale", "F32", (n,))],
            "W8A8_DYNAMIC": [("weight", "I8", (n, k)), ("weight_scale", "F32", (n, 1)),
                             ("weight_offset", "F32", (n, 1))],
            "W8A8_MXFP8": [("weight", "F8_E4M3", (n, k)), ("weight_scale", "U8", (n, k // 32))],
        }[label]  # fmt: skip
        tensors += [(f"{name}.{suffix}", dtype, shape) for suffix, dtype, shape in made]
        described |= {f"{name}.{suffix}": label for suffix, _, _ in made}
    tensors += [(name, "BF16", shape) for name, shape in floats(layers)]
    return tensors, described | {name: "FLOAT" for name, _ in floats(layers)}


def w8a8(name):
    """The published mix: attention by static scales, all else by dynamic ones; kv_b_proj and routers are float."""
    if name.endswith((".kv_b_proj", ".mlp.gate")):
        return "FLOAT"
    return "W8A8" if ".self_attn." in name else "W8A8_DYNAMIC"


def mixed(name):
    """Down projections of experts at MXFP8."""
    return "W8A8_MXFP8" if ".experts." in name and name.endswith("down_proj") else "FLOAT"


@pytest.fixture(scope="module")
def write(tmp_path_factory):
    def run(type_of, change=lambda tensors, described: None):
        tensors, described = headers(LAYERS, type_of)
        change(tensors, described)
        folder = tmp_path_factory.mktemp("model")
        config = json.loads(CONFIG.read_text()) | {"num_hidden_layers": LAYERS}
        config.pop("quantization_config", None)
        documents = {"config.json": config, "quant_model_description.json": described}
        return folder, len(tensors), write_headers(folder, tensors, documents, shard_bytes=1 << 31)

    return run


def checked_at(folder, *overrides):
    recipe = compose(["recipe=llm/local", f"model.path={folder}", "job=check", "parallel.tp_size=16", *overrides])
    return check(recipe, {"": open_index(folder)}, read_capability(recipe))


def test_the_whole_model_has_671_billion_parameters_in_so_many_tensors():
    assert sum(n * k for _, (n, k) in linears(WHOLE)) + 2 * VOCAB * HIDDEN == pytest.approx(671.026e9, rel=1e-5)
    assert len(headers(WHOLE, mixed)[0]) == 61 * 9 + 3 * 3 + 58 * (1 + 1 + 3 + 256 * 4) + 3 == 60_243
    assert len(headers(WHOLE, w8a8)[0]) == 61 * (4 * 5 + 5) + 3 * 9 + 58 * (2 + 3 * 3 + 256 * 9) + 3 == 135_825


def test_experts_whose_down_projections_alone_are_quantized(write):
    folder, count, files = write(mixed)
    assert len(files) > 10
    checked = checked_at(folder, "hardware=a5", "capability.allow=[wip]")
    assert checked.problems == () and checked.ledger.ignored == ()
    assert len(checked.ledger.consumed) == count == 5 * 9 + 3 * 3 + 2 * (5 + 256 * 4) + 3
    assert {use.row: (use.modules, use.status) for use in checked.rows} == {
        "none.float.linear": (5 * 5 + 3 * 3 + 2 * 4 + 1, "supported"),
        "none.float.moe": (2 * 2 * 256, "supported"),
        "modelslim.mxfp8.moe": (2 * 256, "wip"),
    }
    down = next(p for p in checked.placed if p.assigned.name == "model.layers.3.mlp.experts.*.down_proj")
    # 32 pairs of blocks of 32 over 16 ranks
    assert [(r.k0, r.k1) for r in down.shards] == [(128 * rank, 128 * rank + 128) for rank in range(16)]


def test_the_published_mix_of_w8a8(write):
    folder, count, _ = write(w8a8)
    checked = checked_at(folder, "hardware=a3")
    assert checked.problems == ()
    assert len(checked.ledger.consumed) == count == 5 * 25 + 3 * 9 + 2 * (11 + 256 * 9) + 3
    assert {use.row: use.modules for use in checked.rows} == {
        "modelslim.w8a8_static.linear": 5 * 4,
        "none.float.linear": 5 + 2 + 1,
        "modelslim.w8a8_dynamic.linear": 3 * 3 + 2 * 3,
        "modelslim.w8a8_dynamic.moe": 2 * 256 * 3,
    }
    plan = make_plan(checked, "npu")
    assert len(plan.modules) == 5 * 9 + 3 * 3 + 2 * (2 + 3 + 3) + 3  # experts of a projection are one entry
    assert sum(len(plan.modules[i].shards) for i in range(len(plan.modules))) == 16 * len(plan.modules)


def test_one_odd_tensor_among_thousands_is_found(write):
    def change(tensors, described):
        at = next(i for i, entry in enumerate(tensors) if entry[0].endswith("4.mlp.experts.200.up_proj.weight_offset"))
        del tensors[at]
        described |= {name: "W8A16" for name in described if ".3.mlp.experts.77.down_proj." in name}

    folder, _, _ = write(w8a8, change)
    found = {problem.code: str(problem) for problem in checked_at(folder, "hardware=a3").problems}
    assert set(found) == {"tensor-missing", "experts-differ"}
    assert "model.layers.4.mlp.experts.200.up_proj.weight_offset" in found["tensor-missing"]
    assert "model.layers.3.mlp.experts.*.down_proj" in found["experts-differ"] and "77" in found["experts-differ"]
