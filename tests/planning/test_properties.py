"""Rules decide by the first match, plans survive JSON, shards tile every weight, sizes that are named work."""

import json
import re
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from framework.checkpoint.index import Index, TensorInfo
from framework.checkpoint.safetensors import DTYPE_BYTES
from framework.families.diffusion import describe_transformer, diffusion_modules
from framework.formats.registry import LAYOUTS
from framework.geometry import Split
from framework.jobs.common import read_capability
from framework.planning.assign import Rule, assign
from framework.planning.check import check
from framework.planning.make import make_plan
from framework.planning.parts import describe_model
from framework.planning.plan import Plan
from framework.recipe.compose import compose
from framework.recipe.schema import LayerRule
from tests.checkpoints import DENSE, GOLDEN, MOE, stand_in

SETTINGS = settings(max_examples=40, deadline=None)
MLA = MOE | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_attention_heads": 8,
    "num_key_value_heads": 8, "q_lora_rank": 64, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
    "v_head_dim": 32, "n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2,
    "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid", "routed_scaling_factor": 2.5,
    "moe_layer_freq": 1, "rope_theta": 10000,
}  # fmt: skip
WAN_FOLDER = GOLDEN / "diffusion" / "tiny-wan2.2"
WAN = json.loads((WAN_FOLDER / "transformer" / "config.json").read_text())
FAMILIES = {"dense": DENSE, "moe": MOE, "mla": MLA, "wan": WAN}


@cache
def composed(tier, kind):
    given = [f"hardware={tier}", f"model.kind={kind}", "capability.allow=[tbd,wip]", "job=plan"]
    return compose(["recipe=llm/local", "model.path=/model", *given])


@cache
def capability():
    return read_capability(composed("a2", "llm"))


def index_of(tensors, config, documents, root=Path("m")):
    infos = {
        name: TensorInfo(name, Path("m"), 0, int(np.prod(shape)) * DTYPE_BYTES[dtype], dtype, shape)
        for name, (dtype, shape) in tensors.items()
    }
    return Index(root, "safetensors", infos, config=config, documents=documents)


@dataclass(frozen=True)
class Drawn:
    """A model in few words: they are what a failure shows."""

    format: str
    scheme: str
    tier: str
    family: str
    changes: dict
    options: dict

    @cached_property
    def indexes(self):
        config = FAMILIES[self.family] | self.changes
        if self.family == "wan":
            return pipeline(self.scheme, config)
        made = stand_in(self.format, self.scheme, config, **self.options)
        return {"": index_of(made.tensors, made.config, made.documents)}


def pipeline(scheme, config):
    rules = [{"pattern": "blocks.*", "scheme": scheme}]
    described = tuple(diffusion_modules(describe_transformer(config)))
    made = LAYOUTS["modelslim"].stand_in(described, "float", {"layers": rules})
    tensors = {name: (dtype, shape) for name, dtype, shape in made.tensors}
    names = ("transformer", "transformer_2")
    return {f"{name}.": index_of(tensors, config, made.documents, WAN_FOLDER / name) for name in names}


def checked_at(model, tp_size, ep_size=1):
    recipe = composed(model.tier, "diffusion" if model.family == "wan" else "llm")
    parallel = replace(recipe.parallel, tp_size=tp_size, ep_size=ep_size)
    return check(replace(recipe, parallel=parallel), model.indexes, capability())


# format, scheme, tier, options: scales a row, groups, blocks of 32 and of 512, two rows or columns a byte, zero points
HELD = [
    ("none", "float", "a2", {}),
    ("modelslim", "w8a8_dynamic", "a2", {}),
    ("modelslim", "w8a8_static", "a2", {}),
    ("modelslim", "w4a4_dynamic", "a2", {}),
    ("modelslim", "w4a8_dynamic", "a2", {}),
    ("modelslim", "w4a16", "a2", {"group_size": 64}),
    ("modelslim", "mxfp8", "a5", {}),
    ("modelslim", "mxfp4", "a5", {}),
    ("awq", "w4a16", "a2", {"group_size": 64}),
    ("gptq", "w4a16", "a2", {"group_size": 32}),
    ("gptq", "w8a16", "a2", {"group_size": 128}),
    ("auto_round", "w4a16", "a2", {"group_size": 128}),
    ("compressed_tensors", "w4a16", "a2", {"group_size": 64, "symmetric": False}),
    ("compressed_tensors", "w8a8_dynamic", "a2", {}),
]


@st.composite
def decoders(draw):
    """A small language model in one of the formats, and the tier that has its rows."""
    format_name, scheme, tier, options = draw(st.sampled_from(HELD))
    family = draw(st.sampled_from(("dense", "moe", "mla")))
    changes = {
        "hidden_size": 128 * draw(st.integers(2, 3)), "intermediate_size": 64 * draw(st.integers(2, 10)),
        "moe_intermediate_size": 64 * draw(st.integers(1, 6)), "vocab_size": draw(st.integers(200, 600)),
        "tie_word_embeddings": draw(st.booleans()),
    }  # fmt: skip
    if family != "mla":
        kv_heads = draw(st.sampled_from((1, 2, 3, 4, 8)))
        changes |= {"num_key_value_heads": kv_heads, "num_attention_heads": kv_heads * draw(st.integers(1, 4))}
        whole = changes["num_attention_heads"] * 32 % options.get("group_size", 1) == 0
        changes["head_dim"] = 32 if whole else 128
    return Drawn(format_name, scheme, tier, family, changes, options)


@st.composite
def pipelines(draw):
    scheme, tier = draw(st.sampled_from((("w8a8_dynamic", "a2"), ("w4a4_dynamic", "a2"), ("mxfp8", "a5"),
                                         ("mxfp4_dualscale", "a5"), ("mxfp4", "a5"))))  # fmt: skip
    heads, ffn = draw(st.integers(2, 8)), draw(st.sampled_from((256, 512, 640, 1024)))
    changes = {"num_attention_heads": heads, "attention_head_dim": 64, "ffn_dim": ffn}
    return Drawn("modelslim", scheme, tier, "wan", changes, {})


def tiles(planned):
    """How often each element of a weight is held: of experts, by the ranks that hold each."""
    module = planned.module
    holders = [[r for r in range(len(planned.shards)) if e in planned.experts_on(r)] for e in range(module.linears)]
    if not module.experts:
        holders = [list(range(len(planned.shards)))]
    for ranks in {tuple(ranks) for ranks in holders}:
        count = np.zeros(module.shape, dtype=np.int32)
        shards = [planned.shards[rank] for rank in ranks]
        if module.axis == "kv_heads":
            shards = list(dict.fromkeys(shards))  # more ranks than KV heads: they hold copies
        for rect in shards:
            assert rect.n0 < rect.n1 and rect.k0 < rect.k1
            count[rect.n0 : rect.n1, rect.k0 : rect.k1] += 1
        yield count, len(shards)


def holds(plan):
    for planned in plan.modules:
        for count, ranks in tiles(planned):
            assert (count == (ranks if planned.split is Split.REPLICATED else 1)).all(), planned.name


@SETTINGS
@given(model=decoders(), tp_size=st.integers(1, 8), ep_size=st.sampled_from((1, 1, 2, 4)))
@example(Drawn("modelslim", "mxfp8", "a5", "moe", {"moe_intermediate_size": 192}, {}), 3, 1)
@example(Drawn("gptq", "w4a16", "a2", "moe", {}, {"group_size": 128}), 4, 2)
@example(Drawn("modelslim", "w4a4_dynamic", "a2", "mla", {}, {}), 8, 4)
def test_shards_tile_every_weight_once_and_the_plan_survives_json(model, tp_size, ep_size):
    checked = checked_at(model, tp_size, ep_size)
    assume(checked.ok)
    plan = make_plan(checked, "npu")
    holds(plan)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    groups = tp_size // ep_size
    for planned in plan.modules:
        if planned.module.experts and ep_size > 1:
            held = [planned.experts_on(rank) for rank in range(tp_size)]
            assert [e for held_by in held[::groups] for e in held_by] == list(range(planned.module.experts))


@settings(SETTINGS, max_examples=20)
@given(model=pipelines(), tp_size=st.integers(1, 6))
def test_shards_tile_every_weight_of_a_pipeline(model, tp_size):
    checked = checked_at(model, tp_size)
    assume(checked.ok)
    plan = make_plan(checked, "npu")
    holds(plan)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert {name.split(".")[0] for name in (planned.name for planned in plan.modules)} == {
        "transformer",
        "transformer_2",
    }


def sizes_named(problem):
    """The sizes that a refusal offers, the largest first; none where there is none."""
    if problem.fix.startswith("no size splits this model"):
        return []
    first = int(re.match(r"parallel\.tp_size=(\d+)   \(", problem.fix)[1])
    if bounds := re.search(r"any size from 1 to (\d+)", problem.fix):
        return [first, *range(1, int(bounds[1]) + 1)]
    return [first, *map(int, re.search(r"sizes that split: ([\d, ]+)", problem.fix)[1].split(", "))]


SIZES = ("tp-heads", "tp-size", "tp-align")


@SETTINGS
@given(model=st.one_of(decoders(), pipelines()), tp_size=st.integers(2, 80), ep_size=st.sampled_from((1, 1, 2)))
@example(Drawn("gptq", "w4a16", "a2", "moe", {"moe_intermediate_size": 256}, {"group_size": 128}), 8, 2)
@example(Drawn("modelslim", "w8a8_dynamic", "a2", "dense", {"intermediate_size": 4}, {}), 9, 1)
def test_a_refused_size_names_the_sizes_that_work(model, tp_size, ep_size):
    ep_size = ep_size if model.family in ("moe", "mla") and tp_size % ep_size == 0 else 1
    problems = [p for p in checked_at(model, tp_size, ep_size).problems if p.code in SIZES]
    assume(problems)
    named = sizes_named(problems[0])
    assert tp_size not in named and named[:1] == sorted(named)[-1:]
    for size in range(ep_size, min(named[0] if named else tp_size, 12) + 1, ep_size):
        found = [p.code for p in checked_at(model, size, ep_size).problems if p.code in SIZES]
        assert bool(found) == (size not in named), (size, found)


PATTERNS = (
    "*", "lm_head", "*.mlp.*", "*.self_attn.*", "*_proj", "model.layers.0.*", "model.layers.1.*", "*.experts.*",
    "*.experts.*.down_proj", "*.mlp.gate", "model.layers.?.self_attn.[qk]_proj", "model.layers.1.self_attn.o_proj",
    r"re:.*layers\.0\..*", r"re:.*\.experts\.\d+\.(gate|up)_proj", "re:.*self_attn.*",
)  # fmt: skip
# what W8A8_DYNAMIC serves
SCHEMES = ("auto", "float", "w8a8_dynamic", "w8a16")
(PART,) = describe_model(Drawn("modelslim", "w8a8_dynamic", "a2", "moe", {}, {}).indexes, "auto").parts
rules_drawn = st.lists(st.tuples(st.sampled_from(PATTERNS), st.sampled_from(SCHEMES)), min_size=1, max_size=5)


def matches(pattern, name):
    return bool(re.fullmatch(pattern[3:], name)) if pattern.startswith("re:") else fnmatchcase(name, pattern)


def names_of(module):
    return module.names() if module.experts else [module.name]


def decided(rules):
    """Scheme by module, as the file and the first matching rule say."""
    found = {}
    for module in PART.modules:
        if module.quantizable:
            own = "float" if module.role else "w8a8_dynamic"
            scheme = next((s for p, s in rules if all(matches(p, name) for name in names_of(module))), "auto")
            found[module.name] = own if scheme == "auto" or own == "float" else scheme
    return found


def assigned(rules):
    made, problems = assign([PART], [Rule(p, s, f"line {i}") for i, (p, s) in enumerate(rules)])
    return {one.name: one.scheme for one in made if one.module.quantizable}, problems


@SETTINGS
@given(rules=rules_drawn)
def test_the_first_matching_rule_decides(rules):
    found, problems = assigned(rules)
    assert found == decided(rules)
    every = [name for module in PART.modules for name in names_of(module)]
    alive, taken = [], set()
    for pattern, _ in rules:
        hit = {name for name in every if matches(pattern, name)}
        alive.append("used" if hit - taken else "pattern-shadowed" if hit else "pattern-unmatched")
        taken |= hit
    idle = {f"line {i}": code for i, code in enumerate(alive) if code != "used"}
    assert {p.where: p.code for p in problems if p.code.startswith("pattern-")} == idle
    asked = {s for p, s in rules if s in ("w8a8_dynamic", "w8a16")}
    assert {p.code for p in problems} - {"pattern-shadowed", "pattern-unmatched"} <= (
        {"scheme-mismatch"} if asked else set()
    )


@SETTINGS
@given(rules=rules_drawn, data=st.data())
def test_the_order_of_rules_matters_only_where_they_overlap(rules, data):
    at = data.draw(st.integers(0, len(rules) - 1))
    swapped = [*rules[:at], *rules[at : at + 2][::-1], *rules[at + 2 :]]
    before, after = assigned(rules)[0], assigned(swapped)[0]
    changed = {name for name, scheme in before.items() if after[name] != scheme}
    pair = [pattern for pattern, _ in rules[at : at + 2]]
    for module in PART.modules:
        if module.name in changed:
            assert all(matches(pattern, name) for pattern in pair for name in names_of(module))
            assert not any(matches(p, name) for p, _ in rules[:at] for name in names_of(module))
    schemes = [scheme for _, scheme in rules[at : at + 2]]
    if len(set(schemes)) == 1:
        assert not changed


@SETTINGS
@given(rules=rules_drawn)
def test_a_recipe_is_judged_by_the_same_rules(rules):
    recipe = composed("a2", "llm")
    layers = tuple(LayerRule(pattern, scheme) for pattern, scheme in rules)
    quantization = replace(recipe.quantization, layers=layers)
    checked = check(replace(recipe, quantization=quantization), {"": PART.index}, capability())
    expected = decided(rules)
    assert {p.assigned.name: p.assigned.scheme for p in checked.placed if p.assigned.module.quantizable} == expected
    held = {module.name: module.linears for module in PART.modules}
    assert sum(use.modules for use in checked.rows) == sum(held[name] for name in expected)
    for use in checked.rows:
        assert use.scheme in expected.values()
