"""A classifier that has seen real digits only reads those that are drawn: float, quantized, whole and cut."""

from functools import cache

import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.svm import SVC

from framework.jobs.common import open_checked
from framework.jobs.drawing import LOADER
from framework.planning.make import make_plan
from framework.recipe.compose import compose

LABELS = [label for label in range(10) for _ in range(10)]
PARTS = ("*.attn1.*", "*.ff.*")


def online(scheme):
    rules = ", ".join(f'{{pattern: "{part}", scheme: {scheme}}}' for part in PARTS)
    return ("quantization.online=true", f"quantization.layers=[{rules}]", "capability.allow=[tbd]", "hardware=a5")


SCHEMES = {"float": (), "w8a8_dynamic": online("w8a8_dynamic"), "mxfp8": online("mxfp8")}


@cache
def reader():
    """A support vector machine; what it was not trained on it reads, too."""
    digits = load_digits()
    known, held_out, labels, wanted = train_test_split(digits.data, digits.target, random_state=0)
    made = SVC(gamma=0.001, C=10).fit(known, labels)
    assert made.score(held_out, wanted) >= 0.98
    return made


def as_real(frames):
    """uint8 [n, 32, 32, 3] to the data set's 8 x 8 values of 0 to 16."""
    return frames.astype(float).mean(-1).reshape(-1, 8, 4, 8, 4).mean((2, 4)).reshape(-1, 64) * 16 / 255


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_drawn_digits_are_read(warm_session, scheme, tp_size):
    recipe = compose(["recipe=diffusion/digits", f"parallel.tp_size={tp_size}", "runtime.threads=1", *SCHEMES[scheme]])
    plan = make_plan(open_checked(recipe), "cpu")
    quantized = sum(module.scheme == scheme for module in plan.modules if module.scheme != "float")
    assert quantized == (0 if scheme == "float" else 18)
    warm_session.load(plan, loader=LOADER)
    options = recipe.job.options
    settings = {
        "class_labels": LABELS, "guidance_scale": options["guidance"], "num_inference_steps": options["steps"]
    }  # fmt: skip
    frames = list(warm_session.stream("render", [(settings, 0)]))[-1]["frames"]
    read = reader().predict(as_real(frames))
    assert np.mean(read == LABELS) >= 0.9
