"""Wrong input ends in one message in the house's form and the contract's exit status, never in a traceback."""

import json
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden" / "tiny-qwen3"
GGUF = GOLDEN / "gguf-q4_k_m" / "model.gguf"


def launch(tmp_path, *given):
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch.py"), *given, f"run.dir={tmp_path / 'run'}"],
        capture_output=True, text=True, cwd=tmp_path, timeout=120, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


def base(tmp_path, change=None, config=None):
    """A copy of the float checkpoint; `change` edits its tensors, `config` its config.json."""
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / "base", folder)
    if change:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors")
    if config:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def drop(name):
    return lambda tensors: tensors.pop(name)


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def add(tensors):
    tensors["model.layers.0.mlp.shared.weight"] = next(iter(tensors.values())).clone()


def shrink(tensors):
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:7].clone()


def gguf_with(tmp_path, edit):
    raw = bytearray(GGUF.read_bytes())
    edit(raw)
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    return path


def unknown_type(raw):
    """Give blk.0.attn_q.weight a type number that nobody knows."""
    name = b"blk.0.attn_q.weight"
    at = raw.index(struct.pack("<Q", len(name)) + name) + 8 + len(name)
    (dims,) = struct.unpack_from("<I", raw, at)
    struct.pack_into("<I", raw, at + 4 + 8 * dims, 99)


def jsonl(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('\n{"prompt": "fine"}\n{"messages": []}\n')
    return path


def truncate(raw):
    del raw[len(raw) // 2 :]


CHECK = "job=check"
CASES = {
    "missing path": (lambda t: ["model.path=/nowhere/model.gguf", CHECK], 2, "model-missing", "/nowhere/model.gguf"),
    "no model given": (lambda t: [CHECK], 2, "missing-key", "model.path"),
    "too many ranks": (lambda t: [f"model.path={GGUF}", CHECK, "parallel.tp_size=9"], 1, "tp-heads", "tp_size=8"),
    "no rank": (lambda t: [f"model.path={GGUF}", CHECK, "parallel.tp_size=0"], 2, "error[", "tp_size"),
    "truncated gguf": (lambda t: [f"model.path={gguf_with(t, truncate)}", CHECK], 2, "file-truncated", "m.gguf"),
    "unknown gguf type": (lambda t: [f"model.path={gguf_with(t, unknown_type)}", CHECK], 1, "gguf-type", "99"),
    "missing tensor": (
        lambda t: [f"model.path={base(t, drop('model.norm.weight'))}", CHECK], 1,
        "tensor-missing", "model.norm.weight"),
    "renamed tensor": (
        lambda t: [f"model.path={base(t, rename('model.norm.weight', 'model.nrom.weight'))}", CHECK], 1,
        "tensor-unexpected", "model.nrom.weight"),
    "extra tensor": (lambda t: [f"model.path={base(t, add)}", CHECK], 1, "tensor-unexpected", "mlp.shared.weight"),
    "misshapen tensor": (lambda t: [f"model.path={base(t, shrink)}", CHECK], 1, "tensor-shape", "[7]"),
    "unsupported architecture": (
        lambda t: [f"model.path={base(t, config={'architectures': ['MambaForCausalLM']})}", CHECK], 1,
        "architecture-unsupported", "Qwen3ForCausalLM"),
    "pattern of no module": (
        lambda t: [f"model.path={GGUF}", CHECK, 'quantization.layers=[{pattern: "*.ffn.*", scheme: float}]'], 1,
        "pattern-unmatched", "*.ffn.*"),
    "scheme the file does not hold": (
        lambda t: [f"model.path={GGUF}", CHECK, 'quantization.layers=[{pattern: "*", scheme: w8a8_dynamic}]'], 1,
        "scheme-mismatch", "w8a8_dynamic"),
    "npu that is not there": (lambda t: [f"model.path={GGUF}", "runtime.device=npu", 'job.prompts=[x]'], 1,
                              "device-absent", "runtime.device=cpu"),
    "fp32 on an npu": (lambda t: [f"model.path={GGUF}", "job=plan", "runtime.device=npu", "runtime.dtype=float32"], 1,
                       "dtype-device", "bfloat16"),
    "does not fit": (lambda t: [f"model.path={GGUF}", "job=plan", "runtime.max_batch=1000000000"], 1, "memory", "GiB"),
    "context beyond the model": (lambda t: [f"model.path={GGUF}", "job=plan", "runtime.context=99999999"], 1,
                                 "context", "runtime.context="),
    "an assumption instead of a file": (
        lambda t: ["model.path=/no/weights", CHECK, "model.assume={config: x.json}"], 2, "config-missing", "x.json"),
    "an assumption without its config": (
        lambda t: ["model.path=/no/weights", CHECK, "model.assume.format=awq"], 2, "missing-key",
        "model.assume.config"),
    "messages without an author": (
        lambda t: [f"model.path={GGUF}", f"job.prompt_file={jsonl(t)}"], 2, "prompt-file", "p.jsonl:3"),
    "nothing to generate from": (lambda t: [f"model.path={GGUF}"], 2, "prompts-missing", "job.prompts"),
    "prompt longer than the context": (
        lambda t: [f"model.path={GGUF}", "runtime.context=4", 'job.prompts=["one two three four five six seven"]'], 2,
        "prompt-too-long", "context"),
    "nothing to verify against": (lambda t: [f"model.path={GGUF}", "job=verify"], 2, "reference-missing",
                                  "job.against"),
    "reference that is no archive": (
        lambda t: [f"model.path={GGUF}", "job=verify", f"job.reference={GGUF}"], 2, "reference-key", "prompt0.logits"),
    "wrong sha256": (
        lambda t: [f"model.path={GGUF}", CHECK, "model.sha256=" + "0" * 64], 2, "sha256-mismatch", "0000"),
    "codes that the config declares and the file lacks": (
        lambda t: [f"model.path={base(t, config={'quantization_config': {'quant_method': 'awq', 'bits': 4}})}", CHECK],
        1, "description-missing", "no linear"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_wrong_input_is_refused_in_one_message(case, tmp_path):
    given, status, code, names = CASES[case]
    returned, said = launch(tmp_path, "recipe=llm/local", *given(tmp_path))
    assert returned == status, said
    assert code in said
    assert names in said
    assert "Traceback" not in said
    assert "error[" in said


@pytest.mark.slow
def test_truncated_safetensors(tmp_path):
    folder = base(tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    returned, said = launch(tmp_path, "recipe=llm/local", f"model.path={folder}", CHECK)
    assert (returned, "file-truncated" in said, "Traceback" in said) == (2, True, False), said


@pytest.mark.slow
def test_a_missing_tokenizer_stops_generate_alone(tmp_path):
    folder = base(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    where = [f"model.path={folder}", "recipe=llm/local"]
    assert launch(tmp_path, *where, CHECK)[0] == 0
    returned, said = launch(tmp_path, *where, "job.prompts=[hi]")
    assert (returned, "tokenizer-missing" in said) == (2, True), said


def test_pickled_arrays_in_a_reference_are_not_read(tmp_path):
    from framework.errors import InputError
    from framework.jobs.reference import read_reference

    np.savez(tmp_path / "r.npz", **{"prompt0.input_ids": np.array([print], dtype=object)})
    with pytest.raises(InputError) as caught:
        read_reference(tmp_path / "r.npz", None)
    assert caught.value.problems[0].code == "reference-file"


def test_a_safetensors_reference_is_read(tmp_path):
    from framework.jobs.reference import read_reference

    logits = np.arange(12, dtype=np.float32).reshape(3, 4)
    arrays = {"input_ids_0": np.array([1, 2, 3]), "logits_0": logits}
    safetensors.numpy.save_file(arrays, tmp_path / "r.safetensors")
    (reference,) = read_reference(tmp_path / "r.safetensors", None)
    assert reference.ids == [1, 2, 3]
    assert np.array_equal(reference.logits, logits)
