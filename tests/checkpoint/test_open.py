"""Headers are believed only as far as the file bears them out."""

import json
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.checkpoint.index import Index
from framework.checkpoint.open import open_index
from framework.checkpoint.reader import Reader
from framework.errors import InputError, UserError

GOLDEN = Path(__file__).parents[1] / "golden" / "tiny-qwen3"
GGUF = GOLDEN / "gguf-q2_k-1l" / "model.gguf"


def code(call, *args):
    with pytest.raises(InputError) as caught:
        call(*args)
    return caught.value.problems[0].code


@pytest.fixture
def folder(tmp_path):
    safetensors.numpy.save_file({"a.weight": np.ones((4, 8), np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


def raw_safetensors(path, header, body=b""):
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return path


def test_a_safetensors_folder_is_indexed_with_its_config(folder):
    index = open_index(folder)
    assert index.container == "safetensors" and index.config == {}
    info = index.tensors["a.weight"]
    assert (info.dtype, info.shape, info.nbytes) == ("F32", (4, 8), 128)
    with Reader() as reader:
        columns = reader.read(info, 1, 3, 4, 12).view("<f4")
    assert columns.tolist() == [[1, 1], [1, 1]]


def test_a_gguf_is_known_by_its_magic_whatever_its_name(tmp_path):
    shutil.copy(GGUF, tmp_path / "weights.safetensors")
    assert open_index(tmp_path / "weights.safetensors").container == "gguf"


def test_a_missing_path_says_so(tmp_path):
    assert code(open_index, tmp_path / "nowhere") == "model-missing"


def test_a_gguf_suffix_without_the_magic_is_an_error(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"nothing of the kind" * 10)
    assert code(open_index, tmp_path / "m.gguf") == "wrong-magic"


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt"])
def test_pickles_are_never_read(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    assert code(open_index, tmp_path) == "pickle-refused"
    assert code(open_index, tmp_path / name) == "pickle-refused"


@pytest.mark.parametrize("keep", [0, 3, 8, 20, 200])
def test_a_truncated_safetensors_is_named(folder, keep):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert code(open_index, folder) == "file-truncated"


@pytest.mark.parametrize("share", [0.001, 0.02, 0.5, 0.999])
def test_a_truncated_gguf_is_named(tmp_path, share):
    data = GGUF.read_bytes()
    (tmp_path / "m.gguf").write_bytes(data[: max(6, int(len(data) * share))])
    assert code(open_index, tmp_path / "m.gguf") == "file-truncated"


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]},
        {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1.5], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1]},
        {"dtype": "F32", "shape": "x", "data_offsets": [0, 4]},
        17,
    ],
)
def test_a_tensor_entry_that_contradicts_itself_is_malformed(tmp_path, entry):
    path = raw_safetensors(tmp_path / "m.safetensors", {"a": entry}, b"\0" * 8)
    assert code(open_index, path) == "file-malformed"


def test_overlapping_tensors_are_malformed(tmp_path):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    path = raw_safetensors(tmp_path / "m.safetensors", {"a": entry, "b": entry}, b"\0" * 8)
    assert code(open_index, path) == "file-malformed"


@pytest.mark.parametrize("name", ["../secrets.safetensors", "/etc/x.safetensors", "model.bin"])
def test_an_index_may_not_name_files_outside_its_folder(folder, name):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a.weight": name}}))
    assert code(open_index, folder) == "weight-map"


def test_an_index_that_names_the_wrong_file_is_an_error(folder):
    safetensors.numpy.save_file({"b": np.ones(2, np.float32)}, folder / "other.safetensors")
    names = {"a.weight": "other.safetensors", "b": "other.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    assert code(open_index, folder) == "weight-map"


def test_links_as_the_hub_cache_makes_them_are_followed(folder, tmp_path):
    blob = tmp_path / "blob"
    (folder / "model.safetensors").rename(blob)
    (folder / "model.safetensors").symlink_to(blob)
    assert "a.weight" in open_index(folder).tensors


def test_a_missing_part_of_a_split_gguf_is_named(tmp_path):
    for part in sorted((GOLDEN / "gguf-q4_0-split-1l").glob("*.gguf"))[:3]:
        shutil.copy(part, tmp_path)
    assert code(open_index, tmp_path) == "file-missing"


def test_auto_map_is_ignored_with_a_note(folder):
    (folder / "config.json").write_text('{"auto_map": {"AutoModel": "evil.Model"}}')
    assert "auto_map" in open_index(folder).notes[0]


@given(data=st.data())
@settings(max_examples=200, deadline=2000)
def test_mutated_gguf_headers_end_in_an_index_or_a_user_error(data, tmp_path_factory):
    raw = bytearray(GGUF.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, 30000) | st.integers(0, 400))
        raw[position] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "mutated.gguf"
    path.write_bytes(raw)
    try:
        assert isinstance(open_index(path), Index)
    except UserError as error:
        assert error.problems[0].what
