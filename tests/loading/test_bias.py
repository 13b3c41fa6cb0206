"""The bias of a head that is dealt by rows of the vocabulary."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import torch

from framework.checkpoint.open import open_index
from framework.checkpoint.reader import Reader
from framework.formats.registry import decoder
from framework.loading.weights import RankWeights
from tests.plans import plan_for
from tests.threads import on_ranks

BASE = Path(__file__).parents[1] / "golden" / "tiny-qwen3" / "base"


def test_every_rank_adds_its_own_part_of_a_heads_bias():
    plan = plan_for(BASE, tp_size=2, dtype="float32")
    modules = tuple(
        replace(planned, module=planned.module._replace(bias=True)) if planned.module.name == "lm_head" else planned
        for planned in plan.modules
    )
    plan, plain = replace(plan, modules=modules), decoder("none")

    def bias(module, rect, index, reader):
        return torch.arange(rect.n0, rect.n1, dtype=torch.float32)

    def work(group):
        with Reader() as reader:
            decode = SimpleNamespace(decode=plain.decode, bias=bias)
            weights = RankWeights(
                plan, open_index(BASE), reader, decode, group, torch.device("cpu"), lambda *done: None
            )
            return weights.linear("lm_head")(torch.zeros(1, 256))

    torch.testing.assert_close(torch.cat(on_ranks(2, work), dim=1), torch.arange(512.0).view(1, 512))
