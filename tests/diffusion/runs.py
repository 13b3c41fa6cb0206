"""Transformers of a pipeline folder, planned and run on threads."""

import torch

from framework.checkpoint.reader import Reader
from framework.diffusion.transformer import build_transformer
from framework.formats.registry import decoder
from framework.jobs.common import read_capability
from framework.planning.check import check
from framework.planning.make import make_plan
from framework.planning.parts import open_indexes
from framework.planning.runnable import require_runnable
from framework.recipe.compose import compose
from tests.threads import on_ranks


def checked_for(path, *overrides):
    """The check of a pipeline for fp32 on A5, whatever its rows say there."""
    given = [f'model.path="{path}"', "model.kind=diffusion", "job=plan", "runtime.dtype=float32", "hardware=a5"]
    recipe = compose(["recipe=llm/local", "capability.allow=[tbd]", *given, *overrides])
    return check(recipe, open_indexes(path, "diffusion"), read_capability(recipe))


def outputs(path, call_of, *overrides):
    """Outputs of every transformer, by its name, on rank 0, for the call that `call_of` returns for the name."""
    checked = checked_for(path, *overrides)
    require_runnable(checked)
    plan = make_plan(checked, "cpu")
    found = {}
    for part in checked.model.parts:
        name = part.prefix.rstrip(".")

        def work(group, part=part, name=name):
            with torch.inference_mode(), Reader() as reader:
                model = build_transformer(
                    plan, part.prefix, part.index, reader, decoder(part.format), group, torch.device("cpu"),
                    lambda done, total: None,
                )  # fmt: skip
                return model(**call_of(name), return_dict=False)[0]

        found[name] = on_ranks(plan.size, work)[0]
    return found
