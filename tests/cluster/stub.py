"""What ranks load in these tests instead of a model."""

import os
import time
from types import SimpleNamespace

import numpy as np

from framework.errors import Problem, Refused

LOADER = "tests.cluster.stub:load"


def plan(tp_size, device="cpu", **more):
    return SimpleNamespace(tp_size=tp_size, runtime=SimpleNamespace(device=device, threads=1), **more)


def load(plan, group, progress):
    steps = getattr(plan, "load_steps", 2)
    for i in range(steps):
        if getattr(plan, "refuse_rank", None) == group.rank:
            raise Refused(Problem("stub-refused", f"rank {group.rank} will not load"))
        progress(50 * (i + 1) // steps, 100)
        time.sleep(getattr(plan, "load_step_s", 0.0))
    return Model(group)


class Model:
    def __init__(self, group):
        self.group = group

    def bytes_held(self):
        return 1000 + self.group.rank

    def pid(self):
        return os.getpid()

    def sum_of_ranks(self, count):
        import torch

        return self.group.all_reduce(torch.full((count,), float(self.group.rank + 1))).numpy()

    def big(self, count):
        return np.zeros(count, np.float32)

    def generate(self, items, step_s=0.0, bug_rank=None):
        import torch

        for item in items:
            if bug_rank == self.group.rank and item == items[1]:
                raise ZeroDivisionError("a bug")
            total = self.group.all_reduce(torch.tensor([float(item)]))
            time.sleep(step_s)
            yield [float(total)]
