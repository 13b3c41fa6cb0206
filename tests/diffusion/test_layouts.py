"""Every class of transformer over ranks, float and quantized, against the plain diffusers model."""

import itertools

import pytest
import torch

from framework.checkpoint.reader import Reader
from framework.diffusion.sequence import deal_tokens
from framework.diffusion.transformer import build_transformer
from framework.families.diffusion import CLASSES
from framework.families.tokens import TOKENS
from framework.formats.registry import decoder
from framework.jobs.common import read_capability
from framework.planning.check import check
from framework.planning.make import make_plan
from framework.planning.parts import open_indexes
from framework.planning.runnable import require_runnable
from framework.recipe.compose import compose
from tests.diffusion.made import CONFIGS, folder_of, inputs_of
from tests.threads import on_ranks


def outputs(path, call, *overrides):
    """What every rank of the plan's layout returns for a call."""
    given = [f'model.path="{path}"', "model.kind=diffusion", "job=plan", "runtime.dtype=float32", *overrides]
    recipe = compose(["recipe=llm/local", "capability.allow=[tbd]", *given])
    checked = check(recipe, open_indexes(path, "diffusion"), read_capability(recipe))
    require_runnable(checked)
    plan = make_plan(checked, "cpu")
    part = checked.model.parts[0]

    def work(group):
        tp, ulysses = (group.split(plan.layout.groups(axis)) for axis in ("tp", "ulysses"))
        with torch.inference_mode(), Reader() as reader:
            model = build_transformer(
                plan, part.prefix, part.index, reader, decoder(part.format), tp, torch.device("cpu"),
                lambda done, total: None,
            )  # fmt: skip
            if ulysses.size > 1:
                deal_tokens(model, TOKENS[plan.transformers[part.prefix].class_name], ulysses)
            return [model(**call, return_dict=False)[0] for _ in range(2)]

    return on_ranks(plan.size, work)


def expected(model, call):
    with torch.inference_mode():
        return model(**call, return_dict=False)[0]


@pytest.mark.parametrize("tp_size", [1, 2, 3, 4])
@pytest.mark.parametrize("class_name", CONFIGS)
def test_tensor_parallel_transformers_equal_diffusers(tmp_path, class_name, tp_size):
    call = inputs_of(class_name)
    wanted = expected(folder_of(tmp_path, class_name), call)
    close(outputs(tmp_path, call, f"parallel.tp_size={tp_size}"), wanted)


@pytest.mark.parametrize(("tp_size", "ulysses_size"), [(1, 2), (2, 2), (1, 4)])
@pytest.mark.parametrize("class_name", CONFIGS)
def test_transformers_over_dealt_tokens_equal_diffusers(tmp_path, class_name, tp_size, ulysses_size):
    call = inputs_of(class_name)
    wanted = expected(folder_of(tmp_path, class_name), call)
    close(outputs(tmp_path, call, f"parallel.tp_size={tp_size}", f"parallel.ulysses_size={ulysses_size}"), wanted)


def close(got, wanted):
    """Every rank, each of its calls."""
    for one in itertools.chain(*got):
        assert (one - wanted).abs().max() <= 1e-5 * wanted.abs().max()


def test_timesteps_of_tokens_are_dealt_with_them(tmp_path):
    call = inputs_of("WanTransformer3DModel")
    call["timestep"] = torch.linspace(0, 900, 2 * 3 * 3 * 5).view(2, -1)
    wanted = expected(folder_of(tmp_path, "WanTransformer3DModel"), call)
    close(outputs(tmp_path, call, "parallel.ulysses_size=2"), wanted)


def test_the_tokens_of_every_class_can_be_dealt():
    assert set(TOKENS) == set(CLASSES)


def test_the_packed_output_of_flux_is_quantized_as_on_one_rank(tmp_path):
    folder_of(tmp_path, "FluxTransformer2DModel")
    rule = '{pattern: "*.single_*.proj_out", scheme: w8a8_dynamic}'
    online = ["quantization.online=true", f"quantization.layers=[{rule}]"]
    call = inputs_of("FluxTransformer2DModel")
    whole = outputs(tmp_path, call, *online)[0][0]
    cut = outputs(tmp_path, call, "parallel.tp_size=2", *online)[0][0]
    # rows are dealt and inputs gathered: the same codes and scales, but where rounding flips one
    assert (cut - whole).norm() <= 1e-3 * whole.norm()
