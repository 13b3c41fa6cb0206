"""Headers are believed only as far as the file bears them out."""

import json
import shutil
import struct
from pathlib import Path

import gguf
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
        {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [10**3000] * 500, "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [1] * 1000, "data_offsets": [0, 4]},
        17,
    ],
)
def test_a_tensor_entry_that_contradicts_itself_is_malformed(tmp_path, entry):
    path = raw_safetensors(tmp_path / "m.safetensors", {"a": entry}, b"\0" * 8)
    assert code(open_index, path) == "file-malformed"


def test_a_tensor_named_twice_is_malformed(tmp_path):
    entry = '{"dtype": "F32", "shape": [1], "data_offsets": [%d, %d]}'
    text = f'{{"a": {entry % (0, 4)}, "a": {entry % (4, 8)}}}'.encode()
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * 8)
    assert code(open_index, tmp_path / "m.safetensors") == "file-malformed"


@pytest.mark.parametrize("text", [b"[" * 100000, b"\xff\xfe{", b"[]", b"{", b'{"a": null}'])
def test_a_header_that_is_no_table_of_tensors_is_malformed(tmp_path, text):
    (tmp_path / "m.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    assert code(open_index, tmp_path / "m.safetensors") == "file-malformed"


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


def test_a_link_to_a_blob_that_was_evicted_is_a_missing_file(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(folder / "gone")
    assert code(open_index, folder) == "file-missing"


def test_weights_that_are_a_folder_or_a_device_are_no_files(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert code(open_index, folder) == "file-unreadable"
    assert code(open_index, Path("/dev/null")) == "file-truncated"


def test_any_part_opens_the_whole_split_gguf():
    parts = sorted((GOLDEN / "gguf-q4_0-split-1l").glob("*.gguf"))
    indexes = [open_index(part) for part in [*parts, parts[0].parent]]
    assert len({(index.root, index.files) for index in indexes}) == 1
    assert all(index.tensors == indexes[0].tensors for index in indexes[1:])
    assert len(indexes[0].files) == 4 and "output.weight" in indexes[0].tensors


@pytest.mark.parametrize("name", ["m.gguf", "m-00001-of-00000.gguf", "m-00005-of-00004.gguf"])
def test_a_part_whose_name_contradicts_it_is_malformed(tmp_path, name):
    part = GOLDEN / "gguf-q4_0-split-1l" / "model-00002-of-00004.gguf"
    shutil.copy(part, tmp_path / name)
    assert code(open_index, tmp_path / name) == "file-malformed"


def test_parts_in_the_wrong_order_are_malformed(tmp_path):
    parts = sorted((GOLDEN / "gguf-q4_0-split-1l").glob("*.gguf"))
    for part, other in zip(parts, reversed(parts), strict=True):
        shutil.copy(part, tmp_path / other.name)
    assert code(open_index, tmp_path) == "file-malformed"


def test_a_folder_of_two_gguf_models_is_ambiguous(tmp_path):
    shutil.copy(GGUF, tmp_path / "a.gguf")
    shutil.copy(GGUF, tmp_path / "b.gguf")
    assert code(open_index, tmp_path) == "model-ambiguous"


def gguf_with(path, pairs=b"", pair_count=0, tensors=b"", tensor_count=0, version=3, body=0):
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", version, tensor_count, pair_count) + pairs + tensors + b"\0" * body)
    return path


KEY = struct.pack("<Q", 1) + b"k"


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (struct.pack("<Q", 1 << 62), "file-truncated"),  # a key longer than any file
        (KEY + struct.pack("<I", 99), "file-malformed"),  # an unknown value type
        (KEY + struct.pack("<IIQ", 9, 9, 2), "file-malformed"),  # arrays of arrays
        (KEY + struct.pack("<IIQ", 9, 4, 1 << 62), "file-truncated"),  # more numbers than bytes
        (KEY + struct.pack("<IIQ", 9, 8, 1 << 62), "file-truncated"),  # more strings than bytes
        (KEY + struct.pack("<IIQQ", 9, 8, 1, 1 << 63), "file-truncated"),  # a string beyond the end
    ],
)
def test_counts_in_a_gguf_header_are_bounded_by_the_file(tmp_path, pairs, expected):
    assert code(open_index, gguf_with(tmp_path / "m.gguf", pairs, 1, body=64)) == expected


def test_a_header_may_not_ask_for_millions_of_objects(tmp_path):
    path = gguf_with(tmp_path / "m.gguf", KEY + struct.pack("<IIQ", 9, 0, 9 << 20), 1, body=9 << 20)
    assert code(open_index, path) == "file-malformed"


@pytest.mark.parametrize(("version", "why"), [(1, "2 and 3"), (4, "2 and 3"), (3 << 24, "byte order")])
def test_other_versions_of_gguf_are_refused(tmp_path, version, why):
    with pytest.raises(InputError) as caught:
        open_index(gguf_with(tmp_path / "m.gguf", version=version))
    assert caught.value.problems[0].code == "gguf-version" and why in caught.value.problems[0].why


def test_an_unknown_tensor_type_is_kept_for_the_check_to_show(tmp_path):
    entry = struct.pack("<Q", 1) + b"t" + struct.pack("<IQQIQ", 2, 32, 2, 77, 0)
    path = gguf_with(tmp_path / "m.gguf", tensors=entry, tensor_count=1, body=96)
    assert open_index(path).tensors["t"].dtype == "type 77"


def test_a_gguf_opens_without_decoding_its_vocabulary_and_decodes_it_alike():
    index = open_index(GGUF)
    tokens = index.metadata["tokenizer.ggml.tokens"]
    field = gguf.GGUFReader(GGUF).fields["tokenizer.ggml.tokens"]
    assert tokens._decoded is None and len(tokens) == len(field.data)
    assert (
        list(tokens) == field.contents() and tokens[3] == field.contents()[3] and tokens[-2:] == field.contents()[-2:]
    )


def test_tensors_lie_where_the_gguf_library_finds_them():
    index = open_index(GGUF)
    reader = gguf.GGUFReader(GGUF)
    theirs = {
        t.name: (t.data_offset, t.n_bytes, t.tensor_type.name, tuple(map(int, reversed(t.shape))))
        for t in reader.tensors
    }
    assert {t.name: (t.offset, t.nbytes, t.dtype, t.shape) for t in index.tensors.values()} == theirs


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


@given(data=st.data())
@settings(max_examples=200, deadline=2000)
def test_mutated_safetensors_headers_end_in_an_index_or_a_user_error(data, tmp_path_factory):
    entries = {f"t{i}": {"dtype": "F32", "shape": [2], "data_offsets": [8 * i, 8 * i + 8]} for i in range(4)}
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}).encode()
    raw = bytearray(struct.pack("<Q", len(text)) + text + b"\0" * 32)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(raw) - 1) | st.integers(0, 7))
        raw[position] = data.draw(st.integers(0, 255) | st.sampled_from(list(b'0123456789[]{}",:')))
    path = tmp_path_factory.getbasetemp() / "mutated.safetensors"
    path.write_bytes(raw[: data.draw(st.integers(len(raw) - 40, len(raw)))])
    try:
        assert isinstance(open_index(path), Index)
    except UserError as error:
        assert error.problems[0].what
