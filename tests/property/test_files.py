from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedcore.errors import DataError
from fedcore.files import read_bytes, write_atomic, write_json

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(st.binary(max_size=300), st.binary(max_size=300), st.integers(0, 300))
def test_the_last_bytes_written_are_read_within_the_limit(
    old: bytes, new: bytes, limit: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        write_atomic(path, old)
        write_atomic(path, new)
        if len(new) <= limit:
            assert read_bytes(path, max_bytes=limit, what="a test") == new
        else:
            with pytest.raises(DataError, match=f"{len(new)} bytes, more than the {limit}"):
                read_bytes(path, max_bytes=limit, what="a test")


@given(JSON)
def test_json_is_read_back(value: object) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.json"
        write_json(path, value)
        assert json.loads(path.read_text()) == value
