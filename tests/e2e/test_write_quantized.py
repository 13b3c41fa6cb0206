"""job=quantize: what it writes is what online quantization holds, bit for bit, whole or not at all."""

import errno
import json
import os
import resource
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import pytest
import torch

from framework.checkpoint import write
from framework.errors import InputError, Refused
from framework.jobs import quantize, verify
from framework.loading.load import load
from framework.planning.make import make_plan
from framework.recipe.compose import compose
from tests.e2e.literal import read
from tests.e2e.made import GOLDEN, GPTQ8, arrays, gptq8, repacked, rounded, signed_pairs, to_float
from tests.plans import checked_for
from tests.threads import on_ranks

ROOT = Path(__file__).parents[2]
BASE = GOLDEN / "tiny-qwen3" / "base"
RECIPE = ("hardware=a5", "capability.allow=[tbd,wip]", "runtime.dtype=float32", "runtime.context=128",
          "runtime.max_batch=1")  # fmt: skip
# Schemes by patterns, the first that matches.
CASES = {
    "integers": {"*.down_proj": "w8a16", "*.self_attn.*": "w8a8_dynamic", "*_proj": "w4a16"},
    "mx": {"*.self_attn.*": "mxfp8", "*_proj": "mxfp4"},
    "experts of 4 bits": {"*.self_attn.*": "w8a16", "*.experts.*": "w4a16"},
    "experts of 8 bits": {"*.layers.0.*.experts.*": "w8a8_dynamic", "*.layers.1.*.experts.*": "mxfp8"},
}
TYPES = {"w8a8_dynamic": "W8A8_DYNAMIC", "w8a16": "W8A16", "w4a16": "W4A16", "mxfp8": "W8A8_MXFP8",
         "mxfp4": "W4A4_MXFP4"}  # fmt: skip


def asking(rules):
    layers = ", ".join(f'{{pattern: "{pattern}", scheme: {scheme}}}' for pattern, scheme in rules.items())
    return f"quantization.layers=[{layers}]", "quantization.online=true"


def command(source, output, run, *rules):
    return ["recipe=llm/local", f'model.path="{source}"', "job=quantize", f'job.output="{output}"',
            f'run.dir="{run}"', *RECIPE, *rules]  # fmt: skip


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("experts")
    repacked(GPTQ8, gptq8, to_float)(folder)
    return folder


@pytest.fixture(scope="module", params=CASES)
def written(request, tmp_path_factory):
    """A float checkpoint, the rules, and what the job made of it."""
    rules = CASES[request.param]
    source = request.getfixturevalue("experts") if "experts" in request.param else BASE
    folder = tmp_path_factory.mktemp("written")
    assert quantize.run(compose(command(source, folder / "model", folder / "run", *asking(rules)))) == 0
    assert sorted(path.name for path in folder.iterdir()) == ["model", "run"]
    return source, rules, folder / "model"


def scheme_of(name, rules):
    found = (scheme for pattern, scheme in rules.items() if fnmatchcase(name, pattern))
    return next(found, None) if name.endswith("_proj") else None


def scores(path, size, *rules):
    plan = make_plan(checked_for(path, *RECIPE, f"parallel.tp_size={size}", *rules), "cpu")
    with np.load(BASE / "reference.npz") as reference:
        ids = reference["prompt1.input_ids"].tolist()
    return on_ranks(size, lambda group: load(plan, group, lambda done, total: None).score(ids))[0]


def test_its_output_is_judged_by_the_rows_of_modelslim(written):
    _, rules, output = written
    checked = checked_for(output, *RECIPE)
    assert checked.ok, checked.problems
    assert len(checked.ledger.consumed) == len(checked.index.tensors)
    found = {(use.row.partition(".")[0], use.scheme) for use in checked.rows}
    assert found == {("modelslim", scheme) for scheme in rules.values()} | {("none", "float")}


@pytest.mark.parametrize("size", [1, 2])
def test_it_runs_as_the_model_that_is_quantized_at_load_bit_for_bit(written, size, request):
    source, rules, output = written
    assert np.array_equal(scores(output, size), scores(source, size, *asking(rules)))


def test_codes_and_scales_are_those_of_the_formulas(written):
    source, rules, output = written
    floats, _ = read(source)
    tensors, config = read(output)
    types = json.loads((output / "quant_model_description.json").read_text())
    assert "quantization_config" not in config
    for name, weight in floats.items():
        module = name.removesuffix(".weight")
        scheme = scheme_of(module, rules)
        if scheme is None:
            assert torch.equal(tensors.pop(name), weight)
            assert types[name] == "FLOAT"
            continue
        for suffix, right in arrays(rounded(scheme, weight.float().numpy())[1]).items():
            found = tensors.pop(f"{module}.{suffix}")
            if scheme == "w4a16" and suffix == "weight":
                along = 1 if found.shape[1] < right.shape[1] else 0
                found = torch.tensor(np.stack(signed_pairs(found.numpy()), 1 + along).reshape(right.shape))
            assert torch.equal(found.view(torch.uint8), right.view(torch.uint8)), (name, suffix)
            assert types[f"{module}.{suffix}"] == TYPES[scheme]
    assert not tensors


def test_it_verifies_against_its_own_reference(written, tmp_path):
    _, _, output = written
    with np.load(BASE / "reference.npz") as reference:
        ids = reference["prompt1.input_ids"]
    np.savez(tmp_path / "r.npz", **{"prompt0.input_ids": ids, "prompt0.logits": scores(output, 1)})
    given = ["recipe=llm/local", f'model.path="{output}"', "job=verify", f'job.reference="{tmp_path / "r.npz"}"']
    assert verify.run(compose([*given, f'run.dir="{tmp_path / "run"}"', *RECIPE])) == 0


def test_the_tokenizer_comes_along(tmp_path):
    quantize.run(compose(command(BASE, tmp_path / "out", tmp_path / "run", *asking(CASES["mx"]))))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (BASE / name).read_bytes()


def test_an_output_that_is_there_is_refused_and_left_alone(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("kept")
    with pytest.raises(InputError) as caught:
        quantize.run(compose(command(BASE, tmp_path / "out", tmp_path / "run", *asking(CASES["mx"]))))
    assert [problem.code for problem in caught.value.problems] == ["output-exists"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


FAILURES = {
    "at the header": (0, OSError(errno.ENOSPC, "No space left on device"), Refused),
    "among the tensors": (7, OSError(errno.ENOSPC, "No space left on device"), Refused),
    "interrupted": (7, KeyboardInterrupt(), KeyboardInterrupt),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_stopped_at_any_write_it_leaves_nothing(failure, tmp_path, monkeypatch):
    after, error, raised = FAILURES[failure]
    calls = []
    pwrite = os.pwrite

    def failing(descriptor, data, at):
        calls.append(at)
        if len(calls) > after:
            raise error
        return pwrite(descriptor, data, at)

    monkeypatch.setattr(write.os, "pwrite", failing)
    descriptors = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(raised) as caught:
        quantize.run(compose(command(BASE, tmp_path / "out", tmp_path / "run", *asking(CASES["integers"]))))
    if raised is Refused:
        assert [problem.code for problem in caught.value.problems] == ["disk-full"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert len(list(Path("/proc/self/fd").iterdir())) == descriptors


@pytest.mark.slow
def test_the_command_says_that_the_disk_is_full_and_leaves_nothing(tmp_path):
    given = command(BASE, tmp_path / "out", tmp_path / "run", *asking(CASES["mx"]))
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *given], capture_output=True, text=True, cwd=tmp_path, timeout=120,
        check=False, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000)),
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "error[disk-full]" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
