"""What ranks load in these tests instead of a model."""

import os
import time
from types import SimpleNamespace

from framework.errors import Problem, Refused

LOADER = "tests.cluster.stub:load"


def plan(size, device="cpu", **more):
    """What the cluster room reads of a plan, and how the stub is to behave."""
    return SimpleNamespace(size=size, runtime=SimpleNamespace(device=device, threads=1), **more)


def load(plan, group, progress):
    steps = getattr(plan, "load_steps", 2)
    for i in range(steps):
        if getattr(plan, "refuse_rank", None) == group.rank:
            raise Refused(Problem("stub-refused", f"rank {group.rank} will not load"))
        progress(100 * (i + 1) // steps, 100)
        time.sleep(getattr(plan, "load_step_s", 0.0))
    return Model(group)


class Model:
    def __init__(self, group):
        self.group = group
        self.tokenizer = None

    def set_tokenizer(self, tokenizer_json):
        self.tokenizer = tokenizer_json

    def rank_and_tokenizer(self):
        return self.group.rank, self.tokenizer

    def threads(self):
        import torch

        return torch.get_num_threads()

    def sum_of_ranks(self, count):
        import torch

        return self.group.all_reduce(torch.full((count,), float(self.group.rank + 1))).tolist()

    def generate(self, items, step_s=0.0, bug_rank=None, bug_item=None):
        import torch

        for item in items:
            if (bug_rank, bug_item) == (self.group.rank, item):
                raise ZeroDivisionError(f"a bug at {item}")
            total = self.group.all_reduce(torch.tensor([float(item)]))
            time.sleep(step_s)
            yield [float(total)]

    def end(self, rank):
        if rank == self.group.rank:
            os._exit(3)
        time.sleep(60)
