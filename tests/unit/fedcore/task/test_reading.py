"""When a loader's error is one of a data folder that is not set, and when it is another one."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedcore.errors import DataFolderMissing
from fedcore.task.reading import require_folder


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
def test_any_other_error_is_left_to_be_told(error: Exception) -> None:
    require_folder("test data", None, error)


def test_an_error_with_a_folder_is_another_one() -> None:
    require_folder("test data", Path("/data"), AssertionError())
