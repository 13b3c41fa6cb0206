"""The reader returns the bytes asked for, reads little else, and says when a file has shrunk."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from framework.checkpoint.index import TensorInfo
from framework.checkpoint.reader import Reader
from framework.errors import InputError


def tensor(path, rows, row_bytes, offset=96):
    values = np.random.default_rng(rows).integers(0, 256, (rows, row_bytes), dtype=np.uint8)
    Path(path).write_bytes(b"x" * offset + values.tobytes())
    return TensorInfo("t", Path(path), offset, values.size, "U8", (rows, row_bytes)), values


@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_any_rows_and_columns_come_back_as_they_stand_in_the_file(tmp_path_factory, data):
    row_bytes = data.draw(st.sampled_from([1, 7, 64, 5000]))
    info, values = tensor(tmp_path_factory.getbasetemp() / "t.bin", 9, row_bytes)
    r0, c0 = data.draw(st.integers(0, 9)), data.draw(st.integers(0, row_bytes))
    r1, c1 = data.draw(st.integers(r0, 9)), data.draw(st.integers(c0, row_bytes))
    with Reader() as reader:
        assert np.array_equal(reader.read(info, r0, r1, c0, c1), values[r0:r1, c0:c1])
        assert reader.bytes_read <= (r1 - r0) * row_bytes


def test_leading_dimensions_are_flattened_into_rows(tmp_path):
    info, values = tensor(tmp_path / "t.bin", 6, 8)
    stacked = TensorInfo("t", info.file, info.offset, info.nbytes, "U8", (2, 3, 8))
    vector = TensorInfo("t", info.file, info.offset, info.nbytes, "U8", (48,))
    with Reader() as reader:
        assert np.array_equal(reader.read(stacked, 3, 6), values[3:])
        assert np.array_equal(reader.read(vector, 0, 1), values.reshape(1, -1))


def code(path, info):
    with Reader() as reader, pytest.raises(InputError) as caught:
        reader.read(info, 0, 9)
    return caught.value.problems[0].code


def test_a_file_that_shrank_or_went_after_its_header_was_read_is_named(tmp_path):
    info, _ = tensor(tmp_path / "t.bin", 9, 64)
    with info.file.open("r+b") as file:
        file.truncate(300)
    assert code(tmp_path, info) == "file-truncated"
    info.file.unlink()
    assert code(tmp_path, info) == "file-missing"
    info.file.mkdir()
    assert code(tmp_path, info) == "file-unreadable"
