"""Models of one or two small layers with random weights, whose linears a test replaces by what a format holds."""

from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import torch

from framework.checkpoint.open import open_index
from framework.checkpoint.reader import Reader
from framework.formats.registry import decoder
from framework.jobs.common import read_capability
from framework.layers.group import Alone
from framework.loading.load import load
from framework.loading.weights import RankWeights
from framework.ops.register import ensure_registered
from framework.planning.check import check as check_recipe
from framework.planning.make import make_plan
from framework.recipe.compose import compose
from tests.e2e.literal import forward
from tests.e2e.made import arrays, write
from tests.threads import on_ranks

IDS = [3, 17, 60, 5, 41, 9, 77, 30, 12, 55]
GIVEN = ("recipe=llm/local", 'model.path="model"', "job=verify", "hardware=a5", "runtime.context=256",
         "runtime.max_batch=1")  # fmt: skip
ALLOWED = "capability.allow=[tbd,wip]"
EXPERTS = "model.layers.0.mlp.experts"


def config_of(*, layers=1, hidden=64, width=128, experts=0, heads=4, kv_heads=2, head_dim=16):
    """A config.json; `width`: the features between the matrices of an MLP, of one expert if there are any."""
    made = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": hidden, "vocab_size": 96,
        "intermediate_size": width, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "head_dim": head_dim, "num_hidden_layers": layers, "max_position_embeddings": 512, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "hidden_act": "silu",
    }  # fmt: skip
    if experts:
        made |= {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": experts,
            "num_experts_per_tok": 2, "moe_intermediate_size": width, "norm_topk_prob": True,
            "decoder_sparse_step": 1, "mlp_only_layers": [],
        }  # fmt: skip
    return made


def float_model(config, seed=0):
    """Float tensors by name, of values that bf16 and fp16 hold, of every weight in a config of `config_of`."""
    rng = np.random.default_rng(seed)
    hidden, width, count = (config[k] for k in ("hidden_size", "intermediate_size", "vocab_size"))
    heads, kv, dim = (config[k] for k in ("num_attention_heads", "num_key_value_heads", "head_dim"))
    experts = config.get("num_experts", 0)

    def values(*shape):
        return torch.tensor(np.round(rng.standard_normal(shape) * 16) / 128, dtype=torch.float32)

    mlps = [f"mlp.experts.{e}" for e in range(experts)] or ["mlp"]
    shapes = {"self_attn.q_proj": (heads * dim, hidden), "self_attn.k_proj": (kv * dim, hidden),
              "self_attn.v_proj": (kv * dim, hidden), "self_attn.o_proj": (hidden, heads * dim)}  # fmt: skip
    for mlp in mlps:
        shapes |= {f"{mlp}.gate_proj": (width, hidden), f"{mlp}.up_proj": (width, hidden)}
        shapes[f"{mlp}.down_proj"] = (hidden, width)
    if experts:
        shapes["mlp.gate"] = (experts, hidden)
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden, "self_attn.q_norm": dim,
             "self_attn.k_norm": dim}  # fmt: skip
    made = {"model.embed_tokens": 8 * values(count, hidden), "lm_head": values(count, hidden),
            "model.norm": 1 + values(hidden)}  # fmt: skip
    for i in range(config["num_hidden_layers"]):
        made |= {f"model.layers.{i}.{name}": values(*shape) for name, shape in shapes.items()}
        made |= {f"model.layers.{i}.{name}": 1 + values(size) for name, size in norms.items()}
    return {f"{name}.weight": value for name, value in made.items()}


def experts_of(projection, count, layer=0):
    """Names of one projection of all experts of a layer."""
    return [f"model.layers.{layer}.mlp.experts.{e}.{projection}" for e in range(count)]


def save(folder, config, held, *, quantization=None, labels=None, seed=0):
    """Write a checkpoint whose linears in `held` have those tensors instead; return all float tensors."""
    tensors = float_model(config, seed)
    kept = {name: value for name, value in tensors.items() if name.removesuffix(".weight") not in held}
    for name, found in held.items():
        kept |= {f"{name}.{suffix}": value for suffix, value in arrays(found).items()}
    folder.mkdir(exist_ok=True)
    write(folder, kept, config, quantization, labels)
    return tensors


def logits(path, *overrides, tp_size=1, dtype="float32", ids=IDS):
    """Logits [T, vocab] of token ids, on ranks that are threads."""
    plan = plan_of(path, *overrides, tp_size=tp_size, dtype=dtype)
    return on_ranks(tp_size, lambda group: load(plan, group, lambda done, total: None).score(ids))[0]


def literal(tensors, config, linears):
    """The same from the literal forward pass; `linears`: by name a function, or values [N, K]."""
    made = {name: given if callable(given) else times(given) for name, given in linears.items()}
    return forward(tensors, config, made, IDS)


def times(values):
    """x W^T in double."""
    held = torch.tensor(np.asarray(values, dtype=np.float64))
    return lambda x: (x.double() @ held.T).float()


@contextmanager
def weights_of(plan, group=None):
    """A rank's weights."""
    ensure_registered("cpu")
    index = replace(open_index(Path(plan.checkpoint)), options=plan.options)
    with Reader() as reader, torch.inference_mode():
        cpu = torch.device("cpu")
        yield RankWeights(plan, index, reader, decoder(plan.format), group or Alone(), cpu, lambda done, total: None)


def dequantized(plan, name, rank=0, expert=None):
    """A module's rectangle on a rank as its format decodes it for its scheme: values in float64."""
    planned = next(m for m in plan.modules if m.name == name)
    module = planned.module if expert is None else planned.module.expert(expert)
    with weights_of(plan) as weights:
        read = weights.decoder.decode(module, planned.shards[rank], planned.scheme, weights.index, weights.reader,
                                      dtype=torch.float32)  # fmt: skip
        return read.dequantize().double().numpy()


def near(ours, right, part=1e-5):
    """Whether two arrays differ by summation order alone."""
    ours, right = np.asarray(ours, dtype=np.float64), np.asarray(right, dtype=np.float64)
    return np.isfinite(ours).all() and np.abs(ours - right).max() <= part * np.ptp(right)


def close(ours, right, part):
    """Whether the difference is at most a part of the whole: a rounded activation may go the other way."""
    return np.linalg.norm(ours - right) <= part * np.linalg.norm(right)


def codes_of(problems):
    return {problem.code for problem in problems}


@cache
def _composed(overrides):
    """A recipe and what judges it: composed once, a checkpoint's path and the sizes are put in."""
    recipe = compose([*GIVEN, *overrides])
    return recipe, read_capability(recipe)


def check(path, *overrides, tp_size=1, dtype="float32"):
    """The check of a checkpoint."""
    recipe, capability = _composed(overrides)
    recipe = replace(
        recipe,
        model=replace(recipe.model, path=str(path)),
        parallel=replace(recipe.parallel, tp_size=tp_size),
        runtime=replace(recipe.runtime, dtype=dtype),
    )
    return check_recipe(recipe, {"": open_index(Path(path))}, capability)


def plan_of(path, *overrides, tp_size=1, dtype="float32"):
    """The plan of a checkpoint, rows of every status allowed."""
    return make_plan(check(path, ALLOWED, *overrides, tp_size=tp_size, dtype=dtype), "cpu")
