"""When a loader's error is one of a data folder that is not set, and when it is another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedcore.errors import DataFolderMissing
from fedcore.task.reading import lacks_folder, require_folder


@pytest.mark.parametrize(
    "error",
    [
        TypeError("unsupported operand type(s) for /: 'NoneType' and 'str'"),
        FileNotFoundError(2, "No such file or directory", "None/train.csv"),
        AssertionError(),
    ],
)
def test_a_loader_that_used_no_folder_as_a_path_lacks_one(error: Exception) -> None:
    with pytest.raises(DataFolderMissing, match="FEDCORE_DATA"):
        require_folder("test data", None, error)


@pytest.mark.parametrize(
    "error",
    [
        OSError("no such disk"),
        FileNotFoundError(2, "No such file or directory", "/data/train.csv"),
        AssertionError("rows differ"),
        TypeError("expected a tensor"),
    ],
)
def test_any_other_error_has_another_cause(error: Exception) -> None:
    assert not lacks_folder(None, error)


def test_an_error_with_a_folder_has_another_cause() -> None:
    assert not lacks_folder(Path("/data"), AssertionError())
